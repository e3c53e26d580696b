"""What a loop's passes are given: ids, mask and positions, those of an earlier pass of the same width moved on.

`generate` makes them anew for every pass, up to half a millisecond of it. On a static cache that no sliding window of
has become full, a later pass sees some slots more, and positions grow by as many.

Not handled (transformers' own methods make every pass's inputs then): caches that grow, full sliding windows, models
that prepare their inputs or masks in a way of their own, inputs that other things than these belong to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from river_compile.upstream.hf_cache import cache_of

_KNOWN = {"input_ids", "attention_mask", "position_ids", "cache", "past_key_values", "logits_to_keep", "use_cache"}

Inputs = dict[str, Any]


@dataclass
class _Pass:
    """A pass that others follow from.

    Attributes:
        inputs: what transformers made for it.
        slot: the first one that it wrote.
        width: its tokens of each row.
        checked: whether one that followed from it was compared with transformers'.
    """

    inputs: Inputs
    slot: int
    width: int
    checked: bool = False

    def moved_to(self, slot: int, ids_BS: Tensor) -> Inputs | None:
        """Returns the inputs of a pass that begins in a slot, None where it comes before or does not fit the masks."""
        by = slot - self.slot
        masks = dict(_masks(self.inputs))
        if by < 0 or any(slot + self.width > mask.shape[-1] for mask in masks.values()):
            return None
        moved = {**self.inputs, "input_ids": ids_BS[:, -self.width :].clone(memory_format=torch.contiguous_format)}
        own = {kind: self._moved(mask, slot) for kind, mask in masks.items()}
        moved["attention_mask"] = own if type(self.inputs["attention_mask"]) is dict else own[None]
        if moved.get("position_ids") is not None:
            moved["position_ids"] = _copied(moved["position_ids"]).add_(by)
        return moved

    def _moved(self, mask: Tensor, slot: int) -> Tensor:
        moved, first, end = _copied(mask), self.slot, self.slot + self.width
        moved[..., first:slot] = mask[..., -1:, end - 1 : end]  # as a token sees itself
        moved[..., slot : slot + self.width] = mask[..., first:end]
        return moved


class PassInputs:
    """The inputs of the passes of one sequence on one cache, while its rows stay where they are.

    Args:
        model: the model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._passes: dict[int, _Pass | None] = {}  # by width; None where nothing follows

    def of(self, ids_BS: Tensor, width: int, slot: int, prepare: Callable[[], Inputs]) -> Inputs:
        """Returns the inputs of a pass.

        Args:
            ids_BS: all ids, those of the pass last.
            width: tokens of each row.
            slot: the first one that the pass writes: as many entries as the cache holds.
            prepare: makes them by transformers' methods.
        """
        known = self._passes.get(width)
        ours = None if known is None else known.moved_to(slot, ids_BS)
        if known is not None and known.checked and ours is not None:
            return ours
        theirs = prepare()
        if ours is not None and known is not None:
            known.checked = _same(ours, theirs)
            if not known.checked:
                self._passes[width] = None
        elif width not in self._passes or known is not None:
            self._passes[width] = _Pass(theirs, slot, width) if self._can_follow(theirs, slot + width) else None
        return theirs

    def _can_follow(self, inputs: Inputs, filled: int) -> bool:
        """Whether the inputs of later passes follow from these, after which the cache holds so many entries."""
        model, cache = self._model, cache_of(inputs)
        kind = type(model)
        return (
            inputs.keys() <= _KNOWN
            and cache is not None
            and all(_has_room(layer, filled) for layer in cache.layers)
            and kind.prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation
            and kind._update_model_kwargs_for_generation is GenerationMixin._update_model_kwargs_for_generation
            and not hasattr(model, "create_masks_for_generate")
            and all(isinstance(mask, Tensor) and mask.dim() == 4 for _, mask in _masks(inputs))
            and all(filled <= mask.shape[-1] for _, mask in _masks(inputs))
            and all(map(_has_places_of_its_own, (mask for _, mask in _masks(inputs))))
            and ("position_ids" not in inputs or _has_places_of_its_own(inputs["position_ids"]))
        )


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


def _masks(inputs: Inputs) -> Iterator[tuple[str | None, Any]]:
    """Yields the mask of each kind of attention, or the one of all."""
    mask = inputs.get("attention_mask")
    yield from mask.items() if type(mask) is dict else [(None, mask)]


def _same(ours: Inputs, theirs: Inputs) -> bool:
    """Whether two passes are given the same, to the bit."""
    if ours.keys() != theirs.keys() or [kind for kind, _ in _masks(ours)] != [kind for kind, _ in _masks(theirs)]:
        return False
    pairs = [(a, b) for (_, a), (_, b) in zip(_masks(ours), _masks(theirs), strict=True)]
    pairs += [(ours[name], theirs[name]) for name in ours if name != "attention_mask"]
    return all(
        _alike(a, b) and torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b
        for a, b in pairs
    )
