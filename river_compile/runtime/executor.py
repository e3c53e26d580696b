"""Runs a compiled program: bound to a KV cache for passes that come again, or once.

:meth:`RiverExecutor.bind` makes a :class:`StepState`, which the sessions of generate run. Called as Dynamo calls it, an
executor finds its state by the cache's first tensor of keys, copies inputs in and outputs out.

Not handled: how units run (:mod:`river_compile.runtime.state`), and when a token leaves (:mod:`river_compile.exits`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from types import CodeType
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from river_compile.errors import CacheFullError
from river_compile.exits import ExitPolicy, Memory
from river_compile.passes.program import Program
from river_compile.runtime.captures import Capturing, buffer_like
from river_compile.runtime.state import CompiledProgram, StepState
from river_compile.runtime.stats import Observers
from river_compile.upstream.tensors import version_of

_CACHES = 4  # whose states are kept: those hold the cache, and nothing tells whether it will be used again
_STATES = 8  # of one cache: sizes of inputs that are remembered

_last_token: ContextVar[bool] = ContextVar("_last_token", default=False)
_calls: Observers[[RiverExecutor, Sequence[Any], tuple]] = Observers()


class RiverExecutor:
    """Callable that stands in for a traced graph.

    Args:
        compiled: the program.
        captures: what captures passes, None: nothing does; may be replaced between two steps.
        code: of the function that Dynamo traced; None where a call of it may do more than to run the graph.
        again: builds the program anew for inputs whose parameters have changed.
    """

    def __init__(
        self,
        compiled: CompiledProgram,
        captures: Capturing | None,
        code: CodeType | None = None,
        again: Callable[[Program, Sequence[Any]], tuple[CompiledProgram, Capturing | None]] | None = None,
    ) -> None:
        self.compiled, self.captures, self.code, self._again = compiled, captures, code, again
        self.decodes = compiled.program.is_decode
        self.model_state: object | None = None  # that the latest look at the parameters found
        self._looking = threading.Lock()
        # By the cache's first tensor of keys: a state for each set of sizes that came twice, None where it came once.
        self._states: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._lock = threading.Lock()
        self._varying = [i for i, given in enumerate(compiled.program.inputs) if not given.is_fixed]

    @property
    def policy(self) -> ExitPolicy:
        """When tokens leave; may be replaced between two steps."""
        return self.compiled.policy

    @policy.setter
    def policy(self, policy: ExitPolicy) -> None:
        self.compiled.policy = policy

    @property
    def program(self) -> Program:
        """The program, its inputs in the order of the graph's."""
        return self.compiled.program

    def locate(self, program: Program) -> None:
        """Takes the same program with the sources of its inputs in the place of its own."""
        self.compiled.program = program

    def begin(self, args: Sequence[Any], state: object | None = None) -> None:
        """Looks at the parameters among a sequence's inputs; builds the program anew where they are not those it has.

        States that were bound before have the old ones.

        Args:
            args: the inputs.
            state: of the model; where it is the one of the latest look, nothing is looked at. None: it is not known.
        """
        with self._looking:
            if state is not None and state == self.model_state:
                return
            weights, ranks = self.compiled.weights, self.compiled.ranks
            if weights is not None and self._again is not None and not ranks.every(weights.stand_for(args)):
                policy = self.policy
                self.compiled, self.captures = self._again(self.program, args)
                self.policy = policy
                self._states = WeakTensorKeyDictionary()
            self.model_state = state

    def bind(self, args: Sequence[Any], captured: bool = True, last_token: bool = False) -> StepState:
        """Returns a state of the program on the cache among its inputs.

        Args:
            args: the inputs, which the state reads in place: whoever binds writes the next pass's there.
            captured: whether units may be captured, where what captures takes passes of this size.
            last_token: nobody reads other logits than the last token's, and there may be no others.
        """
        captures = self.captures if captured and not last_token and self._may_capture(args) else None
        return StepState(self.compiled, args, None if captures is None else captures.make(), last_token, self)

    def __call__(self, *args: Any) -> tuple:
        """Runs a pass for inputs of Dynamo's; the outputs are the caller's.

        Raises:
            CacheFullError: (a ``ValueError``) the tokens do not fit into a static cache.
        """
        last_token = _last_token.get()
        if not self._goes_on(args):
            self.begin(args)
        held = None if last_token else self._state_of(args)
        state = held or self.bind(args, captured=False, last_token=last_token)
        memory = state.memory
        filled = self._check_room(args, memory)
        if held is not None:
            held.load(args, self._varying)
        state.step()
        self._note(state, filled)
        outputs = state.copied_outputs()
        _calls(self, args, outputs)
        return outputs

    def _goes_on(self, args: Sequence[Any]) -> bool:
        """Whether a step's cache is as the latest step left it: it is of the same sequence."""
        before, _ = self.program.keys
        if before is None or not self.decodes:
            return False
        return self.compiled.memories.of(args[before]).left == version_of(args[before])

    def _may_capture(self, args: Sequence[Any]) -> bool:
        if self.captures is None or self.decodes:
            return self.captures is not None
        program = self.program
        rows, tokens = (program.size_of(size, args) for size in (program.batch, program.tokens))
        return rows is not None and tokens is not None and self.captures.kind.takes(program.dtype, rows, tokens)

    def _state_of(self, args: Sequence[Any]) -> StepState | None:
        """Returns the state of a cache for inputs of these sizes, from the second time on that they come."""
        before, _ = self.program.keys
        if self.captures is None or before is None:
            return None
        cache = args[before]
        sizes = tuple(args[i].shape if isinstance(args[i], Tensor) else args[i] for i in self._varying)
        with self._lock:
            if cache not in self._states and len(self._states) == _CACHES:
                del self._states[next(iter(self._states))]
            states = self._states.setdefault(cache, {})
        if sizes not in states:
            if len(states) == _STATES:
                self._forget(states, sizes)
            states[sizes] = None
        elif states[sizes] is None and self._may_capture(args):
            owned = list(args)
            for i in self._varying:
                owned[i] = buffer_like(args[i]) if isinstance(args[i], Tensor) else args[i]
            states[sizes] = self.bind(owned)
        return states[sizes]

    def _forget(self, states: dict[tuple, StepState | None], sizes: tuple) -> None:
        """Forgets the sizes of a cache's inputs that came first; if they came once, the log says which changed."""
        oldest = next(iter(states))
        if states.pop(oldest) is None:
            changed = [i for i, *pair in zip(self._varying, oldest, sizes, strict=True) if pair[0] != pair[1]]
            names = ", ".join(self.program.inputs[i].name for i in changed)
            self.compiled.log.uncaptured_units["pass"] = f"its inputs have had other sizes each time so far: {names}"

    def states(self) -> list[StepState]:
        """Returns the states of caches that are alive, which calls of Dynamo's run, in the order of their making."""
        return [state for states in self._states.values() for state in states.values() if state is not None]

    def _check_room(self, args: Sequence[Any], memory: Memory) -> int | None:
        """Returns how many tokens will be in a static cache after a pass; None where no limit applies.

        The filled length lies on the device. To read it is to wait for everything launched so far, so on a GPU it is
        counted here, for as long as PyTorch counts no other change of it: replays are the ones that it does not count.
        (It counts none of what was made under ``torch.inference_mode()``.)
        """
        program, inputs = self.program, len(args)
        capacity = program.capacity
        if capacity is None:
            return None
        new = 1 if self.decodes else program.size_of(program.tokens, args)
        size = capacity.size
        if size is None and capacity.keys < inputs:
            size = args[capacity.keys].shape[capacity.dim]
        if new is None or size is None:
            return None
        filled = 0  # (where the pass makes the cache)
        if capacity.length < inputs:
            length = args[capacity.length]
            known, memory.filled = memory.filled, None  # (a step that fails leaves nothing known)
            counted = known is not None and not (length.is_cpu or length.is_inference())
            if known is not None and counted and memory.version == version_of(length) and known + new <= size:
                filled = known
            else:
                filled = int(length)
        if filled + new > size:
            raise CacheFullError(
                f"the static KV cache holds {size} tokens; {filled} are filled and this step adds {new}. Make it "
                f"larger (max_cache_len or max_new_tokens, at least {filled + new}) or use a dynamic cache"
            )
        return filled + new

    def _note(self, state: StepState, filled: int | None) -> None:
        """Notes how a pass left the cache."""
        (_, after), capacity, memory = self.program.keys, self.program.capacity, state.memory
        if filled is not None and capacity is not None and capacity.length < len(state.args):
            memory.filled, memory.version = filled, version_of(state.slots[capacity.length])
        if after is not None:
            memory.left = version_of(state.slots[after]) if self.decodes else None
            self.compiled.memories.keep(state.slots[after], memory)


@contextlib.contextmanager
def last_token_alone(alone: bool = True) -> Iterator[None]:
    """Inside, passes that this thread runs through a model may leave out the logits of all tokens but the last."""
    before = _last_token.set(alone)
    try:
        yield
    finally:
        _last_token.reset(before)


def on_call(observer: Callable[[RiverExecutor, Sequence[Any], tuple], object]) -> AbstractContextManager[None]:
    """Inside, calls `observer(executor, args, outputs)` after every call that Dynamo makes: its graph's."""
    return _calls.added(observer)
