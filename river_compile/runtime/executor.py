"""Runs the steps of a RiverProgram: backbone blocks until an exit, twins for the rest, then the head.

Not handled: how a span of blocks runs (:mod:`river_compile.runtime.runner`), and what the bars of a step are
(:mod:`river_compile.exits`).
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

from river_compile.exits import ExitPolicy, Memories, bars_of
from river_compile.passes.capture_safety import fixed_inputs
from river_compile.passes.program import RiverProgram
from river_compile.runtime.capacity import Capacity
from river_compile.runtime.draft_vocab import DraftVocab, HeadVocab
from river_compile.runtime.runner import Runner
from river_compile.runtime.sequences import SequenceTracker
from river_compile.runtime.slots import Slots, cache_slots
from river_compile.runtime.stats import ExitStats, Observers, StepRecord
from river_compile.upstream.dynamo import GraphEntry

# Runs a pass once more: (the graph's inputs, the tokens that a draft may have) -> outputs.
Replay = Callable[[Sequence, "DraftVocab | None"], tuple]

_last_token: ContextVar[bool] = ContextVar("_last_token", default=False)
_steps: Observers[[RiverExecutor, Sequence[Any], StepRecord]] = Observers()
_calls: Observers[[RiverExecutor, Sequence[Any], tuple]] = Observers()


class _Taken(NamedTuple):
    """The way that a step took: its exit depth, the scores that were read, and the entropy that decided."""

    depth: int
    scores: tuple[float, ...] = ()
    entropy: float | None = None


class RiverExecutor:
    """Callable that stands in for a traced graph.

    Args:
        program: the rewritten graph.
        runner: runs its segments; may be replaced between two steps.
        policy: when tokens leave; may be replaced between two steps.
        stats: counts exits.
        memories: what the policy remembers of the model's sequences; shared by the model's graphs.
        sequences: of the model; tells when a sequence begins.
        on_begin: called with the graph's inputs where one begins, before anything runs; None: nothing to do.
        on_close: called after each step.
        wanted: the list of logits that the river's head computes; None where it computes all.
        entry: what Dynamo keeps of the graph; None outside of Dynamo.
        inputs: how the user's code names the graph's inputs, in order; none outside of Dynamo.
    """

    def __init__(
        self,
        program: RiverProgram,
        runner: Runner,
        policy: ExitPolicy,
        stats: ExitStats,
        memories: Memories,
        sequences: SequenceTracker,
        on_begin: Callable[[Sequence[Any]], None] | None,
        on_close: Callable[[], None],
        wanted: HeadVocab | None = None,
        entry: GraphEntry | None = None,
        inputs: Sequence[str] = (),
    ) -> None:
        self.program, self.runner, self.policy = program, runner, policy
        self.num_blocks = program.plan.num_blocks
        self.decodes = program.plan.is_decode
        self.sequences, self.entry, self.inputs = sequences, entry, tuple(inputs)
        self._stats, self._memories = stats, memories
        self._on_begin, self._on_close = on_begin, on_close
        self._wanted = wanted
        self.room = Capacity.of(program)
        self._cache_in, self._cache_out = cache_slots(program)
        self._remembers = policy.criterion.reads == "previous"

    def __call__(self, *args: object) -> tuple:
        return self.step(args)

    def step(
        self,
        args: Sequence[Any],
        depth: int | None = None,
        tokens: DraftVocab | None = None,
        last_token: bool = False,
        has_room: bool = False,
    ) -> tuple:
        """Runs a step and returns the graph's outputs.

        Args:
            args: the graph's inputs.
            depth: blocks that a decode step executes, `WHOLE` for all; None leaves it to the thread and the policy.
            tokens: those whose logits the river's head computes, None for all.
            last_token: the caller reads no logits but those of the last token.
            has_room: whether the caller saw to it that the tokens have room in the cache.

        Raises:
            ValueError: the program lacks the segments for that depth.
            CacheFullError: (a ``ValueError``) the tokens do not fit into a static cache.
        """
        started = time.perf_counter()
        policy = self._policy_at(depth)
        runner = self.runner.for_pass(args)
        if last_token or _last_token.get():
            runner = runner.for_last_token()
        if self._on_begin is not None and self.sequences.begins(self, self._cache(args)):
            self._on_begin(args)
        if self.room is not None and has_room:
            self.room.forget(args)
        with runner, self._logits_of(tokens), torch._C._DisableAutocast():
            slots = runner.begin(args)
            filled = None if self.room is None or has_room else self.room.check(slots)
            taken = self._run(runner, slots, policy)
            self.sequences.left(None if not self.decodes or self._cache_out is None else slots[self._cache_out])
            outputs = runner.finish(slots)
        if self.room is not None and filled is not None:
            self.room.took(slots, filled)
        self._record(args, taken, started)
        _calls(self, args, outputs)
        self._on_close()
        return outputs

    def replay(self, args: Sequence, depth: int | None) -> Replay | None:
        """Returns what runs steps like this one again, with `depth` as :meth:`step` has it.

        None where that saves nothing. The caller sees to it that the tokens have room in the cache, and that they go on
        with a sequence. What may differ in the inputs: tensors that are neither parameters nor the cache's, and
        numbers.
        """
        whole = self.runner
        runner = whole.for_pass(args)
        if not runner.binds:
            return None
        slots: Slots | None = None
        way: _Taken | None = None  # where it is known
        if not self._remembers and (depth is not None or not self.decodes):
            last = self._policy_at(depth).fixed_depth if self.decodes else None
            way = _Taken(self.num_blocks if last is None else min(last, self.num_blocks))

        def again(args: Sequence, tokens: DraftVocab | None) -> tuple:
            nonlocal slots
            if self.runner is not whole:  # (it was replaced)
                return self.step(args, depth, tokens, has_room=True)
            started = time.perf_counter()
            if self.room is not None:
                self.room.forget(args)
            with runner, self._logits_of(tokens):
                slots = runner.begin(args, slots)
                if way is None:
                    taken = self._run(runner, slots, self._policy_at(depth))
                else:
                    taken = way
                    runner.through(slots, way.depth)
                outputs = runner.finish(slots)
            self._record(args, taken, started)
            self._on_close()
            return outputs

        return again

    @functools.cached_property
    def fixed(self) -> frozenset[int]:
        """The numbers of the inputs whose memory the caller keeps: parameters, and what the graph writes in place."""
        return frozenset(self.program.slots[node] for node in fixed_inputs(self.program.plan))

    def _policy_at(self, depth: int | None) -> ExitPolicy:
        if not self.decodes:
            return self.policy
        return self.policy.in_this_thread() if depth is None else self.policy.at(depth)

    def _logits_of(self, tokens: DraftVocab | None) -> AbstractContextManager[None]:
        return contextlib.nullcontext() if self._wanted is None else self._wanted.only(tokens)

    def _run(self, runner: Runner, slots: list, policy: ExitPolicy) -> _Taken:
        """Runs blocks, tail and head of a step."""
        bars = bars_of(policy, self.program.candidates, self.num_blocks)
        last, done, scores, entropy = bars.last, 0, [], None
        if bars.early is not None:
            entropy = self._previous_entropy(slots)
            if entropy is not None and -entropy > bars.early[1]:
                last = bars.early[0]
        for depth, bar in bars.stops:
            runner.blocks(slots, done, depth)
            done = depth
            if bar is None:
                continue
            scores.append(runner.read_score(slots, depth))
            if scores[-1] > bar:
                last = depth
                break
        else:
            runner.blocks(slots, done, last)
        if last < self.num_blocks:
            runner.tail(slots, last)
        if self._remembers and self._cache_out is not None:
            self._memories.keep(slots[self._cache_out], runner.head_score(slots))
        return _Taken(last, tuple(scores), entropy)

    def _previous_entropy(self, slots: list) -> float | None:
        entropy = None if self._cache_in is None else self._memories.recall(slots[self._cache_in])
        return None if entropy is None else entropy.item()

    def _record(self, args: Sequence[Any], taken: _Taken, started: float) -> None:
        """Counts a step and shows it to observers."""
        thread, seconds = threading.get_ident(), time.perf_counter() - started
        step = StepRecord(taken.depth, taken.scores, self.decodes, thread, self._stats.model_id, taken.entropy, seconds)
        self._stats.count(step)
        _steps(self, args, step)

    def _cache(self, args: Sequence[Any]) -> Any:
        """Returns the tensor of the KV cache that tells sequences apart, before the step."""
        return None if self._cache_in is None or self._cache_in >= len(args) else args[self._cache_in]


@contextlib.contextmanager
def last_token_alone(alone: bool = True) -> Iterator[None]:
    """Inside, passes that this thread runs through a model may leave out the logits of all tokens but the last."""
    before = _last_token.set(alone)
    try:
        yield
    finally:
        _last_token.reset(before)


def on_step(observer: Callable[[RiverExecutor, Sequence[Any], StepRecord], object]) -> AbstractContextManager[None]:
    """Inside, calls `observer(executor, args, record)` after every step in the process, with its graph's inputs."""
    return _steps.added(observer)


def on_call(observer: Callable[[RiverExecutor, Sequence[Any], tuple], object]) -> AbstractContextManager[None]:
    """Inside, calls `observer(executor, args, outputs)` after every step in the process: its graph's."""
    return _calls.added(observer)
