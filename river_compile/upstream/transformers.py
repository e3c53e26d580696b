"""All uses of transformers beyond its public API, in the spelling of every supported release.

*KV caches.* Newer releases call a model's cache ``cache`` and can free the last slots of a static one; older ones call
it ``past_key_values`` and cannot, and their sliding windows that remember what left them show it to attention too.

*Growing sizes.* Left alone, Dynamo takes the sizes that it sees first for constants, and traces the model a second time
when the next token finds one entry more. A mark on the dimension makes it trace once. A graph that was traced without
marks does not serve marked tensors, so the same kind of call has to be marked always or never.

*Copies.* ``copy``, ``pickle`` and ``torch.save`` ask an object, not its class, for ``__getstate__``. One on the module
itself leaves out what was put there, and itself: a copy is of the plain model, and is read without this package.

*Compiled twice.* On a GPU `generate` compiles the steps on a static cache by itself, with Inductor. Dynamo looks
through the call that somebody compiled before, and nothing of its backend is left.

*Arguments of generate.* transformers passes a streamer and an assistant model on to its own loops only, and drops the
tokenizer of ``stop_strings`` before a callable. They are read from the local variables of its running frames.

Not handled: caches of encoder-decoder models; static caches with layers other than full attention and sliding windows
(None); classes whose ``__getstate__`` does not return a dict.
"""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._dynamo import maybe_mark_dynamic
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, StaticCache
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    QuantizedLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from river_compile.upstream.dynamo import CHANGES_NOTHING

_NAMES = ("cache", "past_key_values")


def leave_compiled_models_alone() -> None:
    """Has `generate` compile no model by itself that is compiled already; a `compile_config` still asks for it."""
    mixin: Any = GenerationMixin
    theirs = mixin._valid_auto_compile_criteria

    @functools.wraps(theirs)
    def criteria(model: Any, kwargs: dict[str, Any], config: GenerationConfig) -> bool:
        if model._compiled_call_impl is not None and config.compile_config is None:
            return False
        return bool(theirs(model, kwargs, config))

    mixin._valid_auto_compile_criteria = criteria


def cache_argument(model: nn.Module) -> str:
    """Returns how a model's forward, its `generate` and their outputs call the cache."""
    return next(name for name in _NAMES if name in inspect.signature(model.forward).parameters)


def cache_of(arguments: Mapping[str, Any]) -> Cache | None:
    """Returns the cache among a forward's arguments, None if there is none."""
    return next((arguments[name] for name in _NAMES if arguments.get(name) is not None), None)


def is_of_transformers(model: nn.Module) -> bool:
    """Whether a model's class is one that came with transformers, whose code is known."""
    return type(model).__module__.partition(".")[0] == "transformers"


def cannot_crop(cache: Cache) -> list[str]:
    """Returns the names of the classes of those layers whose last slots cannot be freed, sorted.

    A static sliding window is not among them: `crop_layer` frees its slots while it has dropped nothing, and from then
    on its entries must be copied before they go (`decoding/rewind.py`).
    """
    static = (StaticLayer, StaticSlidingWindowLayer)

    def can(layer: Any) -> bool:  # (older releases call quantized layers croppable)
        return type(layer) in static or (layer.is_croppable and not isinstance(layer, QuantizedLayer))

    return sorted({type(layer).__name__ for layer in cache.layers if not can(layer)})


def remember_past(cache: Cache) -> None:
    """Makes growing sliding windows keep evicted entries until the next `crop`, which may restore them."""
    cache.activate_past_recording()
    for layer in cache.layers if _shows_the_past(DynamicSlidingWindowLayer) else ():
        if type(layer) is DynamicSlidingWindowLayer:
            layer.__class__ = _RememberingWindow


class _RememberingWindow(DynamicSlidingWindowLayer):
    """Shows attention the window alone, however much it remembers."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        visible = self.sliding_window - 1 + key_states.shape[-2]
        return keys[:, :, -visible:], values[:, :, -visible:]


@functools.cache
def _shows_the_past(window: type[DynamicSlidingWindowLayer]) -> bool:
    """Whether a window of two tokens that remembers shows three to attention."""
    layer, one = window(sliding_window=2), torch.zeros(1, 1, 1, 1)
    layer.activate_past_recording()
    return [layer.update(one, one)[0].shape[2] for _ in range(3)][-1] > 2


def crop(cache: Cache, tokens: int) -> None:
    """Frees a cache's last slots; even for none, sliding windows that grow are trimmed to what they need."""
    for layer in cache.layers:
        crop_layer(layer, tokens)


def crop_layer(layer: Any, tokens: int) -> None:
    """Frees a layer's last slots, as `crop` does."""
    if hasattr(layer, "crop"):
        layer.crop(-tokens)
        return
    layer.cumulative_length.sub_(tokens)
    if isinstance(layer, StaticSlidingWindowLayer):
        layer.cumulative_length_int -= tokens


def rows_can_part(layer: Any) -> bool:
    """Whether a layer holds nothing but keys and values ``[B, H, slots, D]``, in which rows may be moved."""
    kinds = (StaticLayer, StaticSlidingWindowLayer, DynamicLayer, DynamicSlidingWindowLayer, _RememberingWindow)
    return type(layer) in kinds


def with_rows(cache: Cache, rows: Sequence[int]) -> Cache:
    """Returns a cache of some of a cache's rows, whose layers are all such that `rows_can_part`.

    Those of static layers move to the front of the same memory, so that what knows its address finds them; the cache
    that was given is of no use afterwards.
    """
    return _of_layers(cache, [_layer_with_rows(layer, rows) for layer in cache.layers])


def front_rows(cache: Cache, rows: int) -> Cache:
    """Returns a view of a static cache's first rows."""
    return _of_layers(cache, [_with_tensors(layer, layer.keys[:rows], layer.values[:rows]) for layer in cache.layers])


def put_rows(cache: Cache, first: int, other: Cache, last: int) -> None:
    """Copies the entries of another static cache into rows of this one, from the `first` on, so that they end at slot
    `last`."""
    for here, there in zip(cache.layers, other.layers, strict=True):
        count = int(there.cumulative_length)
        for name in ("keys", "values"):
            entries = getattr(there, name)[:, :, :count]
            getattr(here, name)[first : first + len(entries), :, last - count : last].copy_(entries)


def _of_layers(cache: Cache, layers: list[Any]) -> Cache:
    chosen = copy.copy(cache)
    chosen.layers = layers
    return chosen


def _layer_with_rows(layer: Any, rows: Sequence[int]) -> Any:
    moved = [_moved_rows(tensor, rows, isinstance(layer, StaticLayer)) for tensor in (layer.keys, layer.values)]
    return _with_tensors(layer, *moved)


def _moved_rows(tensor: Tensor, rows: Sequence[int], in_place: bool) -> Tensor:
    """Returns some rows of a tensor, at the front of its memory if that is asked for."""
    count = len(rows)
    if in_place and all(row == place or row >= count for place, row in enumerate(rows)):  # (none is written over)
        for place, row in enumerate(rows):
            if row != place:
                tensor[place].copy_(tensor[row])
        return tensor[:count]
    moved = tensor.index_select(0, torch.tensor(rows, device=tensor.device))
    return tensor[:count].copy_(moved) if in_place else moved


def _with_tensors(layer: Any, keys: Tensor, values: Tensor) -> Any:
    chosen = copy.copy(layer)
    chosen.keys, chosen.values = keys, values
    if hasattr(layer, "batch_size"):
        chosen.batch_size = len(keys)
    return chosen


def slots_needed(layer: Any, tokens: int) -> int:
    """Returns how many of the last entries of this many tokens a layer that grows needs."""
    return min(tokens, layer.sliding_window - 1) if isinstance(layer, DynamicSlidingWindowLayer) else tokens


def set_length(layer: Any, tokens: int) -> None:
    """Makes a layer whose entries were put in place by hand one that holds the last of so many tokens."""
    if isinstance(layer, StaticSlidingWindowLayer):
        layer.cumulative_length_int = tokens
    if isinstance(layer, StaticLayer):
        if tokens <= layer.max_cache_len:  # (a full window leaves it as it was)
            layer.cumulative_length.fill_(tokens)
    elif isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = tokens


_KINDS = (StaticLayer, StaticSlidingWindowLayer)


def static_cache(model: PreTrainedModel, slots: int) -> StaticCache | None:
    """Returns a cache with capacity for so many tokens, whose layers have no memory yet."""
    cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=slots)
    return cache if is_static(cache) else None


def is_static(cache: Cache) -> bool:
    """Whether all layers of a cache are such as this module knows."""
    return all(type(layer) in _KINDS for layer in cache.layers)


def is_allocated(cache: Cache) -> bool:
    """Whether all layers of a static cache have their memory, which else the first pass allocates."""
    return all(getattr(layer, "keys", None) is not None for layer in cache.layers)


def sizes_of(cache: Cache) -> list[int]:
    """Returns the slots of each layer: a sliding window has no more than it shows."""
    return [layer.max_cache_len for layer in cache.layers]


def bytes_of(cache: Cache) -> int:
    """Returns the memory of its keys and values."""
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None)


def allocate(cache: StaticCache, model: PreTrainedModel, rows: int) -> None:
    """Gives a cache its memory before the first pass, if the shapes of a model's heads are certain.

    That is, where transformers reads from the configuration what the layers that make the keys are. Elsewhere the first
    prompt allocates it, in a graph that no later prompt can use.
    """
    shape_of = getattr(model, "_get_static_cache_init_shape", lambda: None)
    shape = shape_of()
    if shape is None or torch.is_autocast_enabled(model.device.type):  # (autocast says what dtype keys have)
        return
    heads, features = ([n] * len(cache.layers) if isinstance(n, int) else n for n in shape)
    made = {getattr(m, "out_features", 0) for name, m in model.named_modules() if name.endswith("k_proj")}
    if made == {h * f for h, f in zip(heads, features, strict=True)}:
        cache.early_initialization(rows, heads, features, model.dtype, model.device)


def copy_entries(cache: Cache, longer: Cache, tokens: int) -> None:
    """Puts the entries of so many tokens, none of which fell behind for lack of slots, into a cache without memory."""
    for old, new in zip(cache.layers, longer.layers, strict=True):
        new.lazy_initialization(old.keys[:, :, :0], old.values[:, :, :0])
        for name in ("keys", "values"):
            entries = getattr(old, name)
            getattr(new, name)[:, :, : entries.shape[2]].copy_(entries)
        set_length(new, tokens)


class LayerEntries(NamedTuple):
    """The entries of one row in a layer, ``[H, tokens, D]``, and the device that their cache lies on."""

    keys: Tensor
    values: Tensor
    device: torch.device

    def copied(self) -> LayerEntries:
        """Returns a copy in the host's memory."""
        keys, values = (torch.empty(t.shape, dtype=t.dtype).copy_(t) for t in (self.keys, self.values))
        return LayerEntries(keys, values, self.device)


def entries_of(cache: Cache, tokens: int) -> list[LayerEntries]:
    """Returns the first entries of a static cache of one row, as views of it."""
    return [
        LayerEntries(layer.keys[0, :, :tokens], layer.values[0, :, :tokens], layer.device) for layer in cache.layers
    ]


def put_entries(cache: Cache, entries: Sequence[LayerEntries], tokens: int) -> None:
    """Makes a static cache of one row hold the first of these entries and nothing else."""
    for layer, saved in zip(cache.layers, entries, strict=True):
        if layer.is_initialized:
            _empty_from(layer, tokens)
        else:
            layer.lazy_initialization(*(t[None, :, :0].to(saved.device) for t in (saved.keys, saved.values)))
        layer.keys[0, :, :tokens].copy_(saved.keys[:, :tokens])
        layer.values[0, :, :tokens].copy_(saved.values[:, :tokens])
        set_length(layer, tokens)


def keep_first(cache: Cache, tokens: int) -> None:
    """Empties a static cache but for its first entries, none of which fell behind for lack of slots."""
    for layer in cache.layers:
        _empty_from(layer, tokens)
        set_length(layer, tokens)


def _empty_from(layer: Any, tokens: int) -> None:
    """Zeroes the slots of a layer but for the first: what a mask hides may be multiplied by 0 all the same."""
    layer.keys[:, :, tokens:].zero_()
    layer.values[:, :, tokens:].zero_()


_TOKENS = {"input_ids": 1, "inputs_embeds": 1, "position_ids": -1, "cache_position": 0, "attention_mask": 1}


def mark_growing(arguments: Mapping[str, Any], prompts: bool) -> None:
    """Marks the entries of caches that grow, and the mask over them, in the arguments of a model's forward, by name.

    With `prompts`, ids and masks are marked without such a cache too.
    """
    tensors = [*_entries(arguments)]
    if prompts or tensors:
        tensors += _by_token(arguments)
    for tensor, dim in tensors:
        if tensor.shape[dim] > 1:  # (Dynamo compiles sizes of 0 and 1 by themselves)
            maybe_mark_dynamic(tensor, dim % tensor.dim())


def _by_token(arguments: Mapping[str, Any]) -> Iterator[tuple[Tensor, int]]:
    for name, dim in _TOKENS.items():
        value = arguments.get(name)
        if isinstance(value, Tensor) and 1 <= value.dim() < 4:
            yield value, dim
    for _, mask in masks_of(arguments):
        if isinstance(mask, Tensor) and mask.dim() == 4:
            yield mask, 2


def masks_of(arguments: Mapping[str, Any]) -> Iterator[tuple[str | None, Any]]:
    """Yields the mask of each kind of attention with its name, or the one of all with None."""
    mask = arguments.get("attention_mask")
    yield from mask.items() if type(mask) is dict else [(None, mask)]


def _entries(arguments: Mapping[str, Any]) -> Iterator[tuple[Tensor, int]]:
    for layer in getattr(cache_of(arguments), "layers", ()):
        if isinstance(layer, DynamicLayer) and layer.is_initialized and layer.keys.dim() == 4:
            yield from ((layer.keys, 2), (layer.values, 2))


_GETSTATE = "__getstate__"


def keep_out_of_copies(module: nn.Module, *attributes: str) -> None:
    """Makes copies of a module come without these attributes of it, and without hooks that change nothing."""
    state = vars(module).get(_GETSTATE)
    if not isinstance(state, _PlainState):
        state = vars(module)[_GETSTATE] = _PlainState(module)
    state.leave_out.update(attributes)


def restore_copying(module: nn.Module) -> None:
    """Undoes :func:`keep_out_of_copies`."""
    if isinstance(vars(module).get(_GETSTATE), _PlainState):
        del vars(module)[_GETSTATE]


class _PlainState:
    """Stands as ``__getstate__`` on one module."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self.leave_out = {_GETSTATE}

    def __call__(self) -> Any:
        module = self._module()
        assert module is not None, "a module that is being copied is alive"
        state = type(module).__getstate__(module)
        if not isinstance(state, dict):
            return state
        plain = {name: value for name, value in state.items() if name not in self.leave_out}
        hooks = state["_forward_pre_hooks"]
        plain["_forward_pre_hooks"] = type(hooks)(
            (number, hook) for number, hook in hooks.items() if not getattr(hook, CHANGES_NOTHING, False)
        )
        return plain


def argument_of_generate(name: str) -> Any:
    """Returns an argument of the generate call that is running, None if it has none."""
    frame = _running("generate")
    return None if frame is None else frame.f_locals.get(name)


def shares_cache(config: GenerationConfig) -> bool:
    """Whether the caller of the generate that is running brings its KV cache, or gets it back."""
    return config.return_dict_in_generate or cache_of(argument_of_generate("kwargs") or {}) is not None


def _running(function: str) -> FrameType | None:
    """Returns the innermost frame of a function of that name."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != function:
        frame = frame.f_back
    return frame


class KeepsTokenizer:
    """Descriptor for ``__signature__`` of a callable given as ``custom_generate``.

    ``generate`` takes the tokenizer out of its arguments, asks for the callable's signature, and then keeps only those
    arguments that the signature names. While it asks, the tokenizer is put back among the arguments.
    """

    def __get__(self, instance: Any, owner: type) -> inspect.Signature:
        if instance is None:
            raise AttributeError("__signature__")  # the class itself has its ordinary signature
        frame = _running("_extract_generation_mode_kwargs")
        if frame is not None:
            taken, left = (frame.f_locals.get(name) for name in ("generation_mode_kwargs", "kwargs"))
            if isinstance(taken, dict) and isinstance(left, dict) and "tokenizer" in taken:
                left["tokenizer"] = taken["tokenizer"]
        whole = inspect.signature(owner.__call__)
        _, *parameters, rest = whole.parameters.values()
        options = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in instance.per_call]
        return whole.replace(parameters=[*parameters, *options, rest])
