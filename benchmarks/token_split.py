"""Where the time of one decoded token is spent on a CPU: each part timed where it runs, inside `generate`.

    python -m benchmarks.token_split --depth 2         # medians of a token's parts in transformers' loop
    python -m benchmarks.token_split --own-loop        # with decode
    python -m benchmarks.token_split --phases          # each kind of C++ phase, in exact mode by kind of pass

With `--phases` every phase of the tapes reads a clock around each of its parts: how many a pass has, their
microseconds, how long this thread and the others ran, the wait before, and the rate at which weights are read.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from benchmarks.common import command_line, print_table
from river_compile import accelerate
from river_compile.backend import river
from river_compile.cli import shared
from river_compile.decoding.mode import decode
from river_compile.decoding.passes import Passes
from river_compile.exits import forced_depth
from river_compile.kernels.native import load
from river_compile.reporting import timing
from river_compile.runtime.executor import RiverExecutor
from river_compile.runtime.state import on_step
from river_compile.runtime.stats import StepRecord
from tools import demo_models

PROMPT = "Explain how a refrigerator works."
NEW_TOKENS = 64
BEGIN, END = load.PHASE_COLUMNS.index("begin"), load.PHASE_COLUMNS.index("end")
# What comes between two marks of a token, in order.
STAGES = {
    ("prepare", "prepared"): "transformers: inputs and masks",
    ("prepared", "call"): "transformers: to the call",
    ("call", "executor"): "from the model's call to the executor",
    ("executor", "ran"): "the executor",
    ("ran", "returned"): "from the executor to the caller",
    ("returned", "update"): "transformers: to the update",
    ("update", "updated"): "transformers: arguments of the next step",
    ("updated", "prepare"): "transformers: choosing the token, streamer, stopping",
}


class Marks:
    """Names and times of what happened."""

    def __init__(self) -> None:
        self.times: list[tuple[str, float]] = []
        self.steps: list[tuple[float, float]] = []  # when each ended, and its seconds

    def step(self, state: object, record: StepRecord) -> None:
        """Note a step of an executor."""
        self.steps.append((time.perf_counter(), record.seconds))

    def around(self, function: Callable[..., Any], before: str, after: str) -> Callable[..., Any]:
        """Return a function that marks when it begins and when it is done."""

        @functools.wraps(function)
        def marked(*args: Any, **kwargs: Any) -> Any:
            self.times.append((before, time.perf_counter()))
            result = function(*args, **kwargs)
            self.times.append((after, time.perf_counter()))
            return result

        return marked


@contextmanager
def marked(model: nn.Module, marks: Marks) -> Iterator[None]:
    """Inside, marks are set wherever a token passes from one part to the next."""
    kind: Any = type(model)
    call, run = kind.__call__, RiverExecutor.__call__
    model.prepare_inputs_for_generation = marks.around(model.prepare_inputs_for_generation, "prepare", "prepared")
    update = marks.around(model._update_model_kwargs_for_generation, "update", "updated")
    model._update_model_kwargs_for_generation = update
    kind.__call__ = marks.around(call, "call", "returned")
    RiverExecutor.__call__ = marks.around(run, "executor", "ran")
    try:
        yield
    finally:
        kind.__call__, RiverExecutor.__call__ = call, run
        del model.prepare_inputs_for_generation, model._update_model_kwargs_for_generation


def phases(model: Any, ids: torch.Tensor) -> None:
    """Print what each kind of phase takes, by kind of pass."""
    found: dict[str, list[list[list[int]]]] = {}  # by pass: of each replay, of each phase
    running = ["another"]

    def named(function: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        def run(passes: Passes, *args: Any) -> Any:
            running[0] = name(passes, *args)
            return function(passes, *args)

        return run

    draft, verify, usual = Passes.draft_step, Passes.verify, load.Tape.replay
    Passes.draft_step = named(draft, lambda *_: "draft")
    Passes.verify = named(verify, lambda passes, _, drafted: f"verify {passes.width_for(drafted)}")
    load.Tape.replay = lambda tape: found.setdefault(running[0], []).append(tape.replay_timed().tolist())
    try:
        accelerate(model, "exact", background_packing=False)
        timing.generate(model, ids, NEW_TOKENS)
        found.clear()
        timing.generate(model, ids, NEW_TOKENS)
    finally:
        Passes.draft_step, Passes.verify, load.Tape.replay = draft, verify, usual
    for name in sorted(found):
        replays = found[name]
        milliseconds = statistics.fmean(replay[-1][END] - replay[0][BEGIN] for replay in replays) / 1e6
        print(f"\n{name}: {len(replays)} replays of {milliseconds:.2f} ms")
        print_table(["", "a pass", "us", "this thread", "others", "wait", "GB/s"], rows_of(replays))


def rows_of(replays: list[list[list[int]]]) -> list[list[object]]:
    """Return a row for each kind of phase, the longest first."""
    totals: dict[str, list[float]] = {}
    for replay in replays:
        ended = replay[0][BEGIN]
        for kind, parts, bits, n, k, begin, end, caller, others in replay:
            matmul = f" of {n} x {k}, {bits} bits" if bits else ""
            name = f"{load.PHASE_KINDS[kind]}{matmul}{'' if parts > 1 else ', alone'}"
            # Twins have 4 bytes of scale and zero-point for each 64 weights.
            read = n * k * (bits / 8 + (4 / 64 if bits == 4 else 0))
            row = (1, end - begin, caller, others, begin - ended, read)
            totals[name] = [a + b for a, b in zip(totals.get(name, [0.0] * 6), row, strict=True)]
            ended = end
    rows: list[list[object]] = []
    for name, (count, span, *thread_times, read) in sorted(totals.items(), key=lambda item: -item[1][1]):
        times = [span, *thread_times]
        rate = read / span if read else "-"
        rows.append([name, round(count / len(replays)), *(time / len(replays) / 1e3 for time in times), rate])
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = command_line(__doc__, "model", "threads")
    parser.add_argument("--depth", type=int, default=0, help="exit depth of every token (default 0: all twins)")
    parser.add_argument("--own-loop", action="store_true", help="the loop is decode")
    parser.add_argument("--phases", action="store_true", help="time the phases of the C++ kernels, in exact mode")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    model, tokenizer = demo_models.load(options.model)
    ids = shared.encode(tokenizer, PROMPT)
    if options.phases:
        phases(model, ids)
        return 0
    model.compile(backend=river)
    marks = Marks()
    loop = {"custom_generate": decode} if options.own_loop else {}
    with torch.no_grad(), forced_depth(options.depth):
        timing.generate(model, ids, NEW_TOKENS, **loop)
        with marked(model, marks):
            timing.generate(model, ids, NEW_TOKENS, **loop)
            marks.times.clear()
            with on_step(marks.step):
                for _ in range(2):
                    timing.generate(model, ids, NEW_TOKENS, **loop)
    show(marks)
    return 0


def show(marks: Marks) -> None:
    """Print the median microseconds of each part of a token."""
    stages: dict[str, list[float]] = {}
    for (name, start), (following, end) in itertools.pairwise(marks.times):
        if (name, following) in STAGES:
            stages.setdefault(STAGES[name, following], []).append(end - start)
    tokens = len(marks.steps)
    often = [name for name in STAGES.values() if len(stages.get(name, [])) > tokens / 2]  # (more than a prompt's)
    rows: list[list[object]] = [[name, statistics.median(stages[name]) * 1e6] for name in often]
    outside = [end - seconds - before for (before, _), (end, seconds) in itertools.pairwise(marks.steps)]
    rows.append(["executor", statistics.median(seconds for _, seconds in marks.steps) * 1e6])
    rows.append(["outside the executor", statistics.median(outside) * 1e6])
    print_table(["", "us"], rows)


if __name__ == "__main__":
    sys.exit(main())
