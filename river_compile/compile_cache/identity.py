"""A hash of what a model's programs depend on except weights: what Dynamo's guards check at every call.

Not handled: functions that are replaced after this process first hashed a model's classes. Models have no identity with
hooks, in training, or with quantized or sharded tensors but MXFP4 experts.
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

from river_compile import kernels, passes
from river_compile.kernels.native.build import choose_isa
from river_compile.kernels.quant.mxfp4 import mxfp4_parts
from river_compile.passes.nodes import is_ordinary
from river_compile.upstream.versions import installed

# Modules of transformers that models call besides their own.
_CALLED = ("masking_utils", "cache_utils", "modeling_rope_utils", "activations", "integrations.sdpa_attention")
# No forward calls these, or the versions cover them.
_NOT_TRACED = ("torch.", "builtins", "transformers.generation.")
_PLAIN = {bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device}
_NESTED = {tuple, list, dict}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
OF_ALL_MODULES = frozenset(vars(nn.Module()))  # attributes with torch's own entries: parameters, hooks, ...


def identity_of(model: PreTrainedModel, options: object) -> str | None:
    """Return the hash of a model and its options (their repr); None if the model has no identity."""
    parts: list[object] = [
        _versions(),
        _hash_code(frozenset(map(type, model.modules()))),
        options,
        _torch_state(),
        _settings(model.config),
    ]
    for name, module in model.named_modules():
        held = vars(module)
        if module.training or any(map(held.get, _HOOKS)):
            return None
        own = {key: value for key, value in held.items() if key not in OF_ALL_MODULES}
        parts += (name, type(module).__qualname__, plain_attributes(own))
        for tensors in (held["_parameters"], held["_buffers"]):
            for key, tensor in tensors.items():
                if tensor is None:
                    continue
                in_mxfp4 = mxfp4_parts(tensor) is not None
                if not is_ordinary(tensor) and not in_mxfp4:
                    return None
                parts += (key, in_mxfp4, (*tensor.shape,), tensor.stride(), tensor.dtype, tensor.device.type)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def plain_attributes(attributes: Mapping[str, object]) -> list[tuple[str, object]]:
    """Return the attributes that traced code may read as constants, and the bytecode of replaced functions."""
    found: list[tuple[str, object]] = []
    for name, value in attributes.items():
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
    attention = ALL_ATTENTION_FUNCTIONS.get(config._attn_implementation)  # users may register their own
    return [plain_attributes(held), inner, getattr(getattr(attention, "__code__", None), "co_code", None)]


@functools.cache
def _versions() -> tuple[str, ...]:
    libraries = (str(installed(name)) for name in ("torch", "transformers"))
    return (platform.python_version(), *libraries, platform.machine(), choose_isa().name, _hash_own_sources())


@functools.cache
def _hash_own_sources() -> str:
    digest = hashlib.sha256()
    folders = (Path(__file__).parents[1], *(Path(str(package.__file__)).parent for package in (kernels, passes)))
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
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
def _hash_code(kinds: frozenset[type[nn.Module]]) -> str:
    """Return a hash of every function of the modules that define these classes and their bases."""
    names = {base.__module__ for kind in kinds for base in kind.__mro__}
    names = {name for name in names if not name.startswith(_NOT_TRACED)}
    names |= {f"transformers.{name}" for name in _CALLED}
    digest = hashlib.sha256()
    for name in sorted(names):
        for code in _codes_in(_own_values(name), name):
            digest.update(code.co_code + repr((code.co_names, *map(_constant, code.co_consts))).encode())
    return digest.hexdigest()


def _own_values(name: str) -> list[object]:
    """Return the values of a module's names, without the functions that Dynamo adds after graph breaks."""
    module = sys.modules.get(name)
    held = {} if module is None else vars(module)
    return [value for key, value in held.items() if not key.startswith(("__", "torch_dynamo_resume"))]


def _codes_in(values: Iterable[object], home: str) -> Iterator[CodeType]:
    for value in values:
        if isinstance(value, type) and value.__module__ == home:
            yield from _codes_in(vars(value).values(), "")
        function = inner if isinstance(inner := getattr(value, "__wrapped__", value), FunctionType) else None
        function = getattr(function or value, "__func__", function)
        if isinstance(function, FunctionType):
            yield from _with_inner(function.__code__)


def _constant(value: object) -> str:
    """Return a constant's repr, the same in every process."""
    if isinstance(value, frozenset):
        return repr(sorted(map(repr, value)))
    return "code" if isinstance(value, CodeType) else repr(value)


def _with_inner(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _with_inner(constant)
