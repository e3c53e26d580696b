"""A model's state at the start of a call: its identity (code, config, shapes) and a stamp of its weights.

Not handled: models without identity (sharded ones, for example), which have no state; KV entries that depend on
the length of the text (dynamic rotary embeddings).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from river_compile.compile_cache.identity import identity_of
from river_compile.config import RiverConfig
from river_compile.twins.weights import ParameterStamp


class ModelState(NamedTuple):
    """All that a pass depends on but its inputs; holds no tensor."""

    identity: str  # hash of the code and of all that it reads but weights
    weights: ParameterStamp  # of parameters and buffers
    keeps_entries: bool  # whether a token's KV entries depend on this and the earlier tokens only

    @property
    def of_entries(self) -> ModelState | None:
        """The state, or None if a token's KV entries depend on more."""
        return self if self.keeps_entries else None


def model_state(model: PreTrainedModel, config: RiverConfig) -> ModelState | None:
    """Return a model's state, or None if it has no identity."""
    identity = identity_of(model, config)
    if identity is None:
        return None
    tensors = [*model.parameters(), *model.buffers()]
    rotary = [module for module in model.modules() if hasattr(module, "rope_type")]
    return ModelState(identity, ParameterStamp(tensors), not any(map(_follows_length, rotary)))


def _follows_length(module: nn.Module) -> bool:
    """Whether a rotary embedding depends on the length of the text (transformers' `dynamic_rope_update`)."""
    kinds: Any = module.rope_type
    kinds = map(str, kinds.values() if type(kinds) is dict else [kinds])
    return any("dynamic" in kind or kind == "longrope" for kind in kinds)
