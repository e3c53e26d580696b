"""A model as a call of generate finds it: what its programs depend on, and what the entries of its texts depend on.

    identity   code, configuration, attributes, hooks, shapes, dtypes, devices: `compile_cache/identity.py`
    weights    which tensors its parameters and buffers are, and how they look: `twins/weights.py`

Not handled (a model without a state): ranks that share a model, tensors made of others, and other models without
identity; rotary embeddings whose frequencies depend on how long the text is, so that a token's entries do too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from river_compile.compile_cache.identity import identity_of
from river_compile.config import RiverConfig
from river_compile.twins.weights import ParameterStamp


class ModelState(NamedTuple):
    """What passes of a model depend on beside their inputs; holds no tensor of it.

    Attributes:
        identity: a hash of the code and all that it reads but weights.
        weights: the parameters and buffers.
        keeps_entries: whether a token's entries depend on this and the tokens before it alone.
    """

    identity: str
    weights: ParameterStamp
    keeps_entries: bool

    @property
    def of_entries(self) -> ModelState | None:
        """The same, None where a token's entries depend on more."""
        return self if self.keeps_entries else None


def model_state(model: PreTrainedModel, config: RiverConfig) -> ModelState | None:
    """Looks at a model at the beginning of a call; returns None for one without identity.

    Args:
        model: the model.
        config: what it is compiled with.
    """
    identity = identity_of(model, config)
    if identity is None:
        return None
    tensors = [*model.parameters(), *model.buffers()]
    rotary = [module for module in model.modules() if hasattr(module, "rope_type")]
    return ModelState(identity, ParameterStamp(tensors), not any(map(_follows_length, rotary)))


def _follows_length(module: nn.Module) -> bool:
    """Whether a rotary embedding changes while a text grows (transformers' `dynamic_rope_update`)."""
    kinds: Any = module.rope_type
    kinds = map(str, kinds.values() if type(kinds) is dict else [kinds])
    return any("dynamic" in kind or kind == "longrope" for kind in kinds)
