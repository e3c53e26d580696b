"""What the host does for one captured decode step of a session, from its inputs to its result; needs no GPU.

    python -m benchmarks.step_cost [--layers 32] [--repeats 400]

A random Llama with that many small blocks generates, captured by the recorder, which then launches nothing and copies
nothing. The rest is the time of the package between `generate`'s loop and the next launch. Rows: a token that exits at
depth 0, one at full depth, and one that is checked at each block and does not exit.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

import river_compile
from benchmarks import common
from benchmarks.random_llama import random_llama
from river_compile.exits import forced_depth
from river_compile.runtime.state import on_step
from river_compile.runtime.stats import StepRecord
from tools.kernels.shapes import ModelShape
from tools.recorder import Recorder, recording

_PROMPT = 4
_OPTIONS = {"kernels": "eager", "quantizer": "rtn", "group_size": 32, "threshold": 2.0, "first_exit": 1}
_OPTIONS["graphs"] = True


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Inside, recorders launch nothing and copy nothing."""
    names = ("begin", "run", "launch", "wait", "end")
    methods = {name: getattr(Recorder, name) for name in names}
    for name in names:
        setattr(Recorder, name, lambda *given: None)
    try:
        yield
    finally:
        for name, method in methods.items():
            setattr(Recorder, name, method)


def measure(model: PreTrainedModel, repeats: int) -> dict[str, float]:
    """Return the median microseconds of a step of an accelerated model."""
    ids = torch.ones(1, _PROMPT, dtype=torch.long)
    settings = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    seconds: list[float] = []

    def note(state: object, record: StepRecord) -> None:
        if record.decode:
            seconds.append(record.seconds)

    tokens = {"min_new_tokens": repeats, "max_new_tokens": repeats}
    for _ in range(2):  # (captures)
        model.generate(ids, **settings, **tokens)
    with silent(), on_step(note):
        model.generate(ids, **settings, **tokens)
    return {"us": statistics.median(seconds) * 1e6}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = common.command_line(__doc__, "json")
    parser.add_argument("--layers", type=common.number(1), default=32, help="blocks (%(default)s)")
    parser.add_argument("--repeats", type=common.number(2), default=400, help="steps (%(default)s)")
    options: argparse.Namespace = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = {}
    for name, depth in (("depth 0", 0), ("never", options.layers), ("asked at each block", None)):
        torch._dynamo.reset()
        model = random_llama(ModelShape("", options.layers, 64, 2, 1, 32, 128, 256))
        river_compile.accelerate(model, "fast", compile_cache=False, **_OPTIONS)
        with recording(), contextlib.nullcontext() if depth is None else forced_depth(depth):
            rows[name] = measure(model, options.repeats)
    print(f"{options.layers} blocks, microseconds of the host per token\n")
    common.print_table(["", "in all"], [[name, row["us"]] for name, row in rows.items()])
    common.write_outcome({"layers": options.layers, "rows": rows}, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
