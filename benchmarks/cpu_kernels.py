"""Times matmuls, of 4-bit, bfloat16 and 12-bit weights, and attention: `benchmarks.kernels --device cpu`.

Every matmul reads weights that no cache holds, and its rate counts those bytes. "of a sum" is the rate at which torch
sums bytes on the same threads. Subjects alternate and the least time of each counts, so that a busy machine costs
repeats rather than figures.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from river_compile.kernels.native import load
from river_compile.kernels.quant.data_free import quantize
from river_compile.kernels.quant.layouts import PackedLinear, pack, pack_lossless

SHAPES = ((4096, 4096), (3072, 576), (1536, 8960))
ROWS = (1, 4, 8, 16)
HEADS = ((9, 3, 64), (12, 2, 128), (32, 8, 128))  # of queries and of the cache, features: SmolLM2, Qwen's 1.5B, an 8B
SLOTS = 4096  # of the KV cache
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
    """Time ATen's 4-bit matmul and the C++ kernels for all shapes, rows and numbers of threads."""
    load.load()
    before, timings = torch.get_num_threads(), []
    for n, k in SHAPES:
        subjects = {(kernel, rows): (size, calls) for kernel, rows, size, calls in _subjects(n, k, group_size)}
        runs = {subject: max(1, RUN_BYTES // size) for subject, (size, _) in subjects.items()}
        for count in threads:
            torch.set_num_threads(count)
            seconds = least_seconds({subject: calls for subject, (_, calls) in subjects.items()}, repeats, runs)
            for (kernel, rows), (size, _) in subjects.items():
                sum_seconds = seconds["sum", 0] * size / subjects["sum", 0][0]
                timings.append(CpuTiming(kernel, n, k, rows, count, size, seconds[kernel, rows], sum_seconds))
    torch.set_num_threads(before)
    return [timing for timing in timings if timing.rows]


def _subjects(n: int, k: int, group_size: int) -> Iterator[tuple[str, int, int, list[Call]]]:
    """Yield name, rows, bytes that a call reads, and calls: of a plain sum first, then of each kernel for all rows."""
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
    size = fours[0].qweight.nbytes + fours[0].scale_zero.nbytes
    yield "sum", 0, size, [functools.partial(_sum, one.qweight, one.scale_zero) for one in fours]
    for rows in ROWS:
        x = torch.randn(rows, k).bfloat16()

        def linear(p: PackedLinear, x: torch.Tensor = x) -> Call:
            return functools.partial(ops.linear.default, x, p.qweight, p.scale_zero, None, n, p.group_size)

        product = torch.ops.aten._weight_int4pack_mm_for_cpu
        yield (
            "ATen int4",
            rows,
            size,
            [functools.partial(product, x, p.qweight, group_size, p.scale_zero) for p in aten],
        )
        yield "native W4A8", rows, size, [*map(linear, fours)]
        dense = [functools.partial(ops.dense.default, x, [p.qweight], []) for p in sixteens]
        yield "native bfloat16", rows, in_16_bits.nbytes, dense
        if twelves:  # (of whose second tensor a few patches are read, and the rest is room)
            yield "the same in 12 bits", rows, twelves[0].qweight.nbytes, [*map(linear, twelves)]


def print_attention(threads: Sequence[int], repeats: int) -> None:
    """Time attention of a few positions in bfloat16 over a full KV cache; print a line for each heads and threads."""
    load.load()
    before = torch.get_num_threads()
    heads_of_rows = " | ".join(f"{rows} row{'s' * (rows > 1)}, us" for rows in ROWS)
    print(f"| attention over {SLOTS} slots | threads | {heads_of_rows} | GB/s, 1 row |")
    print("|---|---:|" + "---:|" * (len(ROWS) + 1))
    for heads, kv_heads, features in HEADS:
        size = 4 * kv_heads * SLOTS * features  # bytes of keys and values
        caches = torch.randn(max(2, BYTES // size), 2, 1, kv_heads, SLOTS, features).bfloat16()
        calls = {rows: _attention(caches, rows, heads) for rows in ROWS}
        for count in threads:
            torch.set_num_threads(count)
            times = least_seconds(calls, repeats, dict.fromkeys(ROWS, max(1, RUN_BYTES // size)))
            cells = " | ".join(f"{times[rows] * 1e6:.0f}" for rows in ROWS)
            what = f"{heads} x {features}, {kv_heads} in the cache"
            print(f"| {what} | {count} | {cells} | {size / times[1] / 1e9:.1f} |")
    torch.set_num_threads(before)


def _attention(caches: torch.Tensor, rows: int, heads: int) -> list[Call]:
    """Return calls of attention of some positions at the end of each cache."""
    q = torch.randn(1, rows, heads, caches.shape[-1]).bfloat16()
    live = torch.ones(1, 1, rows, SLOTS, dtype=torch.bool).tril(SLOTS - rows)
    attend, scale = torch.ops.river_native.attention.default, caches.shape[-1] ** -0.5
    return [functools.partial(attend, q, k, v, live, scale, 0.0, False) for k, v in caches]


def _sum(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        tensor.view(-1).view(torch.int64).sum()


def _copies(packed: PackedLinear) -> list[PackedLinear]:
    return [
        replace(packed, qweight=packed.qweight.clone(), scale_zero=packed.scale_zero.clone())
        for _ in range(max(2, BYTES // packed.qweight.nbytes))
    ]


def least_seconds(subjects: Mapping, repeats: int, runs: Mapping | None = None) -> dict:
    """Return the least seconds of one call of each subject, whose calls touch different memory; subjects alternate.

    Args:
        subjects: calls by subject.
        repeats: times that each subject is timed.
        runs: how many calls of a subject are timed as one; 1 where it is left out.
    """
    best = dict.fromkeys(subjects, float("inf"))
    with torch.inference_mode():
        for repeat in range(repeats):
            for subject, calls in subjects.items():
                run = min(runs[subject] if runs else 1, len(calls))
                first = repeat * run % (len(calls) - run + 1)
                start = time.perf_counter()
                for call in calls[first : first + run]:
                    call()
                best[subject] = min(best[subject], (time.perf_counter() - start) / run)
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
