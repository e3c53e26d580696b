"""Measures tiles on the GPU at hand and saves the best ones, which are looked up before any other.

    python -m tools.kernels.tune --model llama-3.1-8b [--rows 1] [--group-size 64] [--budget 60] [--top 8]
    python -m tools.kernels.tune --shipped      # writes the package's own table, by the cost model and without a GPU

The cost model's best candidates of every linear kernel are timed, within one budget in seconds. Each choice is saved as
soon as it is made, next to those of other devices, versions of Triton and shapes.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from river_compile.kernels.files import atomic_write
from river_compile.kernels.triton.linear import LinearSpec
from river_compile.kernels.triton.loader import device_name, load
from river_compile.kernels.triton.spec import KernelSpec
from river_compile.kernels.triton.tiles import SHIPPED, Shape, form_key, read_table, tuning_file, tuning_key

from .cost_model import rows_of
from .devices import known
from .search import candidates, cost
from .shapes import MODELS, model_kernels
from .shipped import shipped_table, text_of


def shortlist(spec: LinearSpec, device: str, top: int) -> list[LinearSpec]:
    """Return the `top` candidates that the cost model likes best, best first."""
    known_device = known(device)
    return sorted(candidates(spec, known_device), key=lambda candidate: cost(candidate, known_device))[:top]


def tune(
    specs: list[LinearSpec],
    device: str,
    measure: Callable[[LinearSpec], float],
    *,
    budget: float,
    top: int,
    keep: Callable[[LinearSpec], object] = lambda spec: None,
) -> list[LinearSpec]:
    """Time the `top` candidates of every spec by `measure`, in seconds, and return the fastest ones.

    A candidate that cannot be compiled or launched is left out, and a spec of which none can stays with the shipped
    tile, as do those that are left once `budget` seconds are spent. `keep` is called with each choice as soon as it is
    made.
    """
    end = time.monotonic() + budget
    chosen: list[LinearSpec] = []
    for spec in specs:
        times = {}
        for candidate in shortlist(spec, device, top):
            if time.monotonic() >= end:
                return chosen
            seconds = _measured(measure, candidate)
            if seconds is not None:
                times[candidate] = seconds
        if times:
            chosen.append(min(times, key=lambda candidate: times[candidate]))
            keep(chosen[-1])
    return chosen


def _measured(measure: Callable[[LinearSpec], float], candidate: LinearSpec) -> float | None:
    """Return a candidate's seconds, None where it failed, which is said."""
    try:
        return measure(candidate)
    except Exception as error:  # of Triton's compiler, ptxas or the driver, which have no class in common
        print(f"left out {_name(candidate)} with {candidate.tile}: {first_line(error)}", file=sys.stderr)
        return None


def _name(spec: LinearSpec) -> str:
    return f"{form_key(spec)}, {spec.out_features} x {spec.in_features}"


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, its class's name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def save(path: Path, device: str, specs: Sequence[LinearSpec]) -> None:
    """Add the tiles of specs, measured on a device with this Triton, to a tuning file, replacing it atomically."""
    merged = {name: {form: dict(tiles) for form, tiles in of.items()} for name, of in read_table(path).items()}
    forms = merged.setdefault(tuning_key(device), {})
    for spec in specs:
        shape: Shape = spec.out_features, spec.in_features
        forms.setdefault(form_key(spec), {})[shape] = dataclasses.astuple(spec.tile)
    with atomic_write(path) as scratch:
        scratch.write_text(text_of(merged), encoding="utf-8")


def measure_on_gpu(spec: LinearSpec) -> float:
    """Return the seconds of one call of a linear kernel whose weights come from memory, not from a cache.

    Random bits serve as weights: the time does not depend on them.
    """
    kernel = load(spec, interpret=False)
    copies = [random_buffers(spec) for _ in range(copies_beyond_cache(spec))]
    return time_calls([functools.partial(kernel, rows=rows_of(spec), **buffers) for buffers in copies])


def time_calls(calls: list[Callable[[], object]], repeats: int = 9) -> float:
    """Return the mean GPU seconds of one call, the median over replays of a graph that holds all of them.

    A graph keeps the host's launch overhead out of the time; the calls should use different memory.
    """
    for call in calls[:2]:  # compiles, and allocates what stays allocated
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return sorted(times)[repeats // 2] / len(calls)


def copies_beyond_cache(spec: KernelSpec) -> int:
    """Return how many copies of what a call reads exceed 256 MB, so that a cache keeps none of them until its turn."""
    return max(1, min(64, 256 * 2**20 // spec.cost(64).bytes + 1))


def random_buffers(spec: LinearSpec) -> dict[str, torch.Tensor]:
    """Allocates every buffer of a linear spec on the GPU, for the rows that it counts with."""
    buffers = {}
    for name, buffer in spec.buffers(rows_of(spec)).items():
        dtype, shape = getattr(torch, buffer.dtype), buffer.shape
        if dtype.is_floating_point:
            buffers[name] = torch.randn(shape, device="cuda", dtype=dtype)
        elif name == "expert":  # each row another one, as a router chooses
            buffers[name] = torch.arange(shape[0], device="cuda") % spec.experts
        else:
            high = 2**31 - 1 if name == "qweight" else 1  # scales of 0: no overflow, the same time
            buffers[name] = torch.randint(0, high, shape, device="cuda", dtype=dtype)
    return buffers


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 where there is no GPU, or a kernel was not tuned."""
    parser = argparse.ArgumentParser(prog="python -m tools.kernels.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="llama-3.1-8b", help="whose shapes (default %(default)s)")
    parser.add_argument("--rows", type=int, default=1, help="sequences (default %(default)s)")
    parser.add_argument("--group-size", type=int, default=64, choices=(32, 64, 128), help="default %(default)s")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds for everything (default %(default)s)")
    parser.add_argument("--top", type=int, default=8, help="candidates of each kernel (default %(default)s)")
    parser.add_argument("--shipped", action="store_true", help="write the package's table by the cost model instead")
    options = parser.parse_args(arguments)
    if options.shipped:
        SHIPPED.write_text(text_of(shipped_table()), encoding="utf-8")
        return 0
    if not torch.cuda.is_available():
        print("tuning measures on a GPU and there is none here", file=sys.stderr)
        return 1
    device = device_name(torch.cuda.current_device())
    sizes = {"rows": options.rows, "group_size": options.group_size}
    kernels = model_kernels(MODELS[options.model], **sizes)
    specs = [spec for spec in kernels.values() if isinstance(spec, LinearSpec)]

    def keep(spec: LinearSpec) -> None:
        save(tuning_file(), device, [spec])
        print(f"{_name(spec)}: {spec.tile}", flush=True)

    tiles = tune(specs, device, measure_on_gpu, budget=options.budget, top=options.top, keep=keep)
    print(f"{len(tiles)} of {len(specs)} kernels tuned for {device}, saved to {tuning_file()}")
    return int(len(tiles) < len(specs))


if __name__ == "__main__":
    sys.exit(main())
