"""All uses of TorchDynamo and Inductor beyond their public API.

Not handled: code that Dynamo does not see (hooks that it skips, calls that continue in other threads), and commands of
Inductor's C++ builder without ``-o``.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import inspect
import itertools
import re
import shlex
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo import eval_frame, symbolic_convert
from torch._dynamo.exc import TorchDynamoException, TorchRuntimeError
from torch._dynamo.output_graph import GraphCompileReason
from torch._dynamo.utils import graph_break_reasons
from torch._guards import Guard, Source, TracingContext
from torch._inductor import cpp_builder
from transformers.cache_utils import Cache, CacheLayerMixin

from river_compile.kernels.files import atomic_write


def code_without_effects(seen: tuple[type, ...]) -> CodeType | None:
    """Return the code of the function that Dynamo is compiling; None if a call does more than run one graph."""
    # Writes to attributes of arguments of the classes in `seen` are the caller's responsibility.
    tx = getattr(symbolic_convert.tls, "current_tx", None)
    if tx is None:
        return None
    effects, reason = tx.output.side_effects, tx.output.compile_subgraph_reason
    if reason is None or reason.graph_break or tx.output.random_calls or effects.tensor_hooks:
        return None
    for variable in filter(effects.is_modified, list(effects.id_to_variable.values())):
        kind = type(variable.mutation_type).__name__
        if kind in ("AttributeMutationNew", "ValueMutationNew") or _is_own_keywords(variable, tx.f_code):
            continue  # a new object is returned, or written to an old one
        names = effects.store_attr_mutations.get(variable)
        if kind != "AttributeMutationExisting" or not names:
            return None  # a list that grows, for example
        owner = getattr(variable, "value", None)
        if not ((_is_argument(variable.source) and isinstance(owner, seen)) or _has_values(owner, names)):
            return None
    code: CodeType = tx.f_code
    return code


def _has_values(owner: object, written: Mapping[str, Any]) -> bool:
    """True if attributes already equal the constants that are written, such as a flag that is reset."""
    for name, value in written.items():
        new = getattr(value, "value", owner)  # of Dynamo's ConstantVariable
        if type(new) not in (type(None), bool, int, float, str) or getattr(owner, name, written) != new:
            return False
    return True


def _is_own_keywords(variable: Any, code: CodeType) -> bool:
    """True for the function's own ``**kwargs``, a dict that its caller does not see."""
    positional = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 0x04)
    own = code.co_varnames[positional] if code.co_flags & 0x08 else None
    return type(variable.source).__name__ == "LocalSource" and variable.source.local_name == own


def _is_argument(source: Any) -> bool:
    while hasattr(source, "base"):
        source = source.base
    return type(source).__name__ == "LocalSource"


def last_graph_break(model: nn.Module, own: OwnCall | None) -> GraphCompileReason | None:
    """Return why Dynamo last broke a graph, None unless it compiles a piece of a model's code."""
    tx = getattr(symbolic_convert.tls, "current_tx", None)
    piece = tx is not None and tx.f_code not in (*_code_of_calls(model), None if own is None else own.code)
    return graph_break_reasons[-1] if piece and graph_break_reasons else None


def traces_whole_call(model: nn.Module | None, own: OwnCall | None) -> bool:
    """Whether a call of a model, or its own compiled call, does nothing but run the graph that Dynamo compiles."""
    code = traced_code()
    return code is not None and code in ([own.code] if own is not None else _code_of_calls(model) if model else [])


def _code_of_calls(model: nn.Module) -> list[CodeType | None]:
    """Return the code of a model's call and its forward."""
    return [getattr(function, "__code__", None) for function in (model._call_impl, model.forward)]


_numbers = itertools.count()


class OwnCall:
    """The compiled call of one model, ``(model, **inputs)``, with hooks of modules guarded."""

    def __init__(self, backend: Callable[..., Any], options: Mapping[str, Any]) -> None:
        # With its own code and globals, its graphs count towards no other model's recompile limit and die with it. By
        # its name Dynamo remembers which numbers differed: a norm's epsilon of another model would become an input.
        self.code = _call.__code__.replace(co_name=f"call_of_model_{next(_numbers)}")
        self._backend, self._options = backend, dict(options)

    @functools.cached_property
    def _compiled(self) -> Callable[..., Any]:
        """The function for Dynamo, made at the first call: `torch.compile` imports half of AOTAutograd."""
        own = FunctionType(self.code, {"__builtins__": builtins})
        return torch.compile(own, backend=self._backend, options=self._options)

    def __call__(self, model: nn.Module, /, **inputs: Any) -> Any:
        try:
            with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
                return self._compiled(model, inputs)
        except TorchRuntimeError as error:
            raise _original_error(error) from None


def _call(model: Any, inputs: dict[str, Any]) -> Any:
    return model._call_impl(**inputs)


class _Traced(BaseException):
    """Ends a call when its graph was traced. Not an Exception, which the model's code might catch."""


def trace(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[fx.GraphModule, Sequence[Any]] | None:
    """Trace a call of a model without running it; return the graph and its inputs.

    None if the call does more than run one graph. Raises as the model's code does.
    """
    found: list[tuple[fx.GraphModule, Sequence[Any]]] = []

    def collect(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        if traced_code() is not None:
            found.append((graph_module, example_inputs))
        return stop

    def stop(*_: Any) -> Any:
        raise _Traced

    with contextlib.suppress(_Traced):
        OwnCall(collect, {})(model, **inputs)
    return found[0] if found else None


def current_stance() -> str:
    """Return the stance of ``torch.compiler.set_stance``."""
    stance: str = eval_frame._stance.stance
    return stance


class _NoModel:
    pass


_NO_MODEL = _NoModel()
# Dynamo compares these with a frame's locals and finds none of them, so the entry does not count for the frame.
_UNCOUNTED: dict[str, weakref.ref[Any]] = {"river_compile": weakref.ref(_NO_MODEL)}


def guard_model(parameter: fx.Node, counts: bool) -> None:
    """Guard the model that a placeholder belongs to; `counts`: the graph counts towards ``recompile_limit``."""
    # Most models share the code that Dynamo counts graphs of, those of freed models included. Beyond the limit it runs
    # the code without a backend.
    context = TracingContext.try_get()
    if context is not None:
        source = parameter.meta["grapharg"].source
        guard = (_model_source(source) or source).make_guard(functools.partial(_match, counts=counts))
        context.guards_context.dynamo_guards.add(guard)
        torch._dynamo.config.accumulated_recompile_limit += not counts


def _match(builder: Any, guard: Guard, counts: bool) -> None:
    builder.ID_MATCH(guard)
    if not counts:
        builder.id_matched_objs.update(_UNCOUNTED)
    owner: Any = guard.obj_weakref() if isinstance(guard.obj_weakref, weakref.ref) else None
    if owner is not None:
        weakref.finalize(owner, _invalidate, builder.check_fn_manager).atexit = False


def _invalidate(guards: Any) -> None:
    """Invalidate an entry of Dynamo's cache; it no longer counts towards the limit."""
    guards.invalidate(obj_str="a freed model")
    guards.guard_manager.id_matched_objs = _UNCOUNTED


def traced_code() -> CodeType | None:
    """Return the code that Dynamo is compiling; None if a call does more than run one graph on a cache."""
    return code_without_effects((Cache, CacheLayerMixin))


def _model_source(source: Source) -> Source | None:
    """Return the source of the outermost module on the path to a parameter."""
    outermost: Source | None = None
    while isinstance(base := getattr(source, "base", None), Source):
        if "NNModuleSource" in type(source).__name__:
            outermost = base
        source = base
    return outermost


def compiled_with(backend: Callable[..., object], compiled: Callable[..., object] | None) -> bool:
    """True if `torch.compile` compiled a function for a backend."""
    held = {} if compiled is None else inspect.getclosurevars(compiled).nonlocals
    return hasattr(held.get("self"), "callback") and _backend_of(held["self"]) is backend


def _compiled_frame(backend: Callable[..., object] | None) -> FrameType | None:
    """Return the innermost frame of this thread that compiles with a backend."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        compiled = code.co_name == "compile_wrapper" and code.co_filename == eval_frame.__file__
        if compiled and _backend_of(frame.f_locals["self"]) is backend:
            return frame
        frame = frame.f_back
    return None


def _backend_of(context: Any) -> object:
    """Return the function that one `torch.compile` was given."""
    compiler: Any = eval_frame.innermost_backend(context.callback)
    compiler = getattr(compiler, "compiler_fn", compiler)
    return getattr(compiler, "func", compiler)


def compiled_module(backend: Callable[..., object] | None) -> nn.Module | None:
    """Return the module whose compiled call runs in this thread or is being traced; None without one."""
    # That is the owner of a compiled method, or the first argument of a compiled function.
    frame = _compiled_frame(backend)
    if frame is None:
        return None
    compiled, arguments = inspect.unwrap(frame.f_locals["fn"]), frame.f_locals["args"]
    module = getattr(frame.f_locals["fn"], "__self__", getattr(compiled, "__self__", next(iter(arguments), None)))
    return module if isinstance(module, nn.Module) else None


def untraceable(model: nn.Module) -> str:
    """Return why Dynamo cannot trace a model: it has layers of compressed-tensors. Empty for other models."""
    # The model's first call unpacks these layers, and their forward changes the weights around the matmul.
    layer = next((path for path, module in model.named_modules() if hasattr(module, "quantization_scheme")), "")
    return layer and (
        f"{layer} is a layer of compressed-tensors, whose code cannot be traced. Load the model with "
        "quantization_config=CompressedTensorsConfig(dequantize=True), of transformers 5.21 or newer; "
        "target_weights='8bit' still reads 8-bit weights"
    )


def _original_error(error: TorchRuntimeError) -> RuntimeError:
    """Return the error of the model's code, without Dynamo's explanations, with the values of dynamic sizes."""
    own: BaseException = error
    while isinstance(own, TorchDynamoException) and (inner := own.__cause__ or own.__context__) is not None:
        own = inner
    sizes = dict(re.findall(r"\((s\d+): hint = (\d+)\)", str(error)))
    return RuntimeError(re.sub(r"\bs\d+\b", lambda name: sizes.get(name[0], name[0]), str(own)))


def drop_graphs(model: nn.Module) -> None:
    """Drop Dynamo's graphs of a model's class, which hold packed weights."""
    for code in filter(None, _code_of_calls(model)):
        eval_frame.reset_code(code)


def uncompiled_forward(model: nn.Module) -> Callable[..., Any]:
    """Return the forward of a model's class, never compiled, without the model's hooks and replaced methods."""
    return functools.partial(torch.compiler.disable(type(model).forward), model)


def build_libraries_atomically() -> None:
    """Patch Inductor's builder to write a library next to its place and to move it there; idempotent."""
    # Inductor's lock ends with its process, so after a kill other processes would find half a library at every start.
    builder: Any = cpp_builder
    if not hasattr(builder.run_compile_cmd, "river_compile"):
        builder.run_compile_cmd = _moving_into_place(builder.run_compile_cmd)


def _moving_into_place(run: Callable[[str, str], Any]) -> Callable[[str, str], Any]:
    @functools.wraps(run)
    def run_and_move(cmd_line: str, cwd: str) -> Any:
        command = shlex.split(cmd_line)
        if "-o" not in command[:-1]:
            return run(cmd_line, cwd)
        place = command.index("-o") + 1
        with atomic_write(Path(cwd, command[place])) as scratch:
            command[place] = str(scratch)
            return run(shlex.join(command), cwd)

    marked: Any = run_and_move
    marked.river_compile = True
    return run_and_move
