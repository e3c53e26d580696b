"""Where the time of a token is spent on a CPU, in exact mode: each kind of phase of the C++ kernels, by kind of pass.

    python -m benchmarks.token_split --model DIR

Every phase of the tapes reads a clock around each of its parts. Rows are the phases of each kind of pass (a draft step,
a verification by its tokens): how many a pass has, their microseconds, how long this thread and the others ran parts in
them, the wait before, and the rate at which a matmul reads its weights (a draft's head: those of all words). What a
token costs outside of the passes is a column of `benchmarks.decode`.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import command_line, print_table
from river_compile import accelerate
from river_compile.cli import shared
from river_compile.decoding.passes import Passes
from river_compile.kernels.native import load
from river_compile.reporting import timing
from tools import demo_models

PROMPT = "Explain how a refrigerator works."
NEW_TOKENS = 64
BEGIN, END = load.PHASE_COLUMNS.index("begin"), load.PHASE_COLUMNS.index("end")


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
    """Run the command line and return the exit status."""
    options = command_line(__doc__, "model", "threads").parse_args(arguments)
    torch.set_num_threads(options.threads)
    model, tokenizer = demo_models.load(options.model)
    phases(model, shared.encode(tokenizer, PROMPT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
