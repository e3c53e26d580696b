"""All uses of TorchDynamo and Inductor beyond their public API.

*Calls.* Dynamo's code for a call reads the graph's inputs from where they are kept, runs the graph, writes back what
the function changed in Python, and builds what it returns. `code_without_effects` says whether that is all.

*Cache entries.* Dynamo counts the entries of one code object towards ``recompile_limit`` and runs the code without a
backend from then on. transformers puts the same few decorators around every forward, so all models of a process share
one such count, with those that are gone and with options nobody uses any more. A :class:`GraphEntry` counts for its
own model alone: graphs of other options give way at the limit, and those of a model that is gone count for nobody. An
entry also ends when a forward hook is added to or taken from the model. (Dynamo does not look at hooks.)

*Builds.* Inductor lets the compiler write libraries where other processes look for them, under a lock that ends with
the process that holds it; after a killed process the others fail at every start. `build_whole_files` makes the compiler
write beside the place, and moves the result there.

Not handled: calls that do not reach Dynamo's cache (:mod:`river_compile.runtime.fallbacks` counts them), code that
Dynamo does not see, such as hooks that it skips, calls that go on in other threads, and command lines without ``-o``.
"""

from __future__ import annotations

import functools
import inspect
import re
import shlex
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import fx, nn
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, set_code_exec_strategy
from torch._dynamo import convert_frame, eval_frame, symbolic_convert
from torch._dynamo.exc import TorchDynamoException, TorchRuntimeError
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.output_graph import GraphCompileReason
from torch._dynamo.types import FrameAction, FrameExecStrategy
from torch._dynamo.utils import graph_break_reasons
from torch._guards import Guard, Source, TracingContext
from torch._inductor import cpp_builder
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache, CacheLayerMixin

from river_compile.kernels.files import appearing


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


def break_before(model: nn.Module) -> GraphCompileReason | None:
    """Returns why Dynamo last broke a graph, if it compiles a piece of a model's code; None otherwise."""
    tx = getattr(symbolic_convert.tls, "current_tx", None)
    piece = tx is not None and tx.f_code not in _code_of_calls(model)
    return graph_break_reasons[-1] if piece and graph_break_reasons else None


def runs_one_graph(model: nn.Module, code: CodeType | None) -> bool:
    """Returns whether a call of a model is a call of the function with this code (of `code_without_effects`)."""
    if code is None or model._forward_hooks or model._forward_pre_hooks:
        return False
    return code in _code_of_calls(model)


def _code_of_calls(model: nn.Module) -> list[CodeType | None]:
    """Returns the code of the functions that a call of a model without hooks runs: its own call and its forward."""
    return [getattr(function, "__code__", None) for function in (model._call_impl, model.forward)]


# Objects that come with a call's arguments, which whoever runs a graph without Dynamo looks after.
_LOOKED_AFTER = (Cache, CacheLayerMixin)
CHANGES_NOTHING = "changes_nothing"  # an attribute of hooks that graphs need not be traced anew for


class _Nobody:
    """Stands for a model in whose count an entry of another one is."""


_NOBODY = _Nobody()
# What Dynamo compares with a frame's locals, none of which this is: the entry then does not count for the frame.
_COUNTS_FOR_NOBODY: dict[str, weakref.ref[Any]] = {"river_compile": weakref.ref(_NOBODY)}


class GraphEntry:
    """The entry of one graph.

    Attributes:
        counts: whether Dynamo counts it among those of all models.
        code: of the traced function; None where a call of it may do more than to run the graph.
    """

    def __init__(self) -> None:
        self.counts = False
        self.code: CodeType | None = None
        self._hooks: _Hooks | None = None
        self._calls_model = False  # in the graph, with the hooks of the model itself
        self._guards: Any = None  # Dynamo's CheckFunctionManager

    @property
    def cached(self) -> bool:
        """Whether Dynamo still holds it."""
        return self._guards is not None and self._guards.guard_manager.cache_entry is not None

    def holds(self, model: nn.Module) -> bool:
        """Returns whether Dynamo still holds it and the model's hooks are those of the graph."""
        return self.cached and self._hooks is not None and self._hooks.unchanged(model)

    def belongs_to_model_of(self, parameter: fx.Node, then: Callable[[nn.Module], object]) -> None:
        """Makes Dynamo trace every other model anew: it would run in this graph, with this one's twins.

        Outside of Dynamo there is nothing to guard.

        Args:
            parameter: a placeholder of the graph that is being compiled.
            then: called with the model once the graph is compiled.
        """
        context = TracingContext.try_get()
        if context is None:
            return
        guards, source = context.guards_context.dynamo_guards, parameter.meta["grapharg"].source
        model = _model_source(source)
        self.code = code_without_effects(_LOOKED_AFTER)
        if model is None:
            guards.add(source.make_guard(GuardBuilder.ID_MATCH))
            return
        guard = model.make_guard(functools.partial(self._guard_model, then=then))
        self._calls_model = any(other.name.startswith(f"{guard.name}._forward") for other in guards)
        guards.add(guard)
        # Dynamo's cap over all models of a process is not what bounds entries that count for their own model.
        torch._dynamo.config.accumulated_recompile_limit += not self.counts

    def drop(self) -> None:
        """Takes it out of Dynamo's cache. What is left there is empty and counts for nobody."""
        if self._guards is not None:
            self._guards.invalidate(obj_str="a graph that gave way")
            self._guards.guard_manager.id_matched_objs = _COUNTS_FOR_NOBODY

    def _guard_model(self, builder: Any, guard: Guard, then: Callable[[nn.Module], object]) -> None:
        builder.ID_MATCH(guard)
        if not self.counts:
            builder.id_matched_objs.update(_COUNTS_FOR_NOBODY)
        self._guards = builder.check_fn_manager
        model: Any = guard.obj_weakref() if isinstance(guard.obj_weakref, weakref.ref) else None
        assert isinstance(model, nn.Module), "the source of a module gives a module"
        weakref.finalize(model, self.drop).atexit = False
        self._hooks = hooks = _Hooks(model, with_own=self._calls_model)
        builder.get_guard_manager(guard).add_lambda_guard(hooks.unchanged, ["forward hooks of its modules"], None)
        then(model)


def trace_anew() -> None:
    """Makes Dynamo trace code again that it gave up, for all models, where one of them broke a graph or had too many.

    What it keeps of code and no model owns counts for nobody from then on.
    """
    again = FrameExecStrategy(FrameAction.DEFAULT, FrameAction.DEFAULT)
    for code in filter(None, (held() for held in [*convert_frame.input_codes.seen])):
        set_code_exec_strategy(code, again)
        for entry in _debug_get_cache_entry_list(code):
            if not entry.guard_manager.id_matched_objs:
                entry.guard_manager.id_matched_objs = _COUNTS_FOR_NOBODY
                torch._dynamo.config.accumulated_recompile_limit += 1


def _model_source(source: Source) -> Source | None:
    """Returns the source of the outermost module that a parameter was read through."""
    outermost: Source | None = None
    while isinstance(base := getattr(source, "base", None), Source):
        if "NNModuleSource" in type(source).__name__:
            outermost = base
        source = base
    return outermost


class _Hooks:
    """The forward hooks of a model's modules when its graph was traced.

    Args:
        model: the model.
        with_own: whether those of the model itself are in the graph too.
    """

    def __init__(self, model: nn.Module, with_own: bool) -> None:
        self._with_own = with_own
        self._found = [(weakref.ref(hooks), number) for hooks, number in self._find(model)]
        self._registered = RemovableHandle.next_id

    def unchanged(self, model: nn.Module) -> bool:
        """Returns whether the model has the same hooks; a fraction of a microsecond until some hook is registered."""
        if not all(number in (hooks() or ()) for hooks, number in self._found):
            return False
        registered = RemovableHandle.next_id
        if registered != self._registered:
            if len(list(self._find(model))) != len(self._found):
                return False
            self._registered = registered
        return True

    def _find(self, model: nn.Module) -> Iterator[tuple[dict[int, Any], int]]:
        for module in model.modules():
            if module is not model or self._with_own:
                for hooks in (module._forward_pre_hooks, module._forward_hooks):
                    for number, hook in hooks.items():
                        if not getattr(hook, CHANGES_NOTHING, False):
                            yield hooks, number


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
        with appearing(Path(cwd, command[place])) as scratch:
            command[place] = str(scratch)
            return run(shlex.join(command), cwd)

    marked: Any = run_beside
    marked.river_compile = True
    return run_beside
