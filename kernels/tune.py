"""Measures tiles on the GPU at hand and saves the best ones, for the heuristic to look up first.

    python -m river_compile.kernels.tune --model llama-3.1-8b [--rows 1] [--group-size 64] [--budget 60] [--top 8]

For every linear kernel of the model the cost model's best candidates are timed, within a time budget in seconds for all
of them together. Choices of other devices and shapes in the file are kept; the file is replaced atomically.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from river_compile.kernels.heuristic import DEFAULT_DEVICE, DEVICES, candidates, saved_tiles, seconds, tuning_file
from river_compile.kernels.heuristic import tuning_key as key_of
from river_compile.kernels.launch import device_name
from river_compile.kernels.linear import LinearSpec, LinearTile
from river_compile.kernels.loader import load
from river_compile.kernels.models import MODELS, model_kernels


def shortlist(spec: LinearSpec, device: str, top: int) -> list[LinearSpec]:
    """Returns the `top` candidates that the cost model likes best, best first."""
    model = DEVICES.get(device, DEVICES[DEFAULT_DEVICE])
    return sorted(candidates(spec), key=lambda candidate: seconds(candidate, model))[:top]


def tune(
    specs: list[LinearSpec], device: str, measure: Callable[[LinearSpec], float], *, budget: float, top: int
) -> dict[str, LinearTile]:
    """Times candidates of every spec and returns key -> fastest tile.

    Args:
        specs: the problems.
        device: for the cost model's order.
        measure: seconds of one call of a spec.
        budget: seconds; once they are spent, the specs that are left stay with the cost model.
        top: candidates of each spec.
    """
    end, chosen = time.monotonic() + budget, {}
    for spec in specs:
        times = {}
        for candidate in shortlist(spec, device, top):
            if time.monotonic() >= end:
                return chosen
            times[candidate.tile] = measure(candidate)
        chosen[key_of(spec)] = min(times, key=times.get)
    return chosen


def save(path: Path, device: str, tiles: dict[str, LinearTile]) -> None:
    """Adds a device's tiles to a tuning file, replacing it atomically."""
    merged = {name: dict(known) for name, known in saved_tiles(path).items()}
    merged.setdefault(device, {}).update(tiles)
    plain = {name: {key: dataclasses.asdict(t) for key, t in sorted(ts.items())} for name, ts in merged.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(handle, "w") as file:
        json.dump(plain, file, indent=1)
    os.replace(temporary, path)


def measure_on_gpu(spec: LinearSpec, repeats: int = 50) -> float:
    """Returns the seconds of one call of a linear kernel, the median of `repeats`, with weights that miss the cache.

    Random bits serve as weights: the time does not depend on them.
    """
    buffers = [random_buffers(spec) for _ in range(copies_beyond_cache(spec))]
    kernel = load(spec, interpret=False)
    for buffer in buffers:
        kernel(rows=spec.rows or 64, **buffer)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for i, (start, stop) in enumerate(events):
        start.record()
        kernel(rows=spec.rows or 64, **buffers[i % len(buffers)])
        stop.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(stop) for start, stop in events)[repeats // 2] / 1e3


def copies_beyond_cache(spec: LinearSpec) -> int:
    """Returns how many copies of the weights exceed 256 MB, so that a cache holds none of them until its turn."""
    return max(1, min(64, 256 * 2**20 // spec.cost(64).bytes + 1))


def random_buffers(spec: LinearSpec) -> dict[str, torch.Tensor]:
    """Allocates every buffer of a linear spec on the GPU, for `spec.rows` or 64 rows."""
    rows, rows_of_w = spec.rows or 64, spec.out_features * len(spec.streams)
    words = spec.groups * spec.group_words if spec.weights == "w4" else 0
    shapes = {
        "x": (rows, spec.row_stride),
        "norm_weight": (spec.in_features,),
        "norm_bias": (spec.in_features,),
        "bias": (rows_of_w,),
        "residual": (rows, spec.out_features),
        "y": (rows, spec.out_features),
        "weight": (rows_of_w, spec.in_features),
        "qweight": (rows_of_w, words),
        "scale_zero": (rows_of_w, spec.groups if words else 0),
    }
    buffers = {}
    for argument in (*spec.inputs(), *spec.epilogue_buffers()):
        dtype = getattr(torch, argument.dtype)
        if dtype.is_floating_point:
            buffers[argument.name] = torch.randn(shapes[argument.name], device="cuda", dtype=dtype)
        else:
            high = 2**31 - 1 if argument.name == "qweight" else 1  # scales of 0: no overflow, the same time
            buffers[argument.name] = torch.randint(0, high, shapes[argument.name], device="cuda", dtype=dtype)
    return buffers


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns 1 where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m river_compile.kernels.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="llama-3.1-8b", help="whose shapes (default %(default)s)")
    parser.add_argument("--rows", type=int, default=1, help="sequences (default %(default)s)")
    parser.add_argument("--group-size", type=int, default=64, choices=(32, 64, 128), help="default %(default)s")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds for everything (default %(default)s)")
    parser.add_argument("--top", type=int, default=8, help="candidates of each kernel (default %(default)s)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("tuning measures on a GPU and there is none here", file=sys.stderr)
        return 1
    device = device_name(torch.cuda.current_device())
    kernels = model_kernels(MODELS[options.model], rows=options.rows, group_size=options.group_size)
    specs = [spec for spec in kernels.values() if isinstance(spec, LinearSpec)]
    tiles = tune(specs, device, measure_on_gpu, budget=options.budget, top=options.top)
    save(tuning_file(), device, tiles)
    print(f"{len(tiles)} of {len(specs)} kernels tuned for {device}, saved to {tuning_file()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
