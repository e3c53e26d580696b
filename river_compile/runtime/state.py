"""One program bound to one KV cache: its input buffers, the values between units, and their captures.

Not handled: two steps at a time on one state; inputs of other sizes than those it was made with.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from river_compile.agreement import ALONE, Agreement
from river_compile.errors import EmbeddingError
from river_compile.exits import ExitPolicy, SequenceState, SequenceStates, thresholds_of
from river_compile.kernels.ops import VOCAB_BLOCK
from river_compile.passes.program import Program
from river_compile.runtime.captures import (
    CaptureDevice,
    CaptureLog,
    buffer_like,
    copy_into,
)
from river_compile.runtime.launcher import Launcher
from river_compile.runtime.stats import ExitStats, Observers, StepRecord
from river_compile.runtime.units import SCORE, VOCAB_BLOCKS, Unit, Units

_NO_ROW = "is no row of the embedding"  # kernels/native/sources/operators/bindings_inputs.h
_steps: Observers[[StepState, StepRecord]] = Observers()


class StepPath(NamedTuple):
    """The exit depth of a step (blocks executed), and the scores that decided it."""

    depth: int
    scores: tuple[float, ...] = ()  # that were read after blocks
    entropy: float | None = None  # of the previous logits, if it decided


class Weights(Protocol):
    """Packed weights of a program."""

    def matches(self, inputs: Sequence[Any]) -> bool:
        """Whether they are made from the parameters among a program's inputs."""
        ...

    @property
    def is_whole(self) -> bool:
        """Whether none is missing."""
        ...

    @property
    def can_be_whole(self) -> bool:
        """Whether missing ones are there by now. Raises the error that ended their making."""
        ...


@dataclass(eq=False)
class CompiledProgram:
    """Data shared by all states of one program. `policy` may be replaced between two steps."""

    program: Program
    plain: Units  # for passes without captures
    units: Units | None  # cut for the capture device, None without one
    policy: ExitPolicy  # when tokens exit
    stats: ExitStats  # of the model
    sequences: SequenceStates  # per KV cache, shared by the model's programs
    remembers: bool  # whether exits read the entropy of the previous logits
    all_vocab_blocks: Tensor | None  # see `all_vocab_blocks` below
    log: CaptureLog  # of captures
    weights: Weights | None  # the packed ones, None without any
    on_close: Callable[[], None] | None  # called after each step
    agreement: Agreement = ALONE  # on the scores
    tuned: Callable[[ExitPolicy], ExitPolicy] | None = None  # applies a rule that is found later, if it is there


class StepState:
    """One program on one KV cache. Inputs are written in place; a run overwrites the last outputs."""

    def __init__(
        self,
        compiled: CompiledProgram,
        args: Sequence[Any],
        device: CaptureDevice | None,  # None: units run uncaptured
        last_token: bool = False,  # the only one whose logits are read; requires device=None
        executor: Any = None,
        keeps_hidden: bool = False,  # whether `hidden` can be read after a run
    ) -> None:
        program = compiled.program
        self.compiled, self.device, self.executor, self.keeps_hidden = compiled, device, executor, keeps_hidden
        self._units = compiled.plain if device is None or compiled.units is None else compiled.units
        if keeps_hidden and program.hidden is not None:
            self._units = self._units.keeping(program.hidden)
        self._late = device is not None and device.runs_late
        # By slot: the inputs, values between units, the vocabulary blocks and the latest score.
        self.slots: list[Any] = [*args, *[None] * (len(program.examples) - len(args) + 2)]
        self.slots[VOCAB_BLOCKS] = compiled.all_vocab_blocks
        self._blocks: Tensor | None = None
        self._units_by_depth: dict[int, tuple[Unit, ...]] = {}
        before, _ = program.keys
        # The keys that identify the KV cache; None if the pass makes the cache.
        self.cache: Tensor | None = None if before is None else self.slots[before]
        self.sequence = SequenceState() if self.cache is None else compiled.sequences.get(self.cache)
        self._launcher = Launcher(program, compiled.log, self.slots, device, last_token, keeps_hidden)

    @property
    def buffers(self) -> Mapping[int, Tensor]:
        """The values between captured units, by slot."""
        return self._launcher.buffers

    @property
    def args(self) -> Sequence[Any]:
        """The program's inputs."""
        return self.slots[: len(self.compiled.program.inputs)]

    @property
    def inputs(self) -> dict[Any, Tensor]:
        """The inputs that are arguments of the model's forward, by name; writable."""
        given = enumerate(self.compiled.program.inputs)
        return {known.source.name: self.slots[i] for i, known in given if known.source and known.source.kind == "call"}

    @property
    def logits(self) -> Tensor:
        """The only output: the latest run's logits, which the next run overwrites."""
        (slot,) = self.compiled.program.returned
        logits: Tensor = self.slots[slot]
        return logits

    def outputs(self) -> tuple[Any, ...]:
        """Return the graph's outputs, which the next run overwrites."""
        return tuple(self.slots[slot] for slot in self.compiled.program.returned)

    def copied_outputs(self) -> tuple[Any, ...]:
        """Return the graph's outputs, which later runs leave alone."""
        outputs = self.outputs()
        if self.device is None:
            return outputs
        fresh = tuple(torch.empty_like(value) if isinstance(value, Tensor) else value for value in outputs)
        copy_into(zip(fresh, outputs, strict=True))
        return fresh

    def hidden(self) -> Tensor | None:
        """Return the last hidden states ``[B, T, D]``, before the final norm, which later runs leave alone.

        None if the state keeps none, or the head reads other values of the blocks.
        """
        slot = self.compiled.program.hidden
        if slot is None or not self.keeps_hidden:
            return None
        hidden: Tensor = self.slots[slot] if self._launcher.hidden is None else self._launcher.hidden
        return hidden if self.device is None else hidden.clone()

    def load(self, args: Sequence[Any], numbers: Sequence[int]) -> None:
        """Copy the inputs with these numbers into the state's buffers."""
        if self._late and self.device is not None:
            self.device.begin(())
        copy_into((self.slots[i], args[i]) for i in numbers)

    def set_vocab_blocks(self, blocks: Tensor | None) -> None:
        """Restrict the twins' head to the logits of these vocabulary blocks; None: all."""
        # The other logits are `river_compile.kernels.ops.MASKED_LOGIT`. A head without a list computes all.
        everything = self.compiled.all_vocab_blocks
        if everything is None or blocks is self._blocks:
            return
        if self.slots[VOCAB_BLOCKS] is everything:
            self.slots[VOCAB_BLOCKS] = buffer_like(everything)
        slot, self._blocks = self.slots[VOCAB_BLOCKS], blocks
        if blocks is None:
            slot.copy_(everything)
        else:
            slot[0] = len(blocks)
            slot[1 : 1 + len(blocks)] = blocks

    def step(self, depth: int | None = None) -> None:
        """Run a pass and count it. Raises a ValueError if the program lacks segments for the depth."""
        # depth: blocks that a decode step executes, `WHOLE` for all; None: by the thread's context and the policy.
        compiled, started = self.compiled, time.perf_counter()
        decodes, policy = compiled.program.is_decode, compiled.policy
        if decodes:
            policy = policy.in_this_thread() if depth is None else policy.at(depth)
        try:
            path = self.run(policy)
        except BaseException as error:
            compiled.agreement.explain(error)
            if isinstance(error, RuntimeError) and _NO_ROW in str(error):
                raise EmbeddingError(self._ranges_of_ids()) from None
            raise
        compiled.stats.count(path.depth, decodes)
        if _steps:
            seconds, thread, model = time.perf_counter() - started, threading.get_ident(), compiled.stats.model_id
            _steps(self, StepRecord(path.depth, path.scores, decodes, thread, model, path.entropy, seconds))
        if compiled.on_close is not None:
            compiled.on_close()

    def _ranges_of_ids(self) -> str:
        """Return the message of an :class:`EmbeddingError`."""
        given = zip(self.compiled.program.inputs, self.args, strict=True)
        ids = (
            (known.name.strip("[']"), x)
            for known, x in given
            if isinstance(x, Tensor) and x.dim() == 2 and x.dtype == torch.long
        )
        return (
            "An id is no row of its embedding: this pass has "
            f"{' and '.join(f'{name} from {x.min()} to {x.max()}' for name, x in ids)}. Use the model's own tokenizer, "
            "and no longer text than its positions allow"
        )

    def run(self, policy: ExitPolicy) -> StepPath:
        """Run a pass; the policy decides the exit."""
        program, sequence = self.compiled.program, self.sequence if self.compiled.remembers else None
        thresholds = thresholds_of(policy, program.candidates, program.num_blocks)
        if not thresholds.stops and sequence is None:
            units = self._units_by_depth.get(thresholds.last)
            if units is None:
                units = self._units_by_depth[thresholds.last] = self._units.units_for(thresholds.last)
            if self._late:
                self._launcher.begin()
            self._launcher.launch(units)
            if self._late:
                self._launcher.end()
            return StepPath(thresholds.last)
        last, done, entropy = thresholds.last, 0, None
        scores: list[float] = []
        if sequence is not None and thresholds.early is not None:
            depth, least = thresholds.early
            entropy = None if sequence.entropy is None else sequence.entropy.item()
            if entropy is not None and -entropy > least:
                last = depth
        self._launcher.begin()
        for depth, threshold in thresholds.stops:
            self._launcher.launch(self._units.span(done, depth))
            done = depth
            if threshold is None:
                continue
            scores.append(self._score(depth))
            if scores[-1] > threshold:
                last = depth
                break
        else:
            self._launcher.launch(self._units.span(done, last))
        self._launcher.launch(self._units.tail(last))
        if sequence is not None:
            sequence.entropy = self._kept_score()
        self._launcher.end()
        return StepPath(last, tuple(scores), entropy)

    def _score(self, depth: int) -> float:
        """Wait for and return the score after the last block that ran."""
        if self.device is None:
            return float(self.compiled.agreement.first(self.slots[SCORE]).item())
        self.device.wait()
        return float(self._launcher.flags[depth].item())

    def _kept_score(self) -> Tensor | None:
        """Return a copy of the head's score; None without one."""
        score = self.slots[SCORE]
        if score is None or self.device is None:
            return None if score is None else self.compiled.agreement.first(score)
        kept = buffer_like(score)
        self.device.run(lambda: kept.copy_(score))
        return kept


def on_step(observer: Callable[[StepState, StepRecord], object]) -> AbstractContextManager[None]:
    """Inside, call `observer(state, record)` after every step in the process."""
    return _steps.added(observer)


def all_vocab_blocks(program: Program) -> Tensor | None:
    """Return the list of all vocabulary blocks, int32 ``[1 + blocks]``; None if the head takes no list."""
    # As `vocab_blocks` of `river::linear` has it. Only 4-bit heads of the C++ kernels take a list.
    head = program.twin_head
    if head is None or not head.takes_vocab_blocks:
        return None
    count = blocks_of(sum(head.packed[0].out_features))
    with torch.inference_mode(False):  # the model may be compiled in that mode and generate without it
        return torch.tensor([count, *range(count)], dtype=torch.int32)


def blocks_of(vocabulary: int) -> int:
    """Return the number of vocabulary blocks."""
    return -(-vocabulary // VOCAB_BLOCK)
