"""Times products on this CPU, of 4-bit, bfloat16 and 12-bit weights: `benchmarks.kernels --device cpu`.

Every product reads weights that no cache holds, and its rate counts those bytes: packed weights, scales and zeros.
The next column is the rate at which torch sums bytes on the same threads. Subjects alternate and the least time of each
counts, so that a busy neighbour costs repeats rather than figures.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from river_compile.kernels.native import load
from river_compile.kernels.quant.grid import quantize
from river_compile.kernels.quant.layouts import PackedLinear, pack, pack_lossless

SHAPES = ((4096, 4096), (3072, 576), (1536, 8960))
ROWS = (1, 4, 8, 16)
BYTES = 600 * 2**20  # of copies that alternate
RUN_BYTES = 8 * 2**20  # of the calls that are timed as one: a millisecond, so that few runs are interrupted

Call = Callable[[], object]


@dataclass(frozen=True)
class CpuTiming:
    """Least seconds of one call; `sum_seconds` of reading as many bytes by a plain sum."""

    kernel: str
    out_features: int
    in_features: int
    rows: int
    threads: int
    bytes: int
    seconds: float
    sum_seconds: float


def measure(group_size: int, threads: Sequence[int], repeats: int) -> list[CpuTiming]:
    """Time ATen's product and the C++ kernels for all shapes, rows and numbers of threads."""
    load.load()
    before, timings = torch.get_num_threads(), []
    for n, k in SHAPES:
        subjects = [*_subjects(n, k, group_size)]
        for count in threads:
            torch.set_num_threads(count)
            seconds = _least(subjects, repeats)
            for subject, best in zip(subjects, seconds, strict=True):
                if subject.rows:
                    sum_seconds = seconds[0] * subject.bytes / subjects[0].bytes
                    timing = CpuTiming(subject.kernel, n, k, subject.rows, count, subject.bytes, best, sum_seconds)
                    timings.append(timing)
    torch.set_num_threads(before)
    return timings


@dataclass(frozen=True)
class _Subject:
    """Calls of one kernel, each of which reads `bytes`; the plain sum has no rows."""

    kernel: str
    rows: int
    bytes: int
    calls: list[Call]


def _subjects(n: int, k: int, group_size: int) -> Iterator[_Subject]:
    """Yield a plain sum first, and then each kernel at each number of rows."""
    weight = torch.randn(n, k) * k**-0.5
    grid, in_16_bits = quantize(weight, group_size, "rtn"), weight.bfloat16()
    ops = torch.ops.river_native
    fours = _copies(pack(grid, "native"))
    # ATen computes (q - 8) * scale + zero, as our grid does.
    table = torch.stack([grid.scale, grid.zero], -1).transpose(0, 1).to(torch.bfloat16).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(grid.q.int(), 1)
    aten = _copies(PackedLinear("ATen int4", packed, table, group_size, k, n))
    sixteens = _copies(PackedLinear("dense", in_16_bits, torch.zeros(0), 0, k, n))
    twelves = _copies(pack_lossless([in_16_bits])) if load.has_packing() else []
    yield _Subject("sum", 0, _bytes(fours[0]), [functools.partial(_sum, one.qweight, one.scale_zero) for one in fours])
    for rows in ROWS:
        x = torch.randn(rows, k).bfloat16()

        def linear(p: PackedLinear, x: torch.Tensor = x) -> Call:
            return functools.partial(ops.linear.default, x, p.qweight, p.scale_zero, None, n, p.group_size)

        product = torch.ops.aten._weight_int4pack_mm_for_cpu
        atens = [functools.partial(product, x, p.qweight, group_size, p.scale_zero) for p in aten]
        yield _Subject("ATen int4", rows, _bytes(fours[0]), atens)
        yield _Subject("native W4A8", rows, _bytes(fours[0]), [*map(linear, fours)])
        dense = [functools.partial(ops.dense.default, x, [p.qweight], []) for p in sixteens]
        yield _Subject("native bfloat16", rows, _bytes(sixteens[0]), dense)
        if twelves:  # (of whose second tensor a few patches are read, and the rest is room)
            yield _Subject("the same in 12 bits", rows, twelves[0].qweight.nbytes, [*map(linear, twelves)])


def _bytes(packed: PackedLinear) -> int:
    return packed.qweight.nbytes + packed.scale_zero.nbytes


def _sum(qweight: torch.Tensor, scale_zero: torch.Tensor) -> None:
    qweight.view(-1).view(torch.int64).sum()
    scale_zero.view(-1).view(torch.int64).sum()


def _copies(packed: PackedLinear) -> list[PackedLinear]:
    return [
        replace(packed, qweight=packed.qweight.clone(), scale_zero=packed.scale_zero.clone())
        for _ in range(max(2, BYTES // packed.qweight.nbytes))
    ]


def _least(subjects: Sequence[_Subject], repeats: int) -> list[float]:
    best = [float("inf")] * len(subjects)
    with torch.inference_mode():
        for repeat in range(repeats):
            for number, subject in enumerate(subjects):
                run = min(max(1, RUN_BYTES // subject.bytes), len(subject.calls))
                first = repeat * run % (len(subject.calls) - run + 1)
                start = time.perf_counter()
                for call in subject.calls[first : first + run]:
                    call()
                best[number] = min(best[number], (time.perf_counter() - start) / run)
    return best


def print_table(timings: list[CpuTiming]) -> None:
    """Print one line for each kernel, shape and number of threads; its rows stand side by side."""
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
