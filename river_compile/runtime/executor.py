"""Run a compiled program: bound to a KV cache by a call of generate, or called by Dynamo.

Not handled: how units run (:mod:`river_compile.runtime.state`); when a token exits (:mod:`river_compile.exits`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from river_compile.errors import CacheFullError
from river_compile.exits import ExitPolicy, SequenceState
from river_compile.passes.program import Program
from river_compile.runtime.captures import Capturing, buffer_like
from river_compile.runtime.state import CompiledProgram, StepState
from river_compile.upstream.tensors import version_of

_CACHES = 4  # caches with states: a state keeps its cache alive, and nothing shows that a cache is no longer used
_STATES = 8  # sizes of inputs with a state, per cache


@dataclass
class DynamoCall:
    """A call of a model that a thread makes through Dynamo."""

    stands_for_call: Callable[[RiverExecutor, Sequence[Any]], bool] | None
    last_token: bool
    keeps_hidden: bool = False
    reached: RiverExecutor | None = None  # the latest graph
    hidden: Tensor | None = None  # what it gave to its head, as `StepState.hidden`


_dynamo_call: ContextVar[DynamoCall | None] = ContextVar("_dynamo_call", default=None)


class Reached(BaseException):
    """Ends a call at the graph that stands for all of it. Not an Exception, which the model's code might catch."""

    def __init__(self, executor: RiverExecutor, args: Sequence[Any]) -> None:
        self.executor, self.inputs = executor, args


class RiverExecutor:
    """The callable that replaces a traced graph."""

    def __init__(
        self,
        compiled: CompiledProgram,
        captures: Capturing | None,  # None: nothing captures; may be replaced between two steps
        # Rebuilds the program for inputs, and whether their parameters have changed; else missing weights are there.
        rebuild: Callable[[Program, Sequence[Any], bool], tuple[CompiledProgram, Capturing | None]] | None = None,
    ) -> None:
        self.compiled, self.captures, self._rebuild = compiled, captures, rebuild
        self.decodes = compiled.program.is_decode
        # Makes the program that the compile cache keeps for later processes; None: they run this one.
        self.for_later: Callable[[], Program] | None = None
        self.model_state: object | None = None  # at the latest check of the parameters
        self._checking = threading.Lock()
        # By the cache's first keys, then the inputs' sizes: a state if the sizes were called twice, None if once.
        self._states: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._lock = threading.Lock()
        self._varying = [i for i, given in enumerate(compiled.program.inputs) if not given.is_fixed]

    @property
    def policy(self) -> ExitPolicy:
        """When tokens exit; may be replaced between two steps."""
        return self.compiled.policy

    @policy.setter
    def policy(self, policy: ExitPolicy) -> None:
        self.compiled.policy = policy

    @property
    def program(self) -> Program:
        """The program, with inputs in the graph's order; may be replaced by itself with the sources of its inputs."""
        return self.compiled.program

    @program.setter
    def program(self, program: Program) -> None:
        self.compiled.program = program

    def begin(self, args: Sequence[Any], state: object | None = None) -> None:
        """Check the weights before a sequence; rebuild the program if they changed, or missing ones are there."""
        # state: of the model; equal to the latest check's, nothing is checked. None: not known. Bound states keep the
        # old program.
        with self._checking:
            self._check_weights(args, state)
            weights, tuned = self.compiled.weights, self.compiled.tuned
            if tuned is not None and weights is not None and weights.is_whole:
                self.policy = tuned(self.policy)

    def _check_weights(self, args: Sequence[Any], state: object | None) -> None:
        """Rebuild the program if its weights changed, or missing ones are there."""
        if state is not None and state == self.model_state:
            return
        weights, agreement = self.compiled.weights, self.compiled.agreement
        if weights is not None and self._rebuild is not None:
            changed = not agreement.every(weights.matches(args))
            if changed or weights.can_be_whole:
                policy = self.policy
                self.compiled, self.captures = self._rebuild(self.program, args, changed)
                self.policy = policy
                self._states = WeakTensorKeyDictionary()
                weights = self.compiled.weights
        self.model_state = state if weights is None or weights.is_whole else None

    def bind(
        self, args: Sequence[Any], captured: bool = True, last_token: bool = False, keeps_hidden: bool = False
    ) -> StepState:
        """Return a state of the program on the cache among its inputs, which it reads in place."""
        # captured: whether to capture a pass of this size. last_token and keeps_hidden: as StepState has them.
        captures = self.captures if captured and not last_token and self._may_capture(args) else None
        device = None if captures is None else captures.make()
        return StepState(self.compiled, args, device, last_token, self, keeps_hidden)

    def __call__(self, *args: Any) -> tuple:
        """Run a pass for Dynamo; the outputs are the caller's. Raises a CacheFullError."""
        call = _dynamo_call.get()
        last_token, keeps_hidden = (False, False) if call is None else (call.last_token, call.keeps_hidden)
        if call is not None:
            call.reached = self
            if call.stands_for_call is not None and call.stands_for_call(self, args):
                raise Reached(self, args)
        if not self._goes_on(args):
            self.begin(args)
        held = None if last_token or keeps_hidden else self._state_of(args)
        state = held or self.bind(args, captured=False, last_token=last_token, keeps_hidden=keeps_hidden)
        sequence = state.sequence
        filled = self._check_room(args, sequence)
        if held is not None:
            held.load(args, self._varying)
        state.step()
        if call is not None:
            call.hidden = state.hidden()
        self._note(state, filled)
        return state.copied_outputs()

    def _goes_on(self, args: Sequence[Any]) -> bool:
        """Whether the latest step left this cache: the sequence continues."""
        before, _ = self.program.keys
        if before is None or not self.decodes:
            return False
        return self.compiled.sequences.get(args[before]).left == version_of(args[before])

    def _may_capture(self, args: Sequence[Any]) -> bool:
        if self.captures is None or self.decodes:
            return self.captures is not None
        program = self.program
        rows, tokens = (program.size_of(size, args) for size in (program.batch, program.tokens))
        return rows is not None and tokens is not None and self.captures.kind.takes(program.dtype, rows, tokens)

    def _state_of(self, args: Sequence[Any]) -> StepState | None:
        """Return a cache's state for inputs of these sizes, from their second call on."""
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
        """Drop the oldest sizes; if they were called once, log the inputs that vary."""
        oldest = next(iter(states))
        if states.pop(oldest) is None:
            changed = [i for i, *pair in zip(self._varying, oldest, sizes, strict=True) if pair[0] != pair[1]]
            names = ", ".join(self.program.inputs[i].name for i in changed)
            self.compiled.log.uncaptured_units["pass"] = f"its inputs have had other sizes each time so far: {names}"

    def states(self) -> list[StepState]:
        """Return the states of live caches that Dynamo's calls use, in the order of their making."""
        return [state for states in self._states.values() for state in states.values() if state is not None]

    def _check_room(self, args: Sequence[Any], sequence: SequenceState) -> int | None:
        """Return the tokens in a static cache after a pass; None without a limit."""
        # The filled length lies on the device, and reading it waits for all launched work. So on a GPU it is counted
        # here while PyTorch counts no other change of it: replays are the changes that PyTorch does not count, nor
        # does it count those of tensors made under `torch.inference_mode()`.
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
        filled = 0  # if the pass makes the cache
        if capacity.length < inputs:
            length = args[capacity.length]
            known, sequence.filled = sequence.filled, None  # a step that fails leaves nothing known
            counted = known is not None and not (length.is_cpu or length.is_inference())
            if known is not None and counted and sequence.version == version_of(length) and known + new <= size:
                filled = known
            else:
                filled = int(length)
        if filled + new > size:
            raise CacheFullError.of(size, filled, new)
        return filled + new

    def _note(self, state: StepState, filled: int | None) -> None:
        """Record the cache's version and length after a pass."""
        (_, after), capacity, sequence = self.program.keys, self.program.capacity, state.sequence
        if filled is not None and capacity is not None and capacity.length < len(state.args):
            sequence.filled, sequence.version = filled, version_of(state.slots[capacity.length])
        if after is not None:
            sequence.left = version_of(state.slots[after]) if self.decodes else None
            self.compiled.sequences.put(state.slots[after], sequence)


@contextlib.contextmanager
def through_dynamo(
    stands_for_call: Callable[[RiverExecutor, Sequence[Any]], bool] | None = None,
    last_token: bool = False,
    keeps_hidden: bool = False,
) -> Iterator[DynamoCall]:
    """Inside, this thread makes a call of a model through Dynamo; yields what the call reaches.

    Args:
        stands_for_call: is asked with each executor that the call reaches, and its inputs; if it returns True, the call
            ends with a :class:`Reached`, and the executor does not run.
        last_token: whether prompts may omit all logits but the last token's.
        keeps_hidden: whether the last hidden states are wanted.
    """
    call = DynamoCall(stands_for_call, last_token, keeps_hidden)
    before = _dynamo_call.set(call)
    try:
        yield call
    finally:
        _dynamo_call.reset(before)
