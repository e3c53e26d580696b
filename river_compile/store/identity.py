"""What decides whether a program that an earlier process traced is this model's.

Dynamo checks thousands of guards, each of which reads an attribute, a global or a tensor that the traced code read.
Here all of that is hashed: versions, the code of the model's classes and of the modules of transformers that they call,
the configuration, every module's own attributes, the names, sizes, dtypes and devices of all parameters, and what of
PyTorch's state changes what is traced. Weights are not among it (twins are compared with them by themselves).

Not handled: functions that are replaced after a class of models was first looked at in this process. A model has no
identity where modules have hooks or are in training, or where tensors are made of others.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import CodeType, FunctionType

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import river_compile
from river_compile import kernels, passes
from river_compile.kernels.native.build import choose_isa
from river_compile.passes.nodes import is_ordinary
from river_compile.upstream.versions import installed

# What models call beside their own module.
_CALLED = ("masking_utils", "cache_utils", "modeling_rope_utils", "activations", "integrations.sdpa_attention")
# What no forward calls, or what the versions tell.
_NOT_TRACED = ("torch.", "builtins", "transformers.generation.")
_PLAIN = {bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device}
_NESTED = {tuple, list, dict}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def identity_of(model: PreTrainedModel, options: object) -> str | None:
    """Returns a hash of what a model's programs depend on, None for a model that has none.

    Args:
        model: the model.
        options: what it is compiled with; its repr counts.
    """
    parts: list[object] = [
        _versions(),
        _codes_of(frozenset(map(type, model.modules()))),
        options,
        _torch_state(),
        _settings(model.config),
    ]
    for name, module in model.named_modules():
        held = vars(module)
        if module.training or any(map(held.get, _HOOKS)):
            return None
        parts += (name, type(module).__qualname__, _plain(held))
        for tensors in (held["_parameters"], held["_buffers"]):
            for key, tensor in tensors.items():
                if tensor is None:
                    continue
                if not is_ordinary(tensor):
                    return None
                parts += (key, (*tensor.shape,), tensor.stride(), tensor.dtype, tensor.device.type)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _plain(held: Mapping[str, object]) -> list[tuple[str, object]]:
    """Returns attributes that traced code may read as they are; of a function that was put there, its code."""
    found: list[tuple[str, object]] = []
    for name, value in held.items():
        kind = type(value)
        if kind in _PLAIN or (kind in _NESTED and _is_plain(value)):
            found.append((name, value))
        elif isinstance(value, FunctionType):
            found.append((name, value.__code__.co_code))
    return found


def _is_plain(value: object) -> bool:
    left = [value]
    while left:
        value = left.pop()
        if type(value) is dict:
            left += value.values()
        elif isinstance(value, (tuple, list)):
            left += value
        elif type(value) not in _PLAIN:
            return False
    return True


def _settings(config: PreTrainedConfig) -> list[object]:
    held = vars(config)
    inner = [_settings(value) for value in held.values() if isinstance(value, PreTrainedConfig)]
    attention = ALL_ATTENTION_FUNCTIONS.get(config._attn_implementation)  # (which anybody may register)
    return [_plain(held), inner, getattr(getattr(attention, "__code__", None), "co_code", None)]


@functools.cache
def _versions() -> tuple[str, ...]:
    libraries = (str(installed(name)) for name in ("torch", "transformers"))
    return (platform.python_version(), *libraries, platform.machine(), choose_isa().name, _own_sources())


@functools.cache
def _own_sources() -> str:
    """Returns a hash of this package's sources."""
    digest = hashlib.sha256()
    for package in (river_compile, kernels, passes):
        for file in sorted(Path(str(package.__file__)).parent.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _torch_state() -> tuple[object, ...]:
    return (
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"),
        torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
    )


@functools.cache
def _codes_of(kinds: frozenset[type[nn.Module]]) -> str:
    """Returns a hash of every function of the modules that classes are from, and their bases, as they are now."""
    names = {base.__module__ for kind in kinds for base in kind.__mro__}
    names = {name for name in names if not name.startswith(_NOT_TRACED)}
    names |= {f"transformers.{name}" for name in _CALLED}
    digest = hashlib.sha256()
    for name in sorted(names):
        for code in _codes_in(vars(sys.modules[name]).values(), name) if name in sys.modules else ():
            digest.update(code.co_code + repr((code.co_names, *map(_constant, code.co_consts))).encode())
    return digest.hexdigest()


def _codes_in(values: Iterable[object], home: str) -> Iterator[CodeType]:
    for value in values:
        if isinstance(value, type) and value.__module__ == home:
            yield from _codes_in(vars(value).values(), "")
        function = inner if isinstance(inner := getattr(value, "__wrapped__", value), FunctionType) else None
        function = getattr(function or value, "__func__", function)
        if isinstance(function, FunctionType):
            yield from _with_inner(function.__code__)


def _constant(value: object) -> str:
    """Returns a constant in the same words in every process."""
    if isinstance(value, frozenset):
        return repr(sorted(map(repr, value)))
    return "code" if isinstance(value, CodeType) else repr(value)


def _with_inner(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _with_inner(constant)
