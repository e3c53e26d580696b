"""What a user does with a model's twins: save them, and make them again after the weights changed.

Not handled: statistics for them (`accelerate.py`); checkpoints for other engines (`export.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from river_compile.agreement import Agreement
from river_compile.building.graph_record import Graphs
from river_compile.decoding.prefix_cache import PrefixPool
from river_compile.errors import TwinsError
from river_compile.kernels.checks import PATH
from river_compile.record import ModelRecord, find_record, unwrap
from river_compile.runtime.executor import RiverExecutor
from river_compile.twins.file import write
from river_compile.twins.pack import TwinWeights
from river_compile.twins.weights import TwinWeight, is_in
from river_compile.upstream.dynamo import OwnCall


def save_twins(model: nn.Module, folder: str | Path) -> Path:
    """Save the 4-bit twins of a model; ``accelerate(model, twins=folder)`` reads them.

        river_compile.save_twins(river_compile.accelerate(model), "twins")
        river_compile.accelerate(model, twins="twins")

    An accelerated model that has no twins yet is quantized first. If several processes share it, each calls this and
    writes its own part, ``rank-0-of-2`` and so on.

    Args:
        model: an accelerated model, or one compiled with ``backend="river"`` that has generated.
        folder: new or empty. It appears complete or not at all.

    Returns:
        The folder.

    Raises:
        TwinsError: (a ``ValueError``) the model has no twins, its weights changed since, or the folder cannot be
            written.
    """
    folder = Path(PATH("folder", folder, TwinsError))
    plain, record = unwrap(model), find_record(model)
    if record is not None and record.find(OwnCall) is not None:
        _pack(plain, record)
    mine = folder if record is None else record.of(Agreement).part_of(folder)
    write(mine, current_twins(plain, mine))
    return folder


def _pack(model: Any, record: ModelRecord) -> None:
    """Have a model trace its passes and quantize its twins, if it has not yet, and wait for them."""
    if not record.of(Graphs).packed:
        _generate_a_token(model)
    packing = record.of(TwinWeights).background.packing
    if packing is not None:
        packing.wait()
        packing.check()
    if not record.of(Graphs).packed:
        _generate_a_token(model)


def _generate_a_token(model: Any) -> None:
    """Generate two tokens, the second one by a decode step."""
    token = model.generation_config.bos_token_id or 0
    ids = torch.full((1, 2), token if isinstance(token, int) else token[0], device=model.device)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, min_new_tokens=2, do_sample=False)


def current_twins(model: nn.Module, folder: Path) -> list[TwinWeight]:
    """Return a model's twins; raise a TwinsError if there are none, or if their weights changed."""
    record = find_record(model)
    made = record.of(Graphs).packed if record else []
    if not made:
        raise TwinsError(
            f"Cannot save to {folder}: this model has no twins. Call river_compile.accelerate(model) first, or "
            'generate a token with model.compile(backend="river")',
            id="RC045",
        )
    made = [twin for twin in made if is_in(model, twin)] or made  # without those of removed adapters
    stale = next((twin.name for twin in made if not twin.is_current), None)
    if stale is not None:
        raise TwinsError(
            f"Cannot save to {folder}: the weights of {stale} changed after they were quantized. Call "
            "river_compile.requantize(model) and generate a token first",
            id="RC045",
        )
    return made


def requantize(model: nn.Module) -> int:
    """Have the next call quantize the twins of all weights that changed, however they were changed.

        with torch.inference_mode():
            model.lm_head.weight[0, 0] = 1
        river_compile.requantize(model)

    The next prompt notices ``load_state_dict``, an optimizer's step, ``parameter.data = ...`` and a merged adapter by
    itself. Single elements that were changed under ``torch.inference_mode()`` or through ``parameter.data`` are not
    counted by PyTorch: call this then. It reads all weights, and empties the prefix cache.

    Args:
        model: an accelerated or compiled model, or the wrapper that ``torch.compile`` returned.

    Returns:
        The number of matmuls that will be quantized again.
    """
    record = find_record(model)
    if record is None:
        return 0
    record.of(PrefixPool).forget_state()
    for graph in record.of(Graphs):
        if isinstance(executor := graph.executor(), RiverExecutor):
            executor.model_state = None
    return record.of(TwinWeights).compare_digests()
