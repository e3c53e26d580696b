"""Begins a text: its passes, on a KV cache that may hold its first tokens, and its prompt.

Not handled: which calls are refused (`refusals.py`), prompts that run in parts during decoding (`batch_loop.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from river_compile.decoding.call import Call
from river_compile.decoding.inputs import prepares_as_most_do
from river_compile.decoding.kv_cache import KVCache, needs_own_cache
from river_compile.decoding.passes import Passes
from river_compile.decoding.prefix_cache import PrefixPool
from river_compile.decoding.prompt import Prompt
from river_compile.errors import RiverError, RiverWarning
from river_compile.kernels.messages import with_id
from river_compile.model_state import model_state
from river_compile.record import record_of
from river_compile.tracing.programs import ProgramCache
from river_compile.upstream.transformers import cache_of


class StaticCaches:
    """What is known of a model and static KV caches."""

    why_not = ""  # the error of a prompt on one, if it ran on a cache that grows


def passes_for(
    model: PreTrainedModel,
    kwargs: Mapping[str, Any],
    rows: int,
    tokens: int,
    ids: Tensor | None,
    depth: int | None,
    *,
    keeps_hidden: bool = False,
) -> Passes:
    """Return the passes of a text, on a static KV cache of the model's pool if the model takes one.

    Args:
        model: it was set up, or compiled by its user.
        kwargs: its inputs, with the KV cache that generate made, if any.
        rows: of the text.
        tokens: of the prompt.
        ids: ``[S]`` of the prompt whose first tokens the cache may hold; None if its entries depend on more.
        depth: of decode steps; None: by the exit policy.
        keeps_hidden: whether the last hidden states are kept; then the whole prompt runs.
    """
    record = record_of(model.parameters())
    programs = record.find(ProgramCache)
    state = None if programs is None else model_state(model, programs.config)
    made = cache_of(kwargs)
    kv = None if made is None else KVCache(made)
    if kv is None or _takes_static_cache(model, record.of(StaticCaches)):
        known = None if keeps_hidden else ids
        ours, _ = record.of(PrefixPool).acquire(model, rows, tokens, known, None if state is None else state.of_entries)
        kv = ours if ours.is_full or kv is None else kv
    return Passes(model, kwargs, kv, depth, state, ids is not None, keeps_hidden)


def run_prompt(call: Call, passes_of: Callable[[Call], Passes]) -> tuple[Passes, Tensor]:
    """Return a call's passes after its prompt, and the prompt's last logits ``[B, 1, V]``."""
    passes, fits = passes_of(call), record_of(call.model.parameters()).of(StaticCaches)
    try:
        return passes, Prompt(passes, call.ids_BS, call.config).run()[:, -1:]
    except BaseException as error:
        passes.release()
        tried = passes.kv.is_full and not call.model._can_compile_fullgraph and isinstance(error, RuntimeError)
        if not tried or isinstance(error, RiverError):
            raise
        fits.why_not = " ".join(str(error).split())[:200]
    # Whether the code of such a model takes a static cache shows only when it runs.
    passes = passes_of(call)
    try:
        logits = Prompt(passes, call.ids_BS, call.config).run()[:, -1:]
    except BaseException:
        passes.release()
        fits.why_not = ""  # the cache was not the reason
        raise
    kind = type(call.model).__name__
    message = f"{kind} takes no static KV cache ({fits.why_not}), so it decodes on one that grows, without drafts"
    warnings.warn(with_id("RC064", message), RiverWarning, stacklevel=2)
    return passes, logits


def _takes_static_cache(model: PreTrainedModel, known: StaticCaches) -> bool:
    # The masks of CPM-Ant and GPT-Neo are for caches that grow, and Moshi's for one that slides.
    fits = model._can_compile_fullgraph or prepares_as_most_do(model)
    return fits and not needs_own_cache(model) and not known.why_not
