"""Rows that join and leave the passes of a batch, between two cycles.

Not handled: rows with other inputs than ids, masks and positions.
"""

from __future__ import annotations

from torch import Tensor

from river_compile.decoding.inputs import BY_SLOT, joined_inputs
from river_compile.decoding.passes import Passes

_WORTH_GRAPHS = 200  # tokens of one row that pay for compiling its graphs, which takes as long as hundreds of passes


class PromptRows(set[int]):
    """The numbers of rows that a model's prompts had so far."""


def empty_batch(prompt: Passes, rows: int) -> Passes:
    """Return passes without rows, for `rows` that join; model and depth as of `prompt`."""
    # Memory is allocated for all rows; passes see the first ones, which are in use.
    kv = prompt.kv.like(prompt.kv.slots, rows)
    kv.select([])
    batch = Passes(prompt.model, {}, kv, prompt.depth, prompt.state)
    batch.graph = prompt.graph
    return batch


def may_join(batch: Passes, prompt: Passes) -> bool:
    """Whether rows are in use, or the model is as it was when the batch began."""
    return bool(batch.kv.rows) or (batch.state is not None and batch.state == prompt.state)


def join(batch: Passes, prompt: Passes, ids_1S: Tensor) -> None:
    """Add the row of a prompt that has run as the last one."""
    entries = prompt.kv.filled
    kwargs = prompt.kwargs_for(entries + 1)
    if kwargs.get("attention_mask") is None:  # a text without padding, next to padded rows
        kwargs["attention_mask"] = ids_1S.new_ones(1, entries + 1)
    if batch.kv.rows:
        kwargs = joined_inputs(batch.kwargs_for(batch.kv.filled + 1), kwargs)
        entries = max(entries, batch.kv.filled)
    batch.reserve_slots(entries + batch.widths[-1])
    batch.kv.join(prompt.kv)
    batch.kwargs, batch.kwargs_tokens = kwargs, batch.kv.filled + 1
    batch.reset()


def should_shrink(passes: Passes, tokens_left: int) -> bool:
    """Whether to continue a batch with its last running row alone."""
    # Only the cache and the inputs that `selected_inputs` knows may have rows. Strict text needs the batch's bits.
    others = [n for n, value in passes.kwargs.items() if n not in BY_SLOT and isinstance(value, Tensor)]
    known = 1 in passes.record.of(PromptRows) or tokens_left >= _WORTH_GRAPHS
    return known and not (others or passes.is_strict) and passes.kv.is_full
