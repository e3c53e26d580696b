"""Sets up a model whose passes River runs: its compiled call, its programs, and where its twins are packed.

Not handled: its ``generate`` (`api/generation.py`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedModel

from river_compile.backend import river
from river_compile.building.graph_record import Graphs
from river_compile.config import RiverConfig
from river_compile.decoding.prefix_cache import PrefixPool
from river_compile.decoding.prefix_files import PrefixFiles
from river_compile.lowering.lower import begin_kernels
from river_compile.record import record_of
from river_compile.tracing.programs import ProgramCache
from river_compile.twins.pack import TwinWeights
from river_compile.upstream.dynamo import OwnCall


def set_up(
    model: PreTrainedModel,
    options: Mapping[str, Any],
    config: RiverConfig,
    stores: bool,
    in_background: bool,
    prompts_on_disk: bool = False,
) -> Callable[[], None]:
    """Return a function that replaces what River keeps of a model's programs; nothing is traced or packed yet.

    What can fail is done before it returns.

    Args:
        options: of the backend, and `config`, the same checked.
        stores: whether the compile cache is read and written.
        in_background: whether twins that only drafts read are packed while the model answers without them.
        prompts_on_disk: whether long prompts are kept in the compile cache.
    """
    record, call = record_of(model.parameters()), OwnCall(river, options)
    programs = ProgramCache(config, stores)
    begin_kernels(config, model.device)

    def put() -> None:
        record.put(call, programs, Graphs())
        record.of(PrefixPool).files = PrefixFiles() if prompts_on_disk else None
        twins = record.of(TwinWeights)
        twins.stores, twins.background.enabled = stores, in_background
        weakref.finalize(model, _end_packing, weakref.ref(twins)).atexit = False

    return put


def _end_packing(twins: weakref.ref[TwinWeights]) -> None:
    """End the packing for a model that is gone, which holds its weights, unless a later process uses the result."""
    here = twins()
    packing = None if here is None else here.background.packing
    if packing is not None and not packing.finishes_at_exit:
        packing.cancel()
