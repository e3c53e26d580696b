"""Runs one program on a card that is not there (`tools.rehearsal.card`), at sizes that this takes.

    python -m tools.rehearsal benchmarks.kernels --model llama-3.1-8b

Models keep their names and get a few small blocks; repeats are fewer. Not handled: modules without a `main`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import sys

from tools.kernels import tune
from tools.kernels.shapes import MODELS
from tools.rehearsal import card

LAYERS = 4  # one more than the largest exit depth that is rehearsed
#: Arguments that make a program small; later options win.
SMALLER = {
    "benchmarks.kernels": ("--context", "64"),
    "tools.kernels.tune": ("--top", "2", "--budget", "1e6"),
    "benchmarks.decode": ("--new-tokens", "6", "--repeats", "1", "--of-each", "1", "--contexts", "32"),
    "pytest": ("-n", "0", "--timeout", "0", "-p", "tools.rehearsal.left_out"),
}


def shrink() -> None:
    """Make models and repeats small in this process, and have workers of benchmarks rehearse too."""
    small = {"layers": LAYERS, "hidden": 128, "heads": 4, "kv_heads": 2, "head_dim": 32, "vocabulary": 256}
    for name, shape in MODELS.items():
        experts = {"experts": min(shape.experts, 4), "chosen": min(shape.chosen, 2)}
        MODELS[name] = dataclasses.replace(shape, **small, **experts, intermediate=128 if shape.experts else 256)
    tune.time_calls = functools.partial(tune.time_calls, repeats=2)
    tune.copies_beyond_cache = lambda spec: 2
    os.environ["RIVER_BENCHMARK_RUNNER"] = "-m tools.rehearsal"


def main(arguments: list[str]) -> int:
    """Run a module's `main` with the arguments after its name and those of `SMALLER`; return its exit status."""
    card.install()
    shrink()
    module, *arguments = arguments
    workers = "--worker" in arguments
    return importlib.import_module(module).main([*arguments, *(() if workers else SMALLER.get(module, ()))])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
