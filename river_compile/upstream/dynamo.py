"""All uses of TorchDynamo and Inductor beyond their public API.

*Calls.* Dynamo's code for a call reads the graph's inputs from where they are kept, runs the graph, writes back what
the function changed in Python, and builds what it returns. `code_without_effects` says whether that is all.

*Builds.* Inductor lets the compiler write libraries where other processes look for them, under a lock that ends with
the process that holds it; after a killed process the others fail at every start. `build_whole_files` makes the compiler
write beside the place, and moves the result there.

Not handled: code that Dynamo does not see, such as hooks that it skips, calls that go on in other threads, and command
lines without ``-o``.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import re
import shlex
import sys
import weakref
from collections.abc import Callable, Mapping
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
    """Returns the code of the function that Dynamo is compiling; None if it does more than to run one graph.

    Args:
        seen: classes of objects among the arguments whose attributes it may write: the caller looks after them.
    """
    tx = getattr(symbolic_convert.tls, "current_tx", None)
    if tx is None:
        return None
    effects, reason = tx.output.side_effects, tx.output.compile_subgraph_reason
    if reason is None or reason.graph_break or tx.output.random_calls or effects.tensor_hooks:
        return None
    for variable in filter(effects.is_modified, list(effects.id_to_variable.values())):
        kind = type(variable.mutation_type).__name__
        if kind in ("AttributeMutationNew", "ValueMutationNew") or _is_own_keywords(variable, tx.f_code):
            continue  # (what is new is returned, or written to what is not)
        names = effects.store_attr_mutations.get(variable)
        if kind != "AttributeMutationExisting" or not names:
            return None  # (a list that grows, say)
        owner = getattr(variable, "value", None)
        if not ((_comes_with_arguments(variable.source) and isinstance(owner, seen)) or _is_there(owner, names)):
            return None
    code: CodeType = tx.f_code
    return code


def _is_there(owner: object, written: Mapping[str, Any]) -> bool:
    """Whether an object's attributes are the constants that are written to them already, as a flag that is reset is."""
    for name, value in written.items():
        new = getattr(value, "value", owner)  # (of Dynamo's ConstantVariable)
        if type(new) not in (type(None), bool, int, float, str) or getattr(owner, name, written) != new:
            return False
    return True


def _is_own_keywords(variable: Any, code: CodeType) -> bool:
    """Whether a variable is the function's own ``**kwargs``, a dict that its caller does not see."""
    positional = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 0x04)
    own = code.co_varnames[positional] if code.co_flags & 0x08 else None
    return type(variable.source).__name__ == "LocalSource" and variable.source.local_name == own


def _comes_with_arguments(source: Any) -> bool:
    while hasattr(source, "base"):
        source = source.base
    return type(source).__name__ == "LocalSource"


def break_before(model: nn.Module, own: OwnCall | None) -> GraphCompileReason | None:
    """Returns why Dynamo last broke a graph, if it compiles a piece of a model's code; None otherwise."""
    tx = getattr(symbolic_convert.tls, "current_tx", None)
    piece = tx is not None and tx.f_code not in (*_code_of_calls(model), None if own is None else own.code)
    return graph_break_reasons[-1] if piece and graph_break_reasons else None


def runs_one_graph(model: nn.Module, code: CodeType | None, own: OwnCall | None) -> bool:
    """Returns whether a call of a model, or its own compiled call, is one of the function with this `traced_code`."""
    if code is None or model._forward_hooks or model._forward_pre_hooks:
        return False
    return code in (_code_of_calls(model) if own is None else [own.code])


def _code_of_calls(model: nn.Module) -> list[CodeType | None]:
    """Returns the code of the functions that a call of a model without hooks runs: its own call and its forward."""
    return [getattr(function, "__code__", None) for function in (model._call_impl, model.forward)]


# Objects that come with a call's arguments, which whoever runs a graph without Dynamo looks after.
_LOOKED_AFTER = (Cache, CacheLayerMixin)


class OwnCall:
    """The compiled call of one model, ``(model, **inputs)``.

    Dynamo keeps graphs with the code of the function that it compiled. This one's code and globals are its own, so no
    other model's graphs count towards its limits, and they go with it. Hooks of modules are guarded.

    Args:
        backend, options: as ``torch.compile`` takes them.

    Attributes:
        code: of the function.
    """

    def __init__(self, backend: Callable[..., Any], options: Mapping[str, Any]) -> None:
        self.code = _call.__code__.replace(co_name="call_of_one_model")
        own = FunctionType(self.code, {"__builtins__": builtins})
        self._compiled = torch.compile(own, backend=backend, options=dict(options))

    def __call__(self, model: nn.Module, /, **inputs: Any) -> Any:
        try:
            with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
                return self._compiled(model, inputs)
        except TorchRuntimeError as error:
            raise error_of_code(error) from None


def _call(model: Any, inputs: dict[str, Any]) -> Any:
    return model._call_impl(**inputs)


class _Nobody:
    """Stands for a model in whose count an entry of another one is."""


_NOBODY = _Nobody()
# What Dynamo compares with a frame's locals, none of which this is: the entry then does not count for the frame.
_COUNTS_FOR_NOBODY: dict[str, weakref.ref[Any]] = {"river_compile": weakref.ref(_NOBODY)}


def guard_model(parameter: fx.Node, counts: bool) -> None:
    """Makes Dynamo trace every other model anew: it would run in the graph that is being compiled, with its twins.

    Dynamo runs code without a backend that has ``recompile_limit`` graphs, those of models that are gone included, and
    nearly all models share theirs. Outside of Dynamo there is nothing to guard.

    Args:
        parameter: a placeholder of the graph.
        counts: whether this one is counted among them.
    """
    context = TracingContext.try_get()
    if context is not None:
        source = parameter.meta["grapharg"].source
        guard = (_model_source(source) or source).make_guard(functools.partial(_match, counts=counts))
        context.guards_context.dynamo_guards.add(guard)
        torch._dynamo.config.accumulated_recompile_limit += not counts


def _match(builder: Any, guard: Guard, counts: bool) -> None:
    builder.ID_MATCH(guard)
    if not counts:
        builder.id_matched_objs.update(_COUNTS_FOR_NOBODY)
    owner: Any = guard.obj_weakref() if isinstance(guard.obj_weakref, weakref.ref) else None
    if owner is not None:
        weakref.finalize(owner, _end, builder.check_fn_manager).atexit = False


def _end(guards: Any) -> None:
    """Ends an entry of Dynamo's cache; what is left there counts for nobody."""
    guards.invalidate(obj_str="a model that is gone")
    guards.guard_manager.id_matched_objs = _COUNTS_FOR_NOBODY


def traced_code() -> CodeType | None:
    """Returns the code of the function that Dynamo is compiling; None where a call does more than to run the graph."""
    return code_without_effects(_LOOKED_AFTER)


def _model_source(source: Source) -> Source | None:
    """Returns the source of the outermost module that a parameter was read through."""
    outermost: Source | None = None
    while isinstance(base := getattr(source, "base", None), Source):
        if "NNModuleSource" in type(source).__name__:
            outermost = base
        source = base
    return outermost


def compiled_with(backend: Callable[..., object], compiled: Callable[..., object] | None) -> bool:
    """Returns whether a function was compiled by `torch.compile` for a backend."""
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
    """Returns the function in Dynamo's entry of one `torch.compile`."""
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


def untraceable(model: nn.Module) -> str:
    """Returns why Dynamo cannot trace a model whose layers are compressed-tensors' own, empty for others.

    They are unpacked by the model's first call, and have a forward that changes their weights around the product.
    """
    layer = next((path for path, module in model.named_modules() if hasattr(module, "quantization_scheme")), "")
    return layer and (
        f"{layer} is a layer of compressed-tensors, whose code cannot be traced; load the model with "
        "quantization_config=CompressedTensorsConfig(dequantize=True), of transformers 5.21 or newer "
        "(backbone_weights='8bit' reads weights of 8 bits in 8 bits all the same)"
    )


def error_of_code(error: TorchRuntimeError) -> RuntimeError:
    """Returns the error of a model's code under Dynamo's tracing, without Dynamo's pages around it."""
    own: BaseException = error
    while isinstance(own, TorchDynamoException) and (inner := own.__cause__ or own.__context__) is not None:
        own = inner
    sizes = dict(re.findall(r"\((s\d+): hint = (\d+)\)", str(error)))
    return RuntimeError(re.sub(r"\bs\d+\b", lambda name: sizes.get(name[0], name[0]), str(own)))


def drop_graphs(model: nn.Module) -> None:
    """Has Dynamo forget the graphs of a model's class, which keep what was packed for it."""
    for code in filter(None, _code_of_calls(model)):
        eval_frame.reset_code(code)


def uncompiled_forward(model: nn.Module) -> Callable[..., Any]:
    """Returns the forward pass of a model's class, which Dynamo never compiles, wherever it is called from.

    What was put in the place of the method, such as a compiled one, and hooks on the model itself are not called.
    """
    return functools.partial(torch.compiler.disable(type(model).forward), model)


def build_whole_files() -> None:
    """Makes it so in this process, from now on; calling it again changes nothing."""
    builder: Any = cpp_builder
    if not hasattr(builder.run_compile_cmd, "river_compile"):
        builder.run_compile_cmd = _moving_into_place(builder.run_compile_cmd)


def _moving_into_place(run: Callable[[str, str], Any]) -> Callable[[str, str], Any]:
    @functools.wraps(run)
    def run_beside(cmd_line: str, cwd: str) -> Any:
        command = shlex.split(cmd_line)
        if "-o" not in command[:-1]:
            return run(cmd_line, cwd)
        place = command.index("-o") + 1
        with atomic_write(Path(cwd, command[place])) as scratch:
            command[place] = str(scratch)
            return run(shlex.join(command), cwd)

    marked: Any = run_beside
    marked.river_compile = True
    return run_beside
