"""The five fills: what a token costs at two budgets, in parts, and the frontier of speed and quality.

A budget is a share of the blocks that a token executes in the mean. The threshold that spends it is worked out from the
similarities that never exit saw, and is the same for all fills: so each sees the same exits, as far as its own earlier
exits leave the hidden states alone.

Parts of a token's time:
    backbone   prologue, blocks that the token ran for itself, head
    tail       the river's twins
    repair     what is done for the sake of missing entries: the projections of "propagate", empty slots, the time
               that "recompute" takes in a block beyond what the block takes for one token, keeping count of holes
Calls that do the same count with their median, so that a pause of the machine adds nothing. Fills are compiled one
after the other; times are shown at the pace of never exit in the first session.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import nn

from benchmarks.criteria import least_kl
from benchmarks.quality.session import Session, at_depth
from benchmarks.rivals.recompute import Recompute
from river_compile.backend import executors_of
from river_compile.calibration.evaluate import Measured, Meter
from river_compile.passes.program import Segment
from river_compile.runtime.fill import Call, Fill
from river_compile.runtime.runner import PlainRunner

BUDGETS = {"relaxed": 1 / 6, "strict": 1 / 2}  # blocks executed in the mean, as a share of all
FRONTIER = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 7 / 8)
PARTS = ("backbone", "tail", "repair")
FIRST_EXIT = 2


def threshold_for(meter: Meter, share: float) -> float:
    """Returns the threshold at which never exit's similarities let tokens leave after that share of the blocks."""
    tokens = [step.similarities for run in meter.references for step in run.steps]
    seen = sorted({score for token in tokens for score in token[FIRST_EXIT - 1 :]})

    def depth(threshold: float) -> float:
        def leaves(token: Sequence[float]) -> int:
            later = enumerate(token[FIRST_EXIT - 1 :], start=FIRST_EXIT)
            return next((d for d, score in later if score > threshold), meter.num_blocks)

        return statistics.fmean(map(leaves, tokens))

    low, high = 0, len(seen) - 1
    while low < high:  # (depth grows with the threshold)
        middle = (low + high) // 2
        low, high = (low, middle) if depth(seen[middle]) >= share * meter.num_blocks else (middle + 1, high)
    return seen[low]


def thresholds_of(meter: Meter) -> dict[float, float]:
    """Returns the threshold of every share that is measured."""
    return {share: threshold_for(meter, share) for share in {*BUDGETS.values(), *FRONTIER}}


def measure(session: Session, thresholds: dict[float, float], never: float | None = None) -> dict:
    """Returns the frontier and the budgets of the fill that a session was compiled with.

    Args:
        session: compiled with the fill.
        thresholds: of each share of blocks.
        never: seconds of a step that never exits, in the session whose speed all fills are shown at; None: its own.
    """
    meter, num_blocks = session.own, session.num_blocks
    texts = range(len(meter.references))
    budgets = {}
    for name, share in BUDGETS.items():
        with timed_parts(session.model) as parts:
            measured = meter.measure((thresholds[share], FIRST_EXIT), texts, name)
        pace = 1.0 if never is None else never / meter.seconds_never
        found = {part: ms * pace for part, ms in parts(len(measured.kinds)).items()}
        budgets[name] = _point(measured, meter) | {"threshold": thresholds[share], "ms": found}
    rules = [(thresholds[share], FIRST_EXIT) for share in FRONTIER]
    points = [meter.measure(rule, texts, "threshold") for rule in rules]
    fixed = sorted({FIRST_EXIT, *(round(num_blocks * share) for share in FRONTIER), num_blocks - 1} - {0, num_blocks})
    points += [at_depth(meter, depth, f"depth {depth}") for depth in fixed]
    return {"budgets": budgets, "points": [_point(measured, meter) for measured in points]}


def _point(measured: Measured, meter: Meter) -> dict:
    return {
        "time": meter.cost(measured),
        "kl": statistics.fmean(measured.text_losses("kl")),
        "agreement": 1 - statistics.fmean(measured.text_losses("agreement")),
        "depth": measured.mean_depth,
    }


def frontiers(fills: dict[str, dict], times: Sequence[float]) -> dict[str, list[float | None]]:
    """Returns each fill's least KL at mean times per token; rules may be mixed by text, with never exit too."""
    points = {name: [(p["time"], p["kl"]) for p in fill["points"]] + [(1.0, 0.0)] for name, fill in fills.items()}
    return {name: [least_kl(found, time) for time in times] for name, found in points.items()}


def river_leads(frontier: dict[str, list[float | None]]) -> bool:
    """Tells whether the river loses least at every time that it and another fill reach."""
    others = [kls for name, kls in frontier.items() if name != "river"]
    return all(
        ours <= theirs
        for kls in others
        for ours, theirs in zip(frontier["river"], kls, strict=True)
        if ours is not None and theirs is not None
    )


class _Timed:
    """Wraps a step and adds up its seconds."""

    def __init__(self, step: Callable, seconds: list[float]) -> None:
        self._step, self._seconds = step, seconds

    def __call__(self, *arguments: object) -> object:
        start = time.perf_counter()
        result = self._step(*arguments)
        self._seconds.append(time.perf_counter() - start)
        return result


class _TimedBlock(_Timed):
    """A block, whose runs with skipped tokens go to a list of their own."""

    def __init__(self, step: Callable, fill: Fill, alone: list[float], together: list[float]) -> None:
        super().__init__(step, alone)
        self._fill, self._together = fill, together

    def __call__(self, slots: list) -> None:
        super().__call__(slots)
        if isinstance(self._fill, Recompute) and self._fill.left.batch is not None:
            self._together.append(self._seconds.pop())


class _TimedFill(Fill):
    """A fill whose bookkeeping is timed, and whose blocks are."""

    def __init__(self, fill: Fill, seconds: dict[str, list[float]], alone: list[float], together: list[float]) -> None:
        super().__init__(fill.program)
        self._fill, self._alone, self._together = fill, alone, together
        self.begin, self.end = _Timed(fill.begin, seconds["begin"]), _Timed(fill.end, seconds["end"])

    def blocks(self, blocks: Sequence[Call], steps: Mapping[Segment, Call]) -> list[Call]:
        return [_TimedBlock(b, self._fill, self._alone, self._together) for b in self._fill.blocks(blocks, steps)]


@contextlib.contextmanager
def timed_parts(model: nn.Module) -> Iterator[Callable[[int], dict[str, float]]]:
    """Times the parts of all decode steps that run inside; gives a function from their number to ms per token."""
    seconds: dict[str, defaultdict[str, list[float]]] = {part: defaultdict(list) for part in PARTS}
    together: list[float] = []
    alone = seconds["backbone"]["block"]
    before = [(executor, executor.runner, executor.fill) for executor in executors_of(model) if executor.decodes]
    for executor, runner, fill in before:
        program, tail = executor.program, seconds["tail" if type(fill) is Fill else "repair"]
        steps = dict(runner.steps)
        for segments, part in (
            ((program.prologue, program.head, program.river_head), seconds["backbone"]),
            (program.twins, tail),
        ):
            steps |= {s: _Timed(steps[s], part[s.kind]) for s in segments if s in steps}
        executor.fill = _TimedFill(fill, seconds["repair"], alone, together)
        executor.runner = PlainRunner(program, steps, executor.fill)

    def per_token(tokens: int) -> dict[str, float]:
        typical = statistics.median(alone)
        parts = {part: sum(map(_usual, calls.values())) for part, calls in seconds.items()}
        parts["backbone"] += typical * len(together)
        parts["repair"] += sum(s - typical for s in together)
        return {part: 1e3 * total / tokens for part, total in parts.items()}

    try:
        yield per_token
    finally:
        for executor, runner, fill in before:
            executor.runner, executor.fill = runner, fill


def _usual(seconds: Sequence[float]) -> float:
    """Returns the sum over calls that do the same, each counted with their median."""
    return statistics.median(seconds) * len(seconds) if seconds else 0.0
