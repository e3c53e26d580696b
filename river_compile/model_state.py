"""A model as a call of generate finds it: what its programs depend on, and what the entries of its texts depend on.

    identity   code, configuration, attributes, hooks, shapes, dtypes, devices: `store/identity.py`
    weights    which tensors its parameters and buffers are, and how they look: `twins/parameter_stamp.py`

Not handled (a model without a state): ranks that share a model, tensors made of others, and other models without
identity; rotary embeddings whose frequencies depend on how long the text is, so that a token's entries do too.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from river_compile.config import RiverConfig
from river_compile.store.identity import identity_of
from river_compile.twins.parameter_stamp import ParameterStamp


class ModelState(NamedTuple):
    """What the entries of a text depend on beside its tokens; holds no tensor of the model."""

    identity: str
    weights: ParameterStamp


class ModelLook:
    """A look at a model, at the beginning of a call: each part is looked at once, and only if somebody asks.

    Args:
        model: the model.
        config: what it is compiled with.
    """

    def __init__(self, model: PreTrainedModel, config: RiverConfig) -> None:
        self._model, self.config = model, config

    @functools.cached_property
    def identity(self) -> str | None:
        """A hash, None for a model that has none."""
        return identity_of(self._model, self.config)

    @functools.cached_property
    def whole(self) -> ModelState | None:
        """Both parts, None without an identity."""
        if self.identity is None:
            return None
        return ModelState(self.identity, ParameterStamp([*self._model.parameters(), *self._model.buffers()]))

    @functools.cached_property
    def state(self) -> ModelState | None:
        """What entries depend on, None where they depend on more."""
        return None if any(map(_follows_length, self._model.modules())) else self.whole


def _follows_length(module: nn.Module) -> bool:
    """Whether a module is a rotary embedding that changes while a text grows (transformers' `dynamic_rope_update`)."""
    kinds = getattr(module, "rope_type", "")
    kinds = map(str, kinds.values() if type(kinds) is dict else [kinds])
    return any("dynamic" in kind or kind == "longrope" for kind in kinds)
