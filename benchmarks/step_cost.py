"""What the host does for one captured decode step of a session, from its inputs to its result; needs no GPU.

    python -m benchmarks.step_cost [--layers 32] [--repeats 400]

A random Llama with that many small blocks generates, captured by the recorder, which then launches nothing and copies
nothing of its own: what is left are the microseconds of the package between `generate`'s loop and the next launch, for
a token that leaves at depth 0, one that never leaves, and one that is asked at each block and stays. "comparisons"
says how many units a step compares the addresses of.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys

import torch
from transformers import PreTrainedModel

import river_compile
from benchmarks import common
from benchmarks.random_llama import random_llama
from river_compile.capture import capture_cache
from river_compile.exits import forced_depth
from river_compile.runtime.executor import on_step
from tools.kernels.shapes import ModelShape
from tools.recorder import recording

_PROMPT = 4
_OPTIONS = {"lowering": "eager", "quantizer": "rtn", "group_size": 32, "threshold": 2.0, "first_exit": 1}
_OPTIONS["cudagraphs"] = True


def measure(model: PreTrainedModel, repeats: int) -> dict[str, float]:
    """Returns the median microseconds of a step of an accelerated model, and the comparisons of addresses in one."""
    ids = torch.ones(1, _PROMPT, dtype=torch.long)
    settings = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    seconds: list[float] = []
    compared = 0
    compare = capture_cache.lie_at

    def counting(*given) -> bool:
        nonlocal compared
        compared += 1
        return compare(*given)

    def note(executor, args, record) -> None:
        if record.decode:
            seconds.append(record.seconds)

    def silence(executor, args, record) -> None:
        if record.decode:
            device = executor.runner.device
            device.replayer = lambda graph, slots: lambda: None
            for name in ("begin", "run", "settle", "wait", "end"):
                setattr(device, name, lambda *given: None)

    tokens = {"min_new_tokens": repeats, "max_new_tokens": repeats}
    model.generate(ids, **settings, **tokens)  # (captures)
    with on_step(silence):
        model.generate(ids, **settings, max_new_tokens=2)
    capture_cache.lie_at = counting
    try:
        with on_step(note):
            model.generate(ids, **settings, **tokens)
    finally:
        capture_cache.lie_at = compare
    return {"us": statistics.median(seconds) * 1e6, "comparisons": compared / len(seconds)}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = common.command_line(__doc__, "json")
    parser.add_argument("--layers", type=common.number(1), default=32, help="blocks (%(default)s)")
    parser.add_argument("--repeats", type=common.number(2), default=400, help="steps (%(default)s)")
    options: argparse.Namespace = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = {}
    for name, depth in (("depth 0", 0), ("never", options.layers), ("asked at each block", None)):
        torch._dynamo.reset()
        model = random_llama(ModelShape("", options.layers, 64, 2, 1, 32, 128, 256))
        river_compile.accelerate(model, "fast", store=False, **_OPTIONS)
        with recording(), contextlib.nullcontext() if depth is None else forced_depth(depth):
            rows[name] = measure(model, options.repeats)
    print(f"{options.layers} blocks, microseconds of the host per token\n")
    cells = [[name, row["us"], row["comparisons"]] for name, row in rows.items()]
    common.print_table(["", "in all", "comparisons"], cells)
    common.write_outcome({"layers": options.layers, "rows": rows}, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
