"""Runs the steps of a RiverProgram: backbone blocks until an exit, twins for the rest, then the head.

Not handled: how it runs (:mod:`river_compile.runtime.runner`) and when a token leaves (:mod:`river_compile.exits`).
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch

from river_compile.exits import ExitPolicy, Memories, Memory, Taken, bars_of
from river_compile.passes.capture_safety import fixed_inputs
from river_compile.passes.program import RiverProgram
from river_compile.runtime.capacity import Capacity
from river_compile.runtime.draft_vocab import DraftVocab, HeadVocab
from river_compile.runtime.fill import Fill
from river_compile.runtime.runner import Runner
from river_compile.runtime.sequences import SequenceTracker
from river_compile.runtime.slots import Slots, cache_slots
from river_compile.runtime.stats import ExitStats, Observers, StepRecord
from river_compile.runtime.walk import HostWalk
from river_compile.upstream.dynamo import GraphEntry

# Runs a pass once more: (the graph's inputs, the tokens that a draft may have) -> outputs.
Replay = Callable[[Sequence, "DraftVocab | None"], tuple]

_last_token: ContextVar[bool] = ContextVar("_last_token", default=False)
_steps: Observers[[RiverExecutor, Sequence[Any], StepRecord]] = Observers()
_calls: Observers[[RiverExecutor, Sequence[Any], tuple]] = Observers()


class RiverExecutor:
    """Callable that stands in for a traced graph.

    Args:
        program: the rewritten graph.
        runner: runs its segments; may be replaced between two steps.
        policy: when tokens leave; may be replaced between two steps.
        stats: counts exits.
        memories: what policy and fill remember of the model's sequences; shared by the model's graphs.
        fill: what stands in for the entries of skipped blocks.
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
        fill: Fill,
        sequences: SequenceTracker,
        on_begin: Callable[[Sequence[Any]], None] | None,
        on_close: Callable[[], None],
        wanted: HeadVocab | None = None,
        entry: GraphEntry | None = None,
        inputs: Sequence[str] = (),
    ) -> None:
        self.program, self.runner, self.policy, self.fill = program, runner, policy, fill
        self.num_blocks = program.plan.num_blocks
        self.decodes = program.plan.is_decode
        self.sequences, self.entry, self.inputs = sequences, entry, tuple(inputs)
        self._stats, self._memories = stats, memories
        self._on_begin, self._on_close = on_begin, on_close
        self._wanted = wanted
        self.room = Capacity.of(program)
        self._cache_in, self._cache_out = cache_slots(program)
        self._remembers = policy.criterion.reads == "previous" or fill.remembers

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
            memory = self._recall(slots)
            taken = self._run(runner, slots, policy, memory)
            self._keep(runner, slots, memory)
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
        way: Taken | None = None  # where it is known
        if not self._remembers and (depth is not None or not self.decodes):
            last = self._policy_at(depth).fixed_depth if self.decodes else None
            way = Taken(self.num_blocks if last is None else min(last, self.num_blocks))

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
                    memory = self._recall(slots)
                    taken = self._run(runner, slots, self._policy_at(depth), memory)
                    self._keep(runner, slots, memory)
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

    def _run(self, runner: Runner, slots: list, policy: ExitPolicy, memory: Memory) -> Taken | Callable[[], Taken]:
        """Runs blocks, tail and head of a step; returns the way that it took, or what waits for the step to tell it."""
        limit = self.fill.begin(slots, memory)
        bars = bars_of(policy, self.program.candidates, self.num_blocks)
        if bars.reads == "previous":
            bars = bars._replace(given=memory.entropy)
        outcome = runner.whole(slots, bars) if runner.decides and bars.for_device else None
        if outcome is not None:
            return lambda: bars.taken(outcome())
        walk = HostWalk(runner, bars, limit)
        taken = walk.taken(walk.run(slots, walk.stops, walk.last))
        self.fill.end(slots, memory, taken.depth)
        return taken

    def _record(self, args: Sequence[Any], taken: Taken | Callable[[], Taken], started: float) -> None:
        """Counts a step and shows it to observers; without any it waits for nothing."""
        decodes, thread, model = self.decodes, threading.get_ident(), self._stats.model_id

        def record(way: Taken, seconds: float) -> StepRecord:
            return StepRecord(way.depth, way.scores, decodes, thread, model, way.entropy, way.river_from, seconds)

        if callable(taken) and not _steps:
            read, seconds = taken, time.perf_counter() - started
            self._stats.count_later(lambda: record(read(), seconds))
            return
        way = taken() if callable(taken) else taken
        step = record(way, time.perf_counter() - started)
        self._stats.count(step)
        _steps(self, args, step)

    def _cache(self, args: Sequence[Any]) -> Any:
        """Returns the tensor of the KV cache that tells sequences apart, before the step."""
        return None if self._cache_in is None or self._cache_in >= len(args) else args[self._cache_in]

    def _recall(self, slots: list) -> Memory:
        """Returns the sequence's memory; for a prompt only that of its fill."""
        if not self._remembers or self._cache_in is None:
            return Memory()
        memory = self._memories.recall(slots[self._cache_in])
        return memory if self.decodes else Memory(entries=dict(memory.entries))

    def _keep(self, runner: Runner, slots: list, memory: Memory) -> None:
        if self._remembers and self._cache_out is not None:
            memory.entropy = runner.head_score(slots) if self.policy.criterion.reads != "block" else None
            self._memories.keep(slots[self._cache_out], memory)


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
