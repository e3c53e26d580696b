"""What the host does for one captured decode step, from the graph's call to its result; needs no GPU.

    python -m benchmarks.step_cost [--layers 32] [--repeats 400]

A random Llama with that many small blocks is captured by the recorder, which then launches nothing and copies nothing
of its own: what is left are the microseconds of the package between Dynamo's guards and the next launch, for a token
that leaves at depth 0 and one that never leaves. Addresses are compared one by one here; a torch that is built for
CUDA compares all of a unit in one call ("addresses" says how much of the time that is).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from benchmarks import common
from benchmarks.random_llama import random_llama
from river_compile import river
from river_compile.capture import capture_cache
from river_compile.exits import forced_depth
from river_compile.runtime.executor import on_step
from river_compile.upstream.transformers import cache_argument
from tools.kernels.shapes import ModelShape
from tools.recorder import recording

_WARM_UP, _PROMPT = 8, 4
_OPTIONS = {"cudagraphs": True, "lowering": "eager", "quantizer": "rtn", "group_size": 32}


def measure(model: PreTrainedModel, depth: int, repeats: int) -> dict[str, float]:
    """Returns the median microseconds of a step with a forced depth, and those of comparing addresses."""
    cache = StaticCache(config=model.config, max_cache_len=_PROMPT + _WARM_UP + repeats)
    held = {cache_argument(model): cache, "use_cache": True}
    seconds: list[float] = []
    compared: list[float] = []

    def step(position: int) -> None:
        model(input_ids=torch.ones(1, 1, dtype=torch.long), position_ids=torch.tensor([[position]]), **held)

    def note(executor, args, record) -> None:
        seconds.append(record.seconds)
        for name in ("launch", "begin", "settle", "end"):
            setattr(executor.runner.device, name, lambda *given: None)

    with recording(), torch.no_grad(), forced_depth(depth):
        model(input_ids=torch.ones(1, _PROMPT, dtype=torch.long), **held)
        for i in range(_WARM_UP):
            step(_PROMPT + i)
        with on_step(note), _timed(compared):
            for i in range(repeats):
                step(_PROMPT + _WARM_UP + i)
    # (The first one still launched.)
    each = sum(compared[len(compared) // repeats :]) / (repeats - 1)
    return {"us": statistics.median(seconds[1:]) * 1e6, "addresses_us": each * 1e6}


@contextmanager
def _timed(seconds: list[float]) -> Iterator[None]:
    """Inside, notes the seconds of every comparison of addresses."""
    compare = capture_cache.lie_at

    def timed(tensors: list[Tensor], addresses: list[int]) -> bool:
        start = time.perf_counter()
        same = compare(tensors, addresses)
        seconds.append(time.perf_counter() - start)
        return same

    capture_cache.lie_at = timed
    try:
        yield
    finally:
        capture_cache.lie_at = compare


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = common.command_line(__doc__, "json")
    parser.add_argument("--layers", type=common.number(1), default=32, help="blocks (%(default)s)")
    parser.add_argument("--repeats", type=common.number(2), default=400, help="steps (%(default)s)")
    options: argparse.Namespace = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = {}
    for name, depth in (("depth 0", 0), ("never", options.layers)):
        torch._dynamo.reset()
        model = random_llama(ModelShape("", options.layers, 64, 2, 1, 32, 128, 256))
        model.compile(backend=river, options=_OPTIONS)
        rows[name] = measure(model, depth, options.repeats)
    print(f"{options.layers} blocks, microseconds of the host per token\n")
    common.print_table(["", "in all", "addresses"], [[n, row["us"], row["addresses_us"]] for n, row in rows.items()])
    common.write_outcome({"layers": options.layers, "rows": rows}, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
