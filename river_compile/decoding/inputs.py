"""The inputs of a session's passes: ids, masks and positions, moved on in place from pass to pass.

`generate` makes them anew for every pass, up to half a millisecond of it. On a static cache that no sliding window of
has become full, a later pass sees some slots more or fewer, and its positions differ by as many.

Not handled (transformers' own methods make every pass's inputs then): caches that grow, full sliding windows, models
that prepare their inputs or masks in a way of their own, inputs that other things than these belong to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from river_compile.upstream.transformers import cache_of, is_of_transformers, masks_of

KNOWN = {"input_ids", "attention_mask", "position_ids", "cache", "past_key_values", "logits_to_keep", "use_cache"}

Inputs = dict[str, Any]


class PassInputs:
    """The inputs of passes of one width on one cache, while its rows do not move.

    Args:
        model: the model.
        width: tokens of each row.
    """

    def __init__(self, model: PreTrainedModel, width: int) -> None:
        self._model, self._width = model, width
        self._own: _Moved | None = None
        self._checked = False  # whether a pass that followed from another was compared with transformers'
        self._given_up = False

    def at(self, slot: int, ids_BS: Tensor, prepare: Callable[[], Inputs]) -> Inputs:
        """Returns the inputs of a pass: the same object as the last time, or those that transformers makes.

        Args:
            slot: the first one that the pass writes: as many entries as the cache holds.
            ids_BS: all ids, those of the pass last.
            prepare: makes them by transformers' methods.
        """
        own = self._own
        ours = own is not None and own.move_to(slot, ids_BS)
        if own is not None and ours and self._checked:
            return own.inputs
        theirs = prepare()
        if own is not None and ours:
            self._checked = _same(own.inputs, theirs)
            self._given_up = not self._checked
        if not self._checked and not self._given_up and self._can_follow(theirs, slot + self._width):
            self._own = _Moved(theirs, slot, self._width)
            return self._own.inputs
        if not self._checked:
            self._own = None
        return theirs

    def owns(self, inputs: Inputs) -> bool:
        """Whether these are written in place for the next pass."""
        return self._own is not None and inputs is self._own.inputs

    def _can_follow(self, inputs: Inputs, filled: int) -> bool:
        """Whether the inputs of later passes follow from these, after which the cache holds so many entries."""
        cache = cache_of(inputs)
        return (
            inputs.keys() <= KNOWN
            and cache is not None
            and all(_has_room(layer, filled) for layer in cache.layers)
            and prepares_as_most_do(self._model)
            and all(isinstance(mask, Tensor) and mask.dim() == 4 for _, mask in masks_of(inputs))
            and all(filled < mask.shape[-1] for _, mask in masks_of(inputs))
            and all(map(_has_places_of_its_own, (mask for _, mask in masks_of(inputs))))
            and ("position_ids" not in inputs or _has_places_of_its_own(inputs["position_ids"]))
        )


def with_all_logits(inputs: Inputs) -> Inputs:
    """Returns inputs that ask for the logits of all tokens: another number would be a graph of its own."""
    return {**inputs, "logits_to_keep": 0} if "logits_to_keep" in inputs else inputs


def with_masks(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """Returns the inputs of a prompt with the masks that transformers leaves out since attention is causal anyway.

    They are then those of any pass of several tokens, and one graph serves both.
    """
    ids_BS, cache = inputs["input_ids"], cache_of(inputs)
    missing = [kind for kind, mask in masks_of(inputs) if mask is None]
    known = is_of_transformers(model) and prepares_as_most_do(model) and model.config._attn_implementation == "sdpa"
    if not missing or cache is None or not known:
        return inputs
    batch, width = ids_BS.shape
    slots = {layer.max_cache_len for layer in cache.layers}
    if len(slots) != 1:  # (which kind of attention has which is the model's to say)
        return inputs
    places = torch.arange(slots.pop(), device=ids_BS.device)
    mask = (places <= places[:width, None]).expand(batch, 1, width, -1).contiguous()
    given = inputs.get("attention_mask")
    return {**inputs, "attention_mask": {**given, **dict.fromkeys(missing, mask)} if given is not None else mask}


def prepares_as_most_do(model: PreTrainedModel) -> bool:
    """Whether a model's inputs and masks are made by the methods that nearly all have in common."""
    kind = type(model)
    return (
        kind.prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation
        and kind._update_model_kwargs_for_generation is GenerationMixin._update_model_kwargs_for_generation
        and not hasattr(model, "create_masks_for_generate")
    )


class _Moved:
    """Copies of a pass's inputs, which become those of a pass at another slot.

    Args:
        inputs: of a pass by transformers.
        slot: the first one that it writes.
        width: tokens of each row.
    """

    def __init__(self, inputs: Inputs, slot: int, width: int) -> None:
        own = {kind: _copied(mask) for kind, mask in masks_of(inputs)}
        self.inputs = {**inputs, "input_ids": inputs["input_ids"].clone(memory_format=torch.contiguous_format)}
        self.inputs["attention_mask"] = own if type(inputs["attention_mask"]) is dict else own[None]
        self._positions = inputs.get("position_ids")
        if self._positions is not None:
            self.inputs["position_ids"] = self._positions = _copied(self._positions)
        self._slot, self._width = slot, width
        self._slots = min(mask.shape[-1] for mask in own.values())
        # Of each mask: itself, how the pass's tokens see each other, and how one sees itself and what comes later.
        end = slot + width
        self._masks = [
            (mask, mask[..., slot:end].clone(), mask[..., -1:, end - 1 : end].clone(), mask[..., -1:, end:][..., :1])
            for mask in own.values()
        ]
        self._masks = [(mask, block, seen, hidden.clone()) for mask, block, seen, hidden in self._masks]

    def move_to(self, slot: int, ids_BS: Tensor) -> bool:
        """Makes the inputs those of a pass that begins in a slot; returns False if that does not fit the masks."""
        before, width = self._slot, self._width
        if slot + width > self._slots:
            return False
        for mask, block, seen, hidden in self._masks:
            if slot > before:
                mask[..., before:slot] = seen
            elif slot < before:
                mask[..., slot + width : before + width] = hidden
            mask[..., slot : slot + width] = block
        if self._positions is not None and slot != before:
            self._positions.add_(slot - before)
        self.inputs["input_ids"].copy_(ids_BS[:, -width:])
        self._slot = slot
        return True


def _has_room(layer: Any, filled: int) -> bool:
    return type(layer) is StaticLayer or (type(layer) is StaticSlidingWindowLayer and filled <= layer.max_cache_len)


def _copied(tensor: Tensor) -> Tensor:
    """Returns a copy, a view of a tensor alike where this is one: Dynamo's guards look at what inputs are views of."""
    base = tensor._base
    return tensor.clone() if base is None else base.clone().as_strided(*_place(tensor))


def _place(tensor: Tensor) -> tuple:
    return tensor.size(), tensor.stride(), tensor.storage_offset()


def _has_places_of_its_own(tensor: Tensor | None) -> bool:
    """Whether no two elements share memory, as those of an expanded tensor do."""
    return tensor is None or all(n == 1 or stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors look the same to compiled code, whatever their values."""
    if (a._base is None) is not (b._base is None):
        return False
    pairs = [(a, b)] if a._base is None or b._base is None else [(a, b), (a._base, b._base)]
    return all(x.dtype == y.dtype and _place(x) == _place(y) for x, y in pairs)


def _same(ours: Inputs, theirs: Inputs) -> bool:
    """Whether two passes are given the same, to the bit."""
    if ours.keys() != theirs.keys() or [kind for kind, _ in masks_of(ours)] != [kind for kind, _ in masks_of(theirs)]:
        return False
    pairs = [(a, b) for (_, a), (_, b) in zip(masks_of(ours), masks_of(theirs), strict=True)]
    pairs += [(ours[name], theirs[name]) for name in ours if name != "attention_mask"]
    return all(
        _alike(a, b) and torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b
        for a, b in pairs
    )
