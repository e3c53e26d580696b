"""Times 4-bit products on this CPU: `benchmarks.kernels --device cpu` prints what this module measures.

Every product reads weights that no cache holds, and its rate counts those bytes: packed weights, scales and zeros.
Beside it stands the rate at which torch sums the same bytes on the same threads. Subjects take turns and the least time
of each counts, so that a busy neighbour costs repeats rather than figures.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from river_compile.kernels.native import load
from river_compile.kernels.quant.grid import quantize
from river_compile.kernels.quant.layouts import PackedLinear, layout, pack

SHAPES = ((4096, 4096), (3072, 576), (1536, 8960))
ROWS = (1, 4, 8, 16)
BYTES = 600 * 2**20  # of copies that take turns
RUN_BYTES = 8 * 2**20  # of the calls that are timed as one: a millisecond, so that few runs are interrupted

Call = Callable[[], object]


@dataclass(frozen=True)
class CpuTiming:
    """Least seconds of one call; `sum_seconds` of reading the same bytes by a plain sum."""

    kernel: str
    out_features: int
    in_features: int
    rows: int
    threads: int
    bytes: int
    seconds: float
    sum_seconds: float


def measure(group_size: int, threads: Sequence[int], repeats: int) -> list[CpuTiming]:
    """Times ATen's product and the C++ kernels for all shapes, rows and numbers of threads."""
    load.load()
    before, timings = torch.get_num_threads(), []
    for n, k in SHAPES:
        grid = quantize(torch.randn(n, k), group_size, "rtn")
        packed = {name: pack(grid, name) for name in ("aten_cpu", "native")}
        bytes_read = sum(t.numel() * t.element_size() for t in (packed["native"].qweight, packed["native"].scale_zero))
        copies = {name: _copies(one, BYTES // bytes_read) for name, one in packed.items()}
        run = max(1, RUN_BYTES // bytes_read)
        for count in threads:
            torch.set_num_threads(count)
            seconds = _least(dict(_subjects(copies, k)), run, repeats)
            for (kernel, rows), best in seconds.items():
                if rows:
                    timings.append(CpuTiming(kernel, n, k, rows, count, bytes_read, best, seconds["sum", 0]))
    torch.set_num_threads(before)
    return timings


def _subjects(copies: dict[str, list[PackedLinear]], k: int) -> Iterator[tuple[tuple[str, int], list[Call]]]:
    """Yields (kernel, rows) and the calls of one subject; the plain sum has no rows."""
    yield ("sum", 0), [functools.partial(_sum, one.qweight, one.scale_zero) for one in copies["native"]]
    for rows in ROWS:
        x = torch.randn(rows, k).bfloat16()
        yield (
            ("ATen int4", rows),
            [functools.partial(layout("aten_cpu").linear, x, p, None) for p in copies["aten_cpu"]],
        )
        yield ("native W4A8", rows), [functools.partial(_native, x, p) for p in copies["native"]]


def _native(x: torch.Tensor, p: PackedLinear) -> torch.Tensor:
    linear = torch.ops.river_native.linear.default
    return linear(x, p.qweight, p.scale_zero, None, p.out_features, p.group_size)


def _sum(qweight: torch.Tensor, scale_zero: torch.Tensor) -> None:
    qweight.view(-1).view(torch.int64).sum()
    scale_zero.view(-1).view(torch.int64).sum()


def _copies(packed: PackedLinear, count: int) -> list[PackedLinear]:
    sizes = packed.group_size, packed.in_features, packed.out_features
    return [
        PackedLinear(packed.layout, packed.qweight.clone(), packed.scale_zero.clone(), *sizes) for _ in range(count)
    ]


def _least(subjects: dict[tuple[str, int], list[Call]], run: int, repeats: int) -> dict[tuple[str, int], float]:
    best = dict.fromkeys(subjects, float("inf"))
    with torch.inference_mode():
        for repeat in range(repeats):
            for subject, calls in subjects.items():
                first = repeat * run % (len(calls) - run + 1)
                start = time.perf_counter()
                for call in calls[first : first + run]:
                    call()
                best[subject] = min(best[subject], (time.perf_counter() - start) / run)
    return best


def print_table(timings: list[CpuTiming]) -> None:
    """Prints one line for each kernel, shape and number of threads; its rows stand side by side."""
    heads = " | ".join(f"{rows} row{'s' * (rows > 1)}, us" for rows in ROWS)
    print(f"| kernel | shape | threads | {heads} | GB/s, 1 row | of a sum | 4 rows / 1 |")
    print("|---|---|---:|" + "---:|" * (len(ROWS) + 3))
    lines: dict[tuple[str, int, int, int], dict[int, CpuTiming]] = {}
    for t in timings:
        lines.setdefault((t.kernel, t.out_features, t.in_features, t.threads), {})[t.rows] = t
    for (kernel, n, k, threads), by_rows in lines.items():
        one, times = by_rows[1], " | ".join(f"{by_rows[rows].seconds * 1e6:.0f}" for rows in ROWS)
        rate = f"{one.bytes / one.seconds / 1e9:.1f} | {one.sum_seconds / one.seconds:.0%}"
        print(f"| {kernel} | {n} x {k} | {threads} | {times} | {rate} | {by_rows[4].seconds / one.seconds:.2f} |")
