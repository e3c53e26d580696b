"""All uses of transformers beyond its public API, in the spelling of every supported release.

*KV caches.* Newer releases call a model's cache ``cache``; older ones call it ``past_key_values``.

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

import functools
import inspect
import weakref
from collections.abc import Iterable, Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import maybe_mark_dynamic
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, StaticCache
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

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


def full_static_cache(model: PreTrainedModel, slots: int) -> StaticCache:
    """Returns a static cache without memory, in which layers of sliding windows hold all tokens too.

    Masks are made by the sizes that layers state, so a window becomes a mask.
    """
    cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=slots)
    windows = (type(layer) is StaticSlidingWindowLayer for layer in cache.layers)
    cache.layers = [
        StaticLayer(max_cache_len=slots) if window else layer
        for window, layer in zip(windows, cache.layers, strict=True)
    ]
    return cache


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


_TOKENS = {"input_ids": 1, "inputs_embeds": 1, "position_ids": -1, "cache_position": 0, "attention_mask": 1}


def mark_growing(arguments: Mapping[str, Any]) -> None:
    """Marks what grows with a text in the arguments of a model's forward: ids, masks, and entries of caches."""
    for tensor, dim in (*_entries(arguments), *_by_token(arguments)):
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
    """Makes copies of a module come without these attributes of it."""
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
        return {name: value for name, value in state.items() if name not in self.leave_out}


def argument_of_generate(name: str) -> Any:
    """Returns an argument of the generate call that is running, None if it has none."""
    frame = _running("generate")
    return None if frame is None else frame.f_locals.get(name)


# What transformers puts into the configuration of a call that names no other value.
_FILLED_IN = {"num_assistant_tokens": 20, "num_assistant_tokens_schedule": "constant"}


def given_settings(names: Iterable[str]) -> dict[str, Any]:
    """Returns the generation settings of these names that the running generate call was given, by keyword or config."""
    kwargs, config = argument_of_generate("kwargs") or {}, argument_of_generate("generation_config")
    found = {name: kwargs.get(name) for name in names}
    for name in names:
        value = getattr(config, name, None)
        if found[name] is None and value != _FILLED_IN.get(name):
            found[name] = value
    return {name: value for name, value in found.items() if value is not None}


def callers_cache() -> Cache | None:
    """Returns the KV cache that the caller of the generate that is running brings, None if it brings none."""
    return cache_of(argument_of_generate("kwargs") or {})


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
