"""The entries of Dynamo's cache that lead to the backend's graphs: whose they are, and when they go.

Dynamo counts the entries of one code object towards ``recompile_limit`` and runs the code without a backend from then
on. transformers puts the same few decorators around every forward, so all models of a process share one such count,
with those that are gone and with options that nobody uses any more. Entries made here count for their own model alone:
graphs of other options give way where the limit is reached, and those of a model that is gone count for nobody.
A model that needs more graphs than the limit with one set of options is Dynamo's affair again.

An entry also ends where a forward hook was added to or taken from the model. (Dynamo does not look at hooks.)

Not handled: calls that do not reach Dynamo's cache (:mod:`river_compile.plain_runs` notices them).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import torch
from torch import fx, nn
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, set_code_exec_strategy
from torch._dynamo import convert_frame
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.types import FrameAction, FrameExecStrategy
from torch._guards import Guard, Source, TracingContext
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache, CacheLayerMixin

from .dynamo_calls import code_without_effects

# Objects that come with a call's arguments, which whoever runs a graph without Dynamo looks after.
_LOOKED_AFTER = (Cache, CacheLayerMixin)
CHANGES_NOTHING = "changes_nothing"  # an attribute of hooks that graphs need not be traced anew for


class _Nobody:
    """Stands for a model in whose count an entry of another one is."""


_NOBODY = _Nobody()
# What Dynamo compares with a frame's locals, none of which this is: the entry then does not count for the frame.
_COUNTS_FOR_NOBODY: dict[str, weakref.ref[Any]] = {"river_compile": weakref.ref(_NOBODY)}


class CacheEntry:
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
    """Returns where the outermost module comes from that a parameter was read through."""
    outermost: Source | None = None
    while isinstance(base := getattr(source, "base", None), Source):
        if "NNModuleSource" in type(source).__name__:
            outermost = base
        source = base
    return outermost


class _Hooks:
    """The forward hooks of a model's modules when its graph was traced, which holds what they did.

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
