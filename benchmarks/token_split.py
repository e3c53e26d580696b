"""Where the time of one decoded token goes on a CPU: kernels, glue, guards, the sampling loop.

    python -m benchmarks.token_split
    python -m benchmarks.token_split --model DIR --depth 2

Generates once to compile, takes the arguments of the last decode step and repeats its parts alone. Times are the least
and the median over many repeats: the least is what the code costs, the median what a busy machine makes of it. Parts
run alone find their weights in the cache more often than a whole token does, so they add up to a little less than it.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from river_compile import river
from river_compile.runtime.executor import RiverExecutor, forced_depth
from tools import models, timing

PROMPT = "Explain how a refrigerator works."
NEW_TOKENS = 48


@dataclass
class Recorder:
    """Wraps an executor's call: keeps the last decode step's executor and arguments, and every step's seconds."""

    executor: RiverExecutor | None = None
    arguments: tuple = ()
    seconds: list[float] = field(default_factory=list)

    def install(self) -> None:
        run = RiverExecutor.__call__

        def call(executor: RiverExecutor, *arguments: object) -> tuple:
            start = time.perf_counter()
            result = run(executor, *arguments)
            self.executor, self.arguments = executor, arguments
            self.seconds.append(time.perf_counter() - start)
            return result

        RiverExecutor.__call__ = call


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model folder; SmolLM2-135M-Instruct where it is left out")
    parser.add_argument("--depth", type=int, default=0, help="exit depth of every token (default 0: all twins)")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    model, tokenizer = models.load(options.model or "smollm2")
    recorder = Recorder()
    recorder.install()
    model.compile(backend=river)
    with torch.no_grad(), forced_depth(options.depth):
        tokens = _token_seconds(model, tokenizer)
        for name, seconds in _parts(recorder, options.depth, tokens).items():
            low, median = min(seconds) * 1e6, statistics.median(seconds) * 1e6
            print(f"{name:<44} {low:>9.1f} us   median {median:>9.1f} us")
    return 0


def _token_seconds(model, tokenizer) -> list[float]:
    """Generates three times and returns the seconds of each token of the last two runs."""
    ids = models.encode(tokenizer, PROMPT)
    runs = [timing.generate(model, ids, NEW_TOKENS) for _ in range(3)]
    return [b - a for run in runs[1:] for a, b in itertools.pairwise(run.times)]


def _parts(recorder: Recorder, depth: int, tokens: list[float]) -> dict[str, list[float]]:
    executor, arguments = recorder.executor, recorder.arguments
    steps = recorder.seconds[-len(tokens) :]
    registers = [*arguments, *[None] * (executor.size - len(arguments))]
    lengths = [a for a in arguments if isinstance(a, torch.Tensor) and a.dim() == 0 and a.dtype == torch.int64]
    filled = [int(length) - 1 for length in lengths]

    def rewound(step: Callable) -> Callable:
        def run() -> None:
            for length, value in zip(lengths, filled, strict=True):
                length.fill_(value)
            step(registers)

        return run

    for step in (executor.prologue, *executor.blocks[:depth], *executor.twins[depth:]):
        rewound(step)()  # fills the registers that the parts read
    block = executor.blocks[depth - 1] if depth else None
    twin = executor.twins[depth] if depth < len(executor.twins) else None
    parts = {"whole token, in generate": tokens, "the executor's call": steps}
    parts["rewinding the counters (in the next two)"] = _repeat(rewound(lambda registers: None))
    if block:
        parts[block.name] = _repeat(rewound(block))
    if twin:
        parts[twin.name] = _repeat(rewound(twin))
    head = executor.river_head if twin else executor.head
    parts[head.name] = _repeat(lambda: head(registers))
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
