"""Steps that take a shortcut around Dynamo, where only what they are given has changed since the step before.

Between `generate` and a model's graph stands Dynamo: it checks thousands of guards and collects the graph's inputs from
hundreds of modules, about a millisecond a token. While a sequence goes on, the same graph runs with the same parameters
and the same cache, and with other ids, positions and masks. So a step is noted as it comes through Dynamo, and the next
one that looks like it calls the executor itself: decode steps, and passes of several tokens such as exact mode's.

Checked in every step:

- shapes, strides, dtypes and devices of what is given, and the values of flags;
- that the cache and its layers are the same objects, no attribute of which was set;
- that no attribute of a module of the model or of its configuration was set, training mode and the settings of adapters
  among them, and that no parameter, buffer, submodule or entry of a plain dict was exchanged;
- dtypes of parameters and buffers, whether they are on a CPU, and forward hooks;
- grad mode, autocast and what else of the state of process and thread Dynamo guards.

What does not pass goes through Dynamo with all its guards, and so do a prompt and the step after it. Not checked within
a sequence: globals, closures, classes and functions that the model's code uses, the insides of lists and of other
objects that its modules hold, and changes that another thread makes while a step runs.

Not handled: calls that ``model.compile`` did not set up, and what `noted_step.py` cannot note.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from river_compile.upstream.growing import marks_growing, unmarked

from .cache_looks import count_of
from .executor import RiverExecutor, on_call
from .noted_step import Given, NotedStep, Ran, Surroundings
from .plain_calls import CompiledOrPlain

_PATIENCE = 8  # steps of one sequence that may be noted in vain
_LOOKS = 64  # of which the executor is known when another sequence begins


def install(model: nn.Module, missed: Callable[[], None]) -> None:
    """Puts a shortcut around what ``model.compile`` made of a model's calls, where that is not done yet.

    `missed` is called after a call that reached no executor.
    """
    call: Any = model._compiled_call_impl
    chooses = isinstance(call, CompiledOrPlain)
    compiled = call.compiled if chooses else call
    if compiled is None or hasattr(compiled, "river_shortcut"):
        return
    around = Shortcut(model, marks_growing(compiled, prompts=False), missed).around()
    if chooses:
        call.compiled = around
    else:
        model._compiled_call_impl = around


def without_shortcut(call: Any) -> Callable[..., Any] | None:
    """Returns what ``torch.compile`` returned, of a model's compiled call with whatever stands around it."""
    compiled: Any = call.compiled if isinstance(call, CompiledOrPlain) else call
    return unmarked(compiled.__wrapped__ if hasattr(compiled, "river_shortcut") else compiled)


class _Thread:
    """What one thread's calls of a sequence left, by looks: the latest one, and the steps that may run again."""

    def __init__(self) -> None:
        self.ran: dict[tuple, Ran] = {}
        self.steps: dict[tuple, NotedStep] = {}
        self.patience = _PATIENCE

    def forget(self) -> None:
        """Begins another sequence. (The same executor will run what looks the same.)"""
        self.steps.clear()
        self.patience = _PATIENCE
        if len(self.ran) > _LOOKS:
            self.ran.clear()


class Shortcut:
    """The calls of one model.

    Args:
        model: the model, held weakly.
        compiled: what runs a call through Dynamo.
        missed: called after a call that reached no executor.

    Attributes:
        taken: steps that took it, in all threads.
    """

    def __init__(self, model: nn.Module, compiled: Callable[..., Any], missed: Callable[[], None]) -> None:
        self.taken = 0
        self._missed = missed
        self._model = weakref.ref(model)
        self._compiled = compiled
        self._threads: dict[int, _Thread] = {}  # (a threading.local would keep the model alive)

    def around(self) -> Callable[..., Any]:
        """Returns the function that takes the place of `compiled`, which Dynamo sees in it."""

        @functools.wraps(self._compiled)
        def call(*args: Any, **kwargs: Any) -> Any:
            return self(*args, **kwargs)

        call.river_shortcut = self  # type: ignore[attr-defined]
        return call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._model()
        given = Given(kwargs)
        if args or model is None or given.looks is None:
            return self._compiled_call(args, kwargs)[0]
        thread = self._threads.setdefault(threading.get_ident(), _Thread())
        step = thread.steps.get(given.looks)
        if step is not None:
            result = step.run(model, given)
            if result is not None:
                self.taken += 1
                return result
            thread.steps.clear()
        return self._through_dynamo(model, thread, given, kwargs)

    def _through_dynamo(self, model: nn.Module, thread: _Thread, given: Given, kwargs: dict) -> Any:
        """Runs a call through Dynamo, and notes it where the same executor ran a call with these looks before."""
        looks = given.looks
        assert looks is not None, "called where all arguments have known looks"
        latest = thread.ran.get(looks)
        expected = None if latest is None else latest.executor()
        before = None
        if expected is not None and thread.patience > 0:
            before = Surroundings.of(model, given, expected)
        count = count_of(given.cache) if hasattr(given.cache, "layers") else None
        result, calls = self._compiled_call((), kwargs)
        if len(calls) != 1:
            return result
        executor, args, outputs = calls[0]
        if not (executor.decodes or executor.sequences.goes_on):
            thread.forget()
            return result
        numbers = {number: arg for number, arg in enumerate(args) if type(arg) is int}
        thread.ran[looks] = ran = Ran(weakref.ref(executor), numbers, count)
        if before is not None and latest is not None and executor is expected:
            step = NotedStep.of(before, model, given, (latest, ran), (args, outputs), result)
            if step is None:
                thread.patience -= 1
            else:
                thread.steps[looks] = step
        return result

    def _compiled_call(self, args: tuple, kwargs: dict) -> tuple[Any, list[tuple[RiverExecutor, tuple, tuple]]]:
        """Runs a call through Dynamo; returns what executors were called with and returned in it too."""
        calls: list[tuple[RiverExecutor, tuple, tuple]] = []
        here = threading.get_ident()

        def note(*call: Any) -> None:
            if threading.get_ident() == here:
                calls.append(call)

        with on_call(note):
            result = self._compiled(*args, **kwargs)
        if not calls:
            self._missed()
        return result, calls
