"""The backbone compiled once more so that a pass over several tokens has the bits of one pass per token.

A copy of the forward graph is compiled with the option ``same_rows`` beside the one that decodes. What it promises by
its construction is also tried out: before a width is used, the same tokens run one by one through the decoding graph
and the results are compared to the bit (:class:`river_compile.speculative.paths.TwoPaths` does that; the verdicts lie
here).

Not handled: hooks on the model itself, which this copy does not call.
"""

from __future__ import annotations

import dataclasses

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from river_compile.backend import river
from river_compile.state import ModelState


class SameRows:
    """Runs a model's forward pass in a graph whose rows do not depend on its width.

    Args:
        state: of a model that the backend has rewritten; its latest options are used.

    Attributes:
        verdicts: whether a pass of (batch, slots of a static cache or None, width) was found to be the plain one's.
    """

    def __init__(self, model: PreTrainedModel, state: ModelState) -> None:
        latest = state.graphs[-1]
        options = {f.name: getattr(latest.config, f.name) for f in dataclasses.fields(latest.config)}
        # The class's function, not the model's method: a compiled method would keep the model alive.
        self._forward = torch.compile(
            type(model).forward, backend=river, options={**options, "same_rows": True}, mode=latest.mode
        )
        self.verdicts: dict[tuple[int, int | None, int], bool] = {}

    def __call__(self, model: PreTrainedModel, **inputs: object) -> CausalLMOutputWithPast:
        return self._forward(model, **inputs)


class _Known(dict[tuple, SameRows]):
    """The strict passes of one model by the options and the mode that they were compiled with."""


def same_rows_of(model: PreTrainedModel, state: ModelState) -> SameRows:
    """Returns the strict passes for a model as it is compiled now, the same object for the same options."""
    known = state.of(_Known)
    key = (dataclasses.replace(state.graphs[-1].config, same_rows=True), state.graphs[-1].mode)
    if key not in known:
        known[key] = SameRows(model, state)
    return known[key]


def entries(cache: Cache) -> list[torch.Tensor]:
    """Returns copies of every layer's keys and values."""
    return [tensor.clone() for layer in cache.layers for tensor in (layer.keys, layer.values)]
