"""Runs one program of `make gpu` on a card that is not there (`tools.rehearsal.card`), at sizes that this takes.

    python -m tools.rehearsal benchmarks.kernels --model llama-3.1-8b --context 64

Models keep their names and get a few small blocks; repeats are fewer. What the program had compiled, timed and captured
is added to the file that `COUNTS` names. Not handled: modules without a `main`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import sys
from collections.abc import Callable

from tools.kernels.shapes import MODELS
from tools.rehearsal import COUNTS, card

LAYERS = 4  # one more than the largest exit depth that is rehearsed


def shrink() -> None:
    """Make models and repeats small in this process, and have its workers rehearse too."""
    small = {"layers": LAYERS, "hidden": 128, "heads": 4, "kv_heads": 2, "head_dim": 32, "vocabulary": 256}
    for name, shape in MODELS.items():
        experts = {"experts": min(shape.experts, 4), "chosen": min(shape.chosen, 2)}
        MODELS[name] = dataclasses.replace(shape, **small, **experts, intermediate=128 if shape.experts else 256)
    _set("benchmarks.common", RUNNER=("-m", "tools.rehearsal"))
    timed = importlib.import_module("tools.kernels.tune").time_calls
    _set("tools.kernels.tune", time_calls=_counting("timings", functools.partial(timed, repeats=2)))
    _set("tools.kernels.tune", copies_beyond_cache=lambda spec: 2)
    copy = importlib.import_module("benchmarks.kernels").copy_bandwidth  # (which takes the names above from `tune`)
    _set("benchmarks.kernels", copy_bandwidth=functools.partial(copy, 2**16))
    _set("benchmarks.cuda_worker", _COMPARED=4, _REPEATS=2, _UNPROFILED=1)
    _set("tools.check_gpu", _SLOTS=64)


def _set(module: str, **values: object) -> None:
    found = importlib.import_module(module)
    for name, value in values.items():
        assert hasattr(found, name), f"{module} has no {name}"
        setattr(found, name, value)


def _counting(what: str, function: Callable[..., float]) -> Callable[..., float]:
    def counted(*arguments: object, **named: object) -> float:
        card.counts[what] += 1
        return function(*arguments, **named)

    return counted


def main(arguments: list[str]) -> int:
    """Run a module's `main` with the arguments after its name; return its exit status."""
    card.install()
    shrink()
    module, *arguments = arguments
    try:
        return importlib.import_module(module).main(arguments)
    finally:
        if COUNTS in os.environ:
            with open(os.environ[COUNTS], "a", encoding="utf-8") as file:
                print(json.dumps({"module": module, **card.counts, "kernels": sorted(card.kernels)}), file=file)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
