"""Rows that join and leave the passes of a batch, between two cycles.

Not handled: rows with other inputs than ids, masks and positions.
"""

from __future__ import annotations

from torch import Tensor

from river_compile.decoding.inputs import joined_inputs
from river_compile.decoding.passes import Passes


def empty_batch(prompt: Passes, rows: int) -> Passes:
    """Return passes without rows, for `rows` that join; model and depth as of `prompt`."""
    # Memory is allocated for all rows; passes see the first ones, which are in use.
    kv = prompt.kv.like(prompt.kv.slots, rows)
    kv.select([])
    batch = Passes(prompt.model, {}, kv, prompt.depth, prompt.state)
    batch.programs.graph = prompt.graph
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
