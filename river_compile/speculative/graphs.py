"""A model's forward pass compiled with options of its own, for strict verification.

Not handled: hooks on the model itself, which such a pass does not call.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from river_compile.backend import river
from river_compile.config import RiverConfig


class BatchInvariantGraph:
    """A model's forward pass in a graph in which a token's bits do not depend on the width of the pass.

    Args:
        model: the model.
        config, mode: what to compile it with.
    """

    def __init__(self, model: PreTrainedModel, config: RiverConfig, mode: str | None) -> None:
        options = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        # The class's function, not the model's method: a compiled method would keep the model alive.
        self._forward = torch.compile(type(model).forward, backend=river, options=options, mode=mode)

    def __call__(self, model: PreTrainedModel, **inputs: object) -> CausalLMOutputWithPast:
        return self._forward(model, **inputs)


class BatchInvariantGraphs(dict[tuple[RiverConfig, str | None], BatchInvariantGraph]):
    """Those of one model, by the options and the mode that they were compiled with.

    Attributes:
        verdicts: by those, batch and slots of a static cache (or None), and then by width and which sliding windows
            were full: whether a pass was found to have the bits of narrow ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self.verdicts: defaultdict[tuple[object, ...], dict[tuple[object, ...], bool]] = defaultdict(dict)
