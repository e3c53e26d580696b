"""All uses of transformers beyond its public API, for every supported release.

Not handled: caches of encoder-decoder models; static caches with layers other than full attention and sliding windows;
classes whose ``__getstate__`` does not return a dict.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from types import MethodType
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
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

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


def prompt_arguments(model: PreTrainedModel, ids_1S: Tensor) -> dict[str, Any]:
    """Return what generate gives to the forward of a model with a prompt without padding, but for ids and cache."""
    accepted = inspect.signature(model.forward).parameters
    arguments: dict[str, Any] = {"use_cache": True}
    if "attention_mask" in accepted:
        arguments["attention_mask"] = None
    if "position_ids" in accepted:
        arguments["position_ids"] = torch.arange(ids_1S.shape[1], device=ids_1S.device)[None]
    if model._supports_logits_to_keep():
        arguments["logits_to_keep"] = 1
    return arguments


def merged_stacks(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the stacks of experts that `from_pretrained` makes of a checkpoint's matrices: no file backs them."""
    made = [
        name
        for conversion in get_model_conversion_mapping(model)
        if isinstance(conversion, WeightConverter)
        for name in conversion.target_patterns
    ]
    return [p for name, p in model.named_parameters() if p.dim() == 3 and any(target in name for target in made)]


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


def running_generate() -> Mapping[str, Any]:
    """Return the arguments of the running generate call: the local variables of its frame; empty without one."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != "generate":
        frame = frame.f_back
    return {} if frame is None else frame.f_locals


_EXTRACT = "_extract_generation_mode_kwargs"  # a method of transformers' generate


def keeping_tokenizer(model: PreTrainedModel, is_ours: Callable[[object], bool]) -> dict[str, MethodType]:
    """Return attributes of a model whose generate keeps the tokenizer for such ``custom_generate`` callables."""
    # transformers keeps it for its own loops only, and needs it for stop strings before any loop begins.
    theirs = getattr(type(model), _EXTRACT)

    def extract(self: Any, custom_generate: object, kwargs: dict[str, Any], *others: Any) -> dict[str, Any]:
        tokenizer = kwargs.get("tokenizer")
        taken: dict[str, Any] = theirs(self, custom_generate, kwargs, *others)
        return taken if tokenizer is None or not is_ours(custom_generate) else {**taken, "tokenizer": tokenizer}

    return {_EXTRACT: MethodType(extract, model)}


def forget_tokenizer(model: nn.Module) -> None:
    """Remove the attributes of :func:`keeping_tokenizer`."""
    vars(model).pop(_EXTRACT, None)
