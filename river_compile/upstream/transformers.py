"""All uses of transformers beyond its public API, for every supported release.

Not handled: caches of encoder-decoder models; static caches with layers other than full attention and sliding windows;
classes whose ``__getstate__`` does not return a dict.
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
from transformers import AutoTokenizer, GenerationConfig, GenerationMixin, PreTrainedModel, StaticCache
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

_NAMES = ("cache", "past_key_values")  # of a forward's cache, in newer and older releases


def disable_auto_compile() -> None:
    """Keep `generate` from compiling an already compiled model, unless a `compile_config` asks for it."""
    # On a GPU `generate` compiles steps on a static cache with Inductor, which would replace the first compilation.
    mixin: Any = GenerationMixin
    theirs = mixin._valid_auto_compile_criteria

    @functools.wraps(theirs)
    def criteria(model: Any, kwargs: dict[str, Any], config: GenerationConfig) -> bool:
        if model._compiled_call_impl is not None and config.compile_config is None:
            return False
        return bool(theirs(model, kwargs, config))

    mixin._valid_auto_compile_criteria = criteria


def cache_argument(model: nn.Module) -> str:
    """Return the name of the cache in a model's forward, its `generate` and their outputs."""
    forwards = (model.forward, *(kind.forward for kind in type(model).__mro__ if hasattr(kind, "forward")))
    named = (name for forward in forwards for name in _NAMES if name in inspect.signature(forward).parameters)
    return next(named, _NAMES[-1])  # a subclass's forward may take *args and **kwargs; releases know the older name


def cache_of(arguments: Mapping[str, Any]) -> Cache | None:
    """Return the cache among a forward's arguments, None if there is none."""
    return next((arguments[name] for name in _NAMES if arguments.get(name) is not None), None)


def is_transformers_model(model: nn.Module) -> bool:
    """True if transformers itself defines a model's class, not code that came with a checkpoint."""
    return type(model).__module__.partition(".")[0] == "transformers"


def local_tokenizer(model: nn.Module) -> Any:
    """Return the tokenizer in the folder that a model was loaded from, or in the hub's cache; None without one."""
    name = getattr(model, "name_or_path", "")
    if not name:
        return None
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except Exception:  # any file may be missing or damaged, and any class's code may fail
        return None


def full_static_cache(model: PreTrainedModel, slots: int) -> StaticCache:
    """Return a static cache, not yet allocated, that holds all tokens in sliding-window layers too."""
    # transformers makes masks by the sizes that layers report, so a window becomes a mask.
    cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=slots)
    windows = (type(layer) is StaticSlidingWindowLayer for layer in cache.layers)
    cache.layers = [
        StaticLayer(max_cache_len=slots) if window else layer
        for window, layer in zip(windows, cache.layers, strict=True)
    ]
    return cache


def allocate(cache: StaticCache, model: PreTrainedModel, rows: int) -> None:
    """Allocate a cache before the first pass, if the key layers have the configuration's shapes."""
    # Otherwise the first prompt allocates it, in a graph that no later prompt can use.
    shape_of = getattr(model, "_get_static_cache_init_shape", lambda: None)
    shape = shape_of()
    if shape is None or torch.is_autocast_enabled(model.device.type):  # autocast decides the dtype of keys
        return
    heads, features = ([n] * len(cache.layers) if isinstance(n, int) else n for n in shape)
    made = {getattr(m, "out_features", 0) for name, m in model.named_modules() if name.endswith("k_proj")}
    if made == {h * f for h, f in zip(heads, features, strict=True)}:
        cache.early_initialization(rows, heads, features, model.dtype, model.device)


_TOKENS = {"input_ids": 1, "inputs_embeds": 1, "position_ids": -1, "cache_position": 0, "attention_mask": 1}


def mark_dynamic(arguments: Mapping[str, Any]) -> None:
    """Mark the sizes of ids, masks and growing caches as dynamic; all calls of a kind must do so, or none."""
    # Without marks Dynamo first takes sizes for constants and traces twice; a graph traced without accepts no marks.
    for tensor, dim in (*_cached_tokens(arguments), *_given_tokens(arguments)):
        if tensor.shape[dim] > 1:  # Dynamo always specializes sizes of 0 and 1
            maybe_mark_dynamic(tensor, dim % tensor.dim())


def _given_tokens(arguments: Mapping[str, Any]) -> Iterator[tuple[Tensor, int]]:
    for name, dim in _TOKENS.items():
        value = arguments.get(name)
        if isinstance(value, Tensor) and 1 <= value.dim() < 4:
            yield value, dim
    for _, mask in masks_of(arguments):
        if isinstance(mask, Tensor) and mask.dim() == 4:
            yield mask, 2


def masks_of(arguments: Mapping[str, Any]) -> Iterator[tuple[str | None, Any]]:
    """Yield the mask of each kind of attention with its name, or the one mask with None."""
    mask = arguments.get("attention_mask")
    yield from mask.items() if type(mask) is dict else [(None, mask)]


def _cached_tokens(arguments: Mapping[str, Any]) -> Iterator[tuple[Tensor, int]]:
    for layer in getattr(cache_of(arguments), "layers", ()):
        if isinstance(layer, DynamicLayer) and layer.is_initialized and layer.keys.dim() == 4:
            yield from ((layer.keys, 2), (layer.values, 2))


_GETSTATE = "__getstate__"


def keep_out_of_copies(module: nn.Module, *attributes: str) -> None:
    """Leave attributes of a module out of its copies and pickles, which then load without this package."""
    # `copy`, `pickle` and `torch.save` ask an object, not its class, for `__getstate__`.
    state = vars(module).get(_GETSTATE)
    if not isinstance(state, _PlainState):
        state = vars(module)[_GETSTATE] = _PlainState(module)
    state.leave_out.update(attributes)


def restore_copying(module: nn.Module) -> None:
    """Undo :func:`keep_out_of_copies`."""
    if isinstance(vars(module).get(_GETSTATE), _PlainState):
        del vars(module)[_GETSTATE]


class _PlainState:
    """The ``__getstate__`` of one module; leaves itself out too."""

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


def generate_argument(name: str) -> Any:
    """Return an argument of the running generate call, None if it has none."""
    # Read from its frame: transformers passes a streamer and an assistant model to its own loops only.
    frame = _running("generate")
    return None if frame is None else frame.f_locals.get(name)


# What transformers puts into the configuration of a call that names no other value.
_FILLED_IN = {"num_assistant_tokens": 20, "num_assistant_tokens_schedule": "constant"}


def given_settings(names: Iterable[str]) -> dict[str, Any]:
    """Return the generation settings of these names that the running generate call was given, by keyword or config."""
    kwargs, config = generate_argument("kwargs") or {}, generate_argument("generation_config")
    found = {name: kwargs.get(name) for name in names}
    for name in names:
        value = getattr(config, name, None)
        if found[name] is None and value != _FILLED_IN.get(name):
            found[name] = value
    return {name: value for name, value in found.items() if value is not None}


def callers_cache() -> Cache | None:
    """Return the KV cache that the caller passed to the running generate, None if it passed none."""
    return cache_of(generate_argument("kwargs") or {})


def _running(function: str) -> FrameType | None:
    """Return the innermost frame of a function of that name."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != function:
        frame = frame.f_back
    return frame


class KeepsTokenizer:
    """Descriptor for ``__signature__`` of a ``custom_generate`` callable that needs the tokenizer."""

    # `generate` takes the tokenizer out, asks for the signature, and keeps only arguments that the signature names. So
    # the tokenizer is put back when the signature is asked for.

    def __get__(self, instance: Any, owner: type) -> inspect.Signature:
        if instance is None:
            raise AttributeError("__signature__")  # the class itself has an ordinary signature
        frame = _running("_extract_generation_mode_kwargs")
        if frame is not None:
            taken, left = (frame.f_locals.get(name) for name in ("generation_mode_kwargs", "kwargs"))
            if isinstance(taken, dict) and isinstance(left, dict) and "tokenizer" in taken:
                left["tokenizer"] = taken["tokenizer"]
        whole = inspect.signature(owner.__call__)
        _, *parameters, rest = whole.parameters.values()
        options = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in instance.per_call]
        return whole.replace(parameters=[*parameters, *options, rest])
