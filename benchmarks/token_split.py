"""Where the time of one decoded token goes on a CPU: kernels, glue, guards, the sampling loop.

    python -m benchmarks.token_split
    python -m benchmarks.token_split --model DIR --depth 2

Generates once to compile, takes the arguments of the last decode step and repeats its parts alone. Times are the least
and the median over many repeats: the least is what the code costs, the median what a busy machine makes of it. Parts
run alone find their weights in the cache more often than a whole token does, so they add up to a little less than it.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from benchmarks.common import command_line
from river_compile import forced_depth, river
from river_compile.passes.program import Segment
from river_compile.runtime.executor import RiverExecutor, on_step
from river_compile.runtime.stats import StepRecord
from tools import models, timing

PROMPT = "Explain how a refrigerator works."
NEW_TOKENS = 48


@dataclass
class Watch:
    """Keeps the last decode step's executor and arguments, and every step's seconds."""

    executor: RiverExecutor | None = None
    arguments: tuple = ()
    seconds: list[float] = field(default_factory=list)

    def note(self, executor: RiverExecutor, arguments: tuple, step: StepRecord) -> None:
        """Notes a step."""
        self.executor, self.arguments = executor, arguments
        self.seconds.append(step.seconds)


def main(arguments: list[str] | None = None) -> int:
    parser = command_line(__doc__, "model", "threads")
    parser.add_argument("--depth", type=int, default=0, help="exit depth of every token (default 0: all twins)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    model, tokenizer = models.load(options.model)
    watch = Watch()
    model.compile(backend=river)
    with torch.no_grad(), forced_depth(options.depth), on_step(watch.note):
        tokens = _token_seconds(model, tokenizer)
        for name, seconds in _parts(watch, options.depth, tokens).items():
            low, median = min(seconds) * 1e6, statistics.median(seconds) * 1e6
            print(f"{name:<44} {low:>9.1f} us   median {median:>9.1f} us")
    return 0


def _token_seconds(model, tokenizer) -> list[float]:
    """Generates three times and returns the seconds of each token of the last two runs."""
    ids = models.encode(tokenizer, PROMPT)
    runs = [timing.generate(model, ids, NEW_TOKENS) for _ in range(3)]
    return [b - a for run in runs[1:] for a, b in itertools.pairwise(run.times)]


def _parts(watch: Watch, depth: int, tokens: list[float]) -> dict[str, list[float]]:
    executor, arguments = watch.executor, watch.arguments
    program, steps = executor.program, executor.runner.steps
    lengths = [a for a in arguments if isinstance(a, torch.Tensor) and a.dim() == 0 and a.dtype == torch.int64]
    filled = [int(length) - 1 for length in lengths]

    def rewind() -> None:
        for length, value in zip(lengths, filled, strict=True):
            length.fill_(value)

    def rewound(segment: Segment) -> Callable[[], None]:
        def run() -> None:
            rewind()
            steps[segment](slots)

        return run

    rewind()
    slots = executor.runner.begin(arguments)
    block = program.blocks[depth - 1] if depth else None
    twin = program.twins[depth] if depth < len(program.twins) else None
    head = program.head if twin is None or program.river_head is None else program.river_head
    for segment in (*program.blocks[:depth], *program.twins[depth:]):
        rewound(segment)()  # fills the slots that the parts read
    parts = {"whole token, in generate": tokens, "the executor's call": watch.seconds[-len(tokens) :]}
    parts["rewinding the counters (in the next two)"] = _repeat(rewind)
    for segment in filter(None, (block, twin)):
        parts[segment.name] = _repeat(rewound(segment))
    parts[head.name] = _repeat(lambda: steps[head](slots))
    return parts


def _repeat(step: Callable[[], None], times: int = 400) -> list[float]:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
