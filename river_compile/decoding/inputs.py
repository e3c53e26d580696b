"""The inputs of a session's passes: ids, masks and positions, moved on in place from pass to pass.

`generate` makes them anew for every pass, up to half a millisecond of it. On a cache of full static layers a later pass
sees some slots more or fewer, a sliding window's mask moves along, and positions differ by as many.

Not handled (transformers' own methods make every pass's inputs then): other caches, attention in chunks, models that
prepare their inputs or masks in a way of their own, inputs that other things than these belong to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import StaticLayer

from river_compile.compile_cache.programs import named_arguments
from river_compile.upstream.transformers import cache_of, is_transformers_model, masks_of

KNOWN = {"input_ids", "attention_mask", "position_ids", "cache", "past_key_values", "logits_to_keep", "use_cache"}

Inputs = dict[str, Any]

# Arguments of a forward whose last dimension is that of the ids.
BY_SLOT = ("attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")


class MovedInputs:
    """The inputs of passes of one width on one cache, while its rows do not move.

    Args:
        model: the model.
        width: tokens of each row.
        kept: tensors by name that such passes had in an earlier session, to be written again.
    """

    def __init__(self, model: PreTrainedModel, width: int, kept: Mapping[Any, Tensor]) -> None:
        self._model, self._width, self._kept = model, width, kept
        self._inputs: Inputs | None = None  # in tensors of their own, those of the pass that begins in `_slot`
        self._checked = False  # whether a pass that followed from another was compared with transformers'
        self._given_up = False
        self._window: int | None = getattr(model.config.get_text_config(decoder=True), "sliding_window", None)

    def at(self, slot: int, ids_BS: Tensor, prepare: Callable[[], Inputs]) -> Inputs:
        """Returns the inputs of a pass: the same object as the last time, or those that transformers makes.

        Args:
            slot: the first one that the pass writes: as many entries as the cache holds.
            ids_BS: all ids, those of the pass last.
            prepare: makes them by transformers' methods.
        """
        ours = self._inputs if self._move_to(slot, ids_BS) else None
        if ours is not None and self._checked:
            return ours
        theirs = prepare()
        if ours is not None:
            self._checked = _same(ours, theirs)
            self._given_up = not self._checked
            if self._checked:
                return ours
        if self._checked:  # (and does not fit the masks)
            return theirs
        self._inputs = None
        if self._given_up or not self._can_follow(theirs, slot + self._width):
            return theirs
        self._own(_owned(theirs, self._kept), slot)
        return self._inputs or theirs

    def owns(self, inputs: Inputs) -> bool:
        """Whether these are written in place for the next pass."""
        return inputs is self._inputs

    def _own(self, inputs: Inputs, slot: int) -> None:
        """Takes a pass's inputs, which are in tensors of their own, for those to be moved."""
        masks = dict(masks_of(inputs))
        self._inputs, self._positions = inputs, inputs.get("position_ids")
        self._first = self._slot = slot
        self._slots = min(mask.shape[-1] for mask in masks.values())
        # Of each mask: itself, how the pass's tokens see each other, how one sees itself and what comes later, and of a
        # window how the first token sees each slot that it shows (padding among them).
        end = slot + self._width
        self._masks = [
            (
                mask,
                mask[..., slot:end].clone(),
                mask[..., -1:, end - 1 : end].clone(),
                mask[..., -1:, end:][..., :1].clone(),
                mask[..., :1, :].clone() if kind in (None, "sliding_attention") and self._window is not None else None,
            )
            for kind, mask in masks.items()
        ]

    def _move_to(self, slot: int, ids_BS: Tensor) -> bool:
        """Makes the inputs those of a pass that begins in a slot; returns False where there are none that can be."""
        width = self._width
        if self._inputs is None or slot + width > self._slots or slot < self._first:
            return False
        before, self._slot = self._slot, slot
        for mask, block, seen, hidden, shown in self._masks:
            if shown is not None:
                self._move_window(mask, seen, hidden, shown, slot)
                continue
            if slot > before:
                mask[..., before:slot] = seen
            elif slot < before:
                mask[..., slot + width : before + width] = hidden
            mask[..., slot : slot + width] = block
        if self._positions is not None and slot != before:
            self._positions.add_(slot - before)
        self._inputs["input_ids"].copy_(ids_BS[:, -width:])
        return True

    def _move_window(self, mask: Tensor, seen: Tensor, hidden: Tensor, shown: Tensor, slot: int) -> None:
        assert self._window is not None, "windows have a size"
        shown[..., self._first : slot + self._width] = seen
        mask.copy_(hidden)
        for token in range(self._width):
            end = slot + token + 1
            start = max(end - self._window, 0)
            mask[..., token, start:end] = shown[..., 0, start:end]

    def _can_follow(self, inputs: Inputs, filled: int) -> bool:
        """Whether the inputs of later passes follow from these, after which the cache holds so many entries."""
        cache = cache_of(inputs)
        return (
            inputs.keys() <= KNOWN
            and cache is not None
            and all(type(layer) is StaticLayer for layer in cache.layers)
            and not any(kind == "chunked_attention" for kind, _ in masks_of(inputs))
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
    known = is_transformers_model(model) and prepares_as_most_do(model) and model.config._attn_implementation == "sdpa"
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


def joined_inputs(kwargs: Mapping[str, object], others: Mapping[str, object]) -> dict:
    """Returns a forward's arguments, as `generate` keeps them, for the rows of both; all end in the same column."""
    joined = dict(kwargs)
    for name in BY_SLOT:
        held, other = kwargs.get(name), others.get(name)
        if isinstance(held, Tensor) and isinstance(other, Tensor):
            most = max(held.shape[-1], other.shape[-1])
            joined[name] = torch.cat([pad(t, (most - t.shape[-1], 0)) for t in (held, other)], dim=-2)
    return joined


def selected_inputs(kwargs: Mapping[str, object], rows: Sequence[int]) -> dict:
    """Returns a forward's arguments, as `generate` keeps them, for some of the rows."""
    selected = dict(kwargs)
    for name in BY_SLOT:
        held = selected.get(name)
        if isinstance(held, Tensor):  # (positions of three kinds stand before the rows)
            selected[name] = held.index_select(held.ndim - 2, torch.tensor(rows, dtype=torch.long, device=held.device))
    return selected


def prepares_as_most_do(model: PreTrainedModel) -> bool:
    """Whether a model's inputs and masks are made by the methods that nearly all have in common."""
    kind = type(model)
    return (
        kind.prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation
        and kind._update_model_kwargs_for_generation is GenerationMixin._update_model_kwargs_for_generation
        and not hasattr(model, "create_masks_for_generate")
    )


def _owned(inputs: Inputs, kept: Mapping[Any, Tensor]) -> Inputs:
    """Returns a pass's inputs in tensors that may be written: those of an earlier pass that look the same, or new."""
    masks = {kind: _copied(mask) for kind, mask in masks_of(inputs)}
    own = {**inputs, "input_ids": inputs["input_ids"].clone(memory_format=torch.contiguous_format)}
    several = type(inputs["attention_mask"]) is dict
    own["attention_mask"] = masks if several else masks[None]
    if inputs.get("position_ids") is not None:
        own["position_ids"] = _copied(inputs["position_ids"])
    for name, tensor in [*named_arguments(own)]:
        held = kept.get(name)
        if held is None or not isinstance(tensor, Tensor) or not _alike(held, tensor):
            continue
        held.copy_(tensor)
        if isinstance(name, tuple):
            masks[name[1]] = held
        else:
            own[name] = held
    return own


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
