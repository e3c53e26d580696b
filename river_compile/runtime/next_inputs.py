"""What the next decode step is given: ids, mask and positions, one token further than those of the step before.

`generate` makes them anew for every token, half a millisecond of it. With a static cache of full attention only one
slot of the mask changes, and positions grow by one.

Not handled (transformers' own methods make every step's inputs then): caches that grow, sliding windows, models that
prepare their inputs or masks in a way of their own, inputs that other things than these belong to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, StaticLayer

from river_compile.upstream.hf_cache import cache_argument, cache_of

_KNOWN = {"input_ids", "attention_mask", "position_ids", "cache", "past_key_values", "logits_to_keep", "use_cache"}


class NextInputs:
    """The inputs of the decode steps of one sequence; entries of the cache are counted from the first step on.

    Args:
        model: the model.
        model_kwargs: what `generate` keeps for its forward passes, after the prompt.
    """

    def __init__(self, model: PreTrainedModel, model_kwargs: dict[str, Any]) -> None:
        self._model, self._kwargs = model, model_kwargs
        self._latest: dict[str, Any] | None = None  # the inputs of the step before, where the next ones follow from it
        self._own = False  # whether they were compared with transformers', and are made here from now on
        self._slot = 0
        self._ahead = 0  # steps that `model_kwargs` has not seen

    def after(self, ids_BS: Tensor) -> dict[str, Any]:
        """Returns the inputs of the step that runs the last of these ids, none of whose slots were passed over."""
        if self._own:
            self._latest = self._advanced(ids_BS)
            self._ahead += 1
            return self._latest
        if self._slot:
            self._kwargs = self._model._update_model_kwargs_for_generation({}, self._kwargs)
        inputs = self._model.prepare_inputs_for_generation(ids_BS, next_sequence_length=1, **self._kwargs)
        if self._latest is not None:
            self._own = _same(self._advanced(ids_BS), inputs)
        cache: Any = cache_of(inputs)
        self._latest = inputs if self._follows(inputs, cache) else None
        self._slot = ids_BS.shape[1] if self._latest is None else int(cache.get_seq_length())
        return inputs

    def move_to(self, cache: Cache) -> None:
        """Goes on with another cache, which holds the same entries."""
        if self._ahead:
            self._kwargs = self._model._update_model_kwargs_for_generation({}, self._kwargs, num_new_tokens=self._ahead)
        self._kwargs = {**self._kwargs, cache_argument(self._model): cache}
        self._latest, self._own, self._ahead = None, False, 0

    def _follows(self, inputs: dict[str, Any], cache: Any) -> bool:
        """Whether the inputs of the next step follow from these."""
        model, mask = self._model, _mask(inputs)
        kind = type(model)
        return (
            inputs.keys() <= _KNOWN
            and cache is not None
            and all(type(layer) is StaticLayer for layer in cache.layers)
            and kind.prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation
            and kind._update_model_kwargs_for_generation is GenerationMixin._update_model_kwargs_for_generation
            and not hasattr(model, "create_masks_for_generate")
            and isinstance(mask, Tensor)
            and mask.dim() == 4
            and mask.shape[2] == 1
        )

    def _advanced(self, ids_BS: Tensor) -> dict[str, Any]:
        """Returns the inputs that follow from the latest ones."""
        assert self._latest is not None, "called where there are some"
        inputs = dict(self._latest)
        self._slot += 1
        mask = _mask(inputs).clone()
        if self._slot < mask.shape[-1]:  # (a cache that is full is the executor's error to raise)
            mask[..., self._slot] = mask[..., self._slot - 1]  # what lets a token attend to itself
        inputs["input_ids"] = ids_BS[:, -1:].clone(memory_format=torch.contiguous_format)
        inputs["attention_mask"] = {"full_attention": mask} if type(inputs["attention_mask"]) is dict else mask
        if inputs.get("position_ids") is not None:
            inputs["position_ids"] = inputs["position_ids"] + 1
        return inputs


def _mask(inputs: dict[str, Any]) -> Any:
    mask = inputs.get("attention_mask")
    return mask["full_attention"] if type(mask) is dict and mask.keys() == {"full_attention"} else mask


def _same(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether two steps are given the same, to the bit."""
    if ours.keys() != theirs.keys():
        return False
    pairs = [(_mask(ours), _mask(theirs)), *((ours[name], theirs[name]) for name in ours if name != "attention_mask")]
    return all(
        a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b) if isinstance(a, Tensor) else a is b
        for a, b in pairs
    )
