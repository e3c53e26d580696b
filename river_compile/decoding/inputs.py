"""The inputs of a call's passes (ids, masks and positions), updated in place from pass to pass.

Not handled (transformers' methods make every pass's inputs then): other caches than full static ones, chunked
attention, models with their own preparation of inputs or masks, other inputs than `KNOWN`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import StaticLayer

from river_compile.tracing.forward import named_arguments
from river_compile.upstream.transformers import cache_of, is_transformers_model, masks_of

KNOWN = {"input_ids", "attention_mask", "position_ids", "cache", "past_key_values", "logits_to_keep", "use_cache"}

Inputs = dict[str, Any]

# Arguments of a forward with the ids' last dimension.
BY_SLOT = ("attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")


class MovedInputs:
    """The inputs of passes of one width on one cache, while its rows stay the same."""

    def __init__(self, model: PreTrainedModel, width: int, kept: Mapping[Any, Tensor]) -> None:
        self._model, self._width = model, width
        self._kept = kept  # tensors by name of such passes in an earlier call, to be reused
        self._inputs: Inputs | None = None  # owned; of the pass that begins at `_slot`
        self._checked = False  # whether an updated pass was compared with transformers'
        self._given_up = False
        self._window: int | None = getattr(model.config.get_text_config(decoder=True), "sliding_window", None)

    def update(self, slot: int, ids_BS: Tensor, prepare: Callable[[], Inputs]) -> Inputs:
        """Return a pass's inputs: the same object as the last time, or transformers'."""
        # `slot` is the first one that the pass writes. Transformers' methods take up to half a millisecond a pass.
        ours = self._inputs if self._move_to(slot, ids_BS) else None
        if ours is not None and self._checked:
            return ours
        theirs = prepare()
        if ours is not None:
            self._checked = _same(ours, theirs)
            self._given_up = not self._checked
            if self._checked:
                return ours
        if self._checked:  # the pass is outside of the masks
            return theirs
        self._inputs = None
        if self._given_up or not self._can_follow(theirs, slot + self._width):
            return theirs
        self._own(_owned(theirs, self._kept), slot)
        return self._inputs or theirs

    def owns(self, inputs: Inputs) -> bool:
        """Whether these are updated in place for the next pass."""
        return inputs is self._inputs

    def _own(self, inputs: Inputs, slot: int) -> None:
        """Use a pass's inputs, in separate tensors, from here on."""
        masks = dict(masks_of(inputs))
        self._inputs, self._positions = inputs, inputs.get("position_ids")
        self._first = self._slot = slot
        self._slots = min(mask.shape[-1] for mask in masks.values())
        # Of each mask: itself; the block of the pass's own tokens; the values for a visible and a hidden slot; and
        # for a sliding window, the first token's row (it shows padding).
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
        """Update the inputs for a pass that begins at a slot; return False if that is impossible."""
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
        """Whether later inputs follow from these, after which the cache holds `filled` entries."""
        cache = cache_of(inputs)
        return (
            inputs.keys() <= KNOWN
            and cache is not None
            and all(type(layer) is StaticLayer for layer in cache.layers)
            and not any(kind == "chunked_attention" for kind, _ in masks_of(inputs))
            and prepares_as_most_do(self._model)
            and all(isinstance(mask, Tensor) and mask.dim() == 4 for _, mask in masks_of(inputs))
            and all(filled < mask.shape[-1] for _, mask in masks_of(inputs))
            and all(map(_is_dense, (mask for _, mask in masks_of(inputs))))
            and ("position_ids" not in inputs or _is_dense(inputs["position_ids"]))
        )


def with_all_logits(inputs: Inputs) -> Inputs:
    """Return inputs that ask for all tokens' logits: another number would be another graph."""
    return {**inputs, "logits_to_keep": 0} if "logits_to_keep" in inputs else inputs


def with_masks(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """Return a prompt's inputs with the causal masks that transformers omits."""
    # A prompt then looks like any pass of several tokens, so one graph serves both.
    ids_BS, cache = inputs["input_ids"], cache_of(inputs)
    missing = [kind for kind, mask in masks_of(inputs) if mask is None]
    known = is_transformers_model(model) and prepares_as_most_do(model) and model.config._attn_implementation == "sdpa"
    if not missing or cache is None or not known:
        return inputs
    batch, width = ids_BS.shape
    slots = {layer.max_cache_len for layer in cache.layers}
    if len(slots) != 1:  # only the model knows the attention kind of each
        return inputs
    places = torch.arange(slots.pop(), device=ids_BS.device)
    mask = (places <= places[:width, None]).expand(batch, 1, width, -1).contiguous()
    given = inputs.get("attention_mask")
    return {**inputs, "attention_mask": {**given, **dict.fromkeys(missing, mask)} if given is not None else mask}


def extended_inputs(model: PreTrainedModel, kwargs: Mapping[str, object], more: int) -> dict:
    """Return generate's model arguments after `more` new tokens, as they are after decoding one by one."""
    if not more:
        return dict(kwargs)
    extended: dict = model._update_model_kwargs_for_generation({}, dict(kwargs), num_new_tokens=more)
    types = kwargs.get("token_type_ids")
    if isinstance(types, Tensor):  # transformers repeats the last `more` types; one by one, that is the last one
        extended["token_type_ids"] = torch.cat([types, types[:, -1:].expand(-1, more)], dim=-1)
    return extended


def joined_inputs(kwargs: Mapping[str, object], others: Mapping[str, object]) -> dict:
    """Return generate's model arguments for the rows of both; all end in the same column."""
    joined = dict(kwargs)
    for name in BY_SLOT:
        own, other = kwargs.get(name), others.get(name)
        if isinstance(own, Tensor) and isinstance(other, Tensor):
            most = max(own.shape[-1], other.shape[-1])
            joined[name] = torch.cat([pad(t, (most - t.shape[-1], 0)) for t in (own, other)], dim=-2)
    return joined


def selected_inputs(kwargs: Mapping[str, object], rows: Sequence[int]) -> dict:
    """Return generate's model arguments for some of the rows."""
    selected = dict(kwargs)
    for name in BY_SLOT:
        given = selected.get(name)
        if isinstance(given, Tensor):  # a dimension of three kinds of positions may precede the rows
            index = torch.tensor(rows, dtype=torch.long, device=given.device)
            selected[name] = given.index_select(given.ndim - 2, index)
    return selected


def prepares_as_most_do(model: PreTrainedModel) -> bool:
    """Whether a model uses the common methods for its inputs and masks."""
    kind = type(model)
    return (
        kind.prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation
        and kind._update_model_kwargs_for_generation is GenerationMixin._update_model_kwargs_for_generation
        and not hasattr(model, "create_masks_for_generate")
    )


def _owned(inputs: Inputs, kept: Mapping[Any, Tensor]) -> Inputs:
    """Return a pass's inputs in writable tensors: those of an earlier pass that look the same, or new."""
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
    """Return a copy, a view if the tensor is one: Dynamo guards on the bases of views."""
    base = tensor._base
    return tensor.clone() if base is None else base.clone().as_strided(*_place(tensor))


def _place(tensor: Tensor) -> tuple:
    return tensor.size(), tensor.stride(), tensor.storage_offset()


def _is_dense(tensor: Tensor | None) -> bool:
    """Whether no two elements share memory, as those of an expanded tensor do."""
    return tensor is None or all(n == 1 or stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors look the same to compiled code, whatever their values."""
    if (a._base is None) is not (b._base is None):
        return False
    pairs = [(a, b)] if a._base is None or b._base is None else [(a, b), (a._base, b._base)]
    return all(x.dtype == y.dtype and _place(x) == _place(y) for x, y in pairs)


def _same(ours: Inputs, theirs: Inputs) -> bool:
    """Whether two passes have the same inputs, to the bit."""
    if ours.keys() != theirs.keys() or [kind for kind, _ in masks_of(ours)] != [kind for kind, _ in masks_of(theirs)]:
        return False
    pairs = [(a, b) for (_, a), (_, b) in zip(masks_of(ours), masks_of(theirs), strict=True)]
    pairs += [(ours[name], theirs[name]) for name in ours if name != "attention_mask"]
    return all(
        _alike(a, b) and torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b
        for a, b in pairs
    )
