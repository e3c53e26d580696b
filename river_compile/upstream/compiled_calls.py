"""The call of ``torch.compile``'s wrapper that code runs under: whether there is one, and which module was compiled.

Not handled: calls that go on in other threads.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch._dynamo import eval_frame
from torch._dynamo.exc import TorchDynamoException, TorchRuntimeError


def compiled_with(backend: Callable[..., object], compiled: Callable[..., object] | None) -> bool:
    """Returns whether a function is what `torch.compile` returned for a backend."""
    held = {} if compiled is None else inspect.getclosurevars(compiled).nonlocals
    return hasattr(held.get("self"), "callback") and _backend_of(held["self"]) is backend


def call_through(backend: Callable[..., object] | None) -> FrameType | None:
    """Returns the frame of the innermost wrapper in this thread that compiles with a backend, None without one."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        compiled = code.co_name == "compile_wrapper" and code.co_filename == eval_frame.__file__
        if compiled and _backend_of(frame.f_locals["self"]) is backend:
            return frame
        frame = frame.f_back
    return None


def _backend_of(context: Any) -> object:
    """Returns the function in what Dynamo keeps of one `torch.compile`."""
    compiler: Any = eval_frame.innermost_backend(context.callback)
    compiler = getattr(compiler, "compiler_fn", compiler)
    return getattr(compiler, "func", compiler)


def compiled_module(backend: Callable[..., object] | None) -> nn.Module | None:
    """Returns the module whose compiled call goes on in this thread, also while Dynamo traces a piece of its code.

    It is the one whose method was compiled, or the first argument of a function that was; None where there is neither.
    """
    frame = call_through(backend)
    if frame is None:
        return None
    compiled, arguments = inspect.unwrap(frame.f_locals["fn"]), frame.f_locals["args"]
    module = getattr(frame.f_locals["fn"], "__self__", getattr(compiled, "__self__", next(iter(arguments), None)))
    return module if isinstance(module, nn.Module) else None


def error_of_code(error: TorchRuntimeError) -> RuntimeError:
    """Returns what a model's code raised when Dynamo traced it, without the pages that Dynamo puts around it."""
    own: BaseException = error
    while isinstance(own, TorchDynamoException) and (inner := own.__cause__ or own.__context__) is not None:
        own = inner
    sizes = dict(re.findall(r"\((s\d+): hint = (\d+)\)", str(error)))
    return RuntimeError(re.sub(r"\bs\d+\b", lambda name: sizes.get(name[0], name[0]), str(own)))


def as_it_is(model: nn.Module) -> Callable[..., Any]:
    """Returns the forward pass of a model's class, which Dynamo never compiles, wherever it is called from.

    What was put in the place of the method, such as a compiled one, and hooks on the model itself are not called.
    """
    return functools.partial(torch.compiler.disable(type(model).forward), model)
