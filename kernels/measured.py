"""Measures on this machine whether a pass reads its weights faster in 12 bits than in 16; the result is kept on disk.

Not handled: attention, norms and the KV cache, which take as long in both.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from river_compile.kernels.files import atomic_write, cached_file
from river_compile.kernels.native import cores
from river_compile.kernels.native import load as native
from river_compile.kernels.native.build import choose_isa, kernels_library
from river_compile.kernels.native.load import Tape
from river_compile.kernels.native.machine import last_level_cache, processor_name
from river_compile.kernels.quant.lossless import BLOCK, pack_12bit

log = logging.getLogger("river_compile.kernels.measured")

Shapes = Mapping[tuple[int, int], int]  # how many weights [N, K] a pass reads

LEAST_GAIN = 1.05  # speedup of a pass from which packing pays; else 16 bits cost neither memory nor packing
_SMALL = 1 << 18  # weights of a matrix that stays in 16 bits: its time is not that of reading it
_WIDTHS = (1, 4, 6)  # rows of a measured pass: a decode step, and verifying passes of usual drafts
_ROUNDS, _MOST_ROUNDS = 5, 50  # passes after which no time is better, and that are measured at most
_BETTER = 0.98  # of the best time, from which another one counts as better
_LEAST_BYTES = 3 << 25  # of a measured pass in 16 bits
_MOST_WEIGHTS = 1 << 23  # of a matrix that is measured: more rows take as long each


def worth_12_bits(shapes: Shapes, many_rows: bool) -> frozenset[tuple[int, int]]:
    """Return the shapes of weights that a pass is to read in 12 bits: all large ones if that is faster, or none.

    Args:
        shapes: of all weights that could be packed.
        many_rows: whether passes of several rows count as much as those of one.
    """
    large = {shape: count for shape, count in shapes.items() if math.prod(shape) >= _SMALL}
    gains = pass_speedups(tuple(sorted(large.items()))) if large else {}
    counted = [gain for rows, gain in gains.items() if many_rows or rows == 1]
    pays = bool(counted) and math.prod(counted) ** (1 / len(counted)) >= LEAST_GAIN
    return frozenset(large) if pays else frozenset()


@functools.cache
def pass_speedups(shapes: tuple[tuple[tuple[int, int], int], ...]) -> dict[int, float]:
    """Return how much faster a pass is in 12 bits, by its rows, measured once per machine; empty without kernels."""
    isa, threads = choose_isa(), cores.threads()
    if isa.name == "portable" or not native.has_packing():
        return {}
    made_by = f"{processor_name()} {kernels_library(isa).name} {shapes} {sampled_bytes(dict(shapes))}"
    name = f"native/pass_{isa.name}_{threads}_{hashlib.sha256(made_by.encode()).hexdigest()[:12]}.json"
    text = cached_file(name, _has_gains, functools.partial(_measure, dict(shapes))).read_text(encoding="utf-8")
    return {int(rows): float(gain) for rows, gain in json.loads(text).items()}


def _has_gains(file: Path) -> bool:
    try:
        gains = json.loads(file.read_text(encoding="utf-8"))
        return set(gains) == set(map(str, _WIDTHS)) and all(isinstance(gain, float) for gain in gains.values())
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def sampled_bytes(shapes: Shapes) -> int:
    """Return the bytes of a measured pass in 16 bits: those of the weights, or as many as the last cache has."""
    # The pass in 12 bits, which runs in between, adds three quarters. So the cache keeps nothing of a larger model, and
    # of a smaller one what it would keep while the model runs.
    return max(_LEAST_BYTES, min(_bytes(shapes), last_level_cache() or 0))


def _bytes(shapes: Shapes) -> int:
    return sum(2 * n * k * count for (n, k), count in shapes.items())


@torch.inference_mode()
def _measure(shapes: Shapes, file: Path) -> None:
    order = _sample(shapes)
    generator = torch.Generator().manual_seed(0)  # leaves the user's generator alone
    made = {shape: (torch.randn(shape, generator=generator) * 0.02).bfloat16() for shape in dict.fromkeys(order)}
    units_and_sides = {shape: pack_12bit(weight) for shape, weight in made.items()}
    in_16_bits = [made[shape].clone() for shape in order]
    in_12_bits = [tuple(part.clone() for part in units_and_sides[shape]) for shape in order]
    ops, gains = native.load(), {}
    for rows in _WIDTHS:
        inputs = {k: torch.ones(rows, k, dtype=torch.bfloat16) for _, k in shapes}
        plain, packed = Tape(), Tape()
        with plain.recording():
            for weight in in_16_bits:
                ops.dense(inputs[weight.shape[1]], [weight], [])
        with packed.recording():
            for (units, side), (n, k) in zip(in_12_bits, order, strict=True):
                ops.linear(inputs[k], units, side, None, n, 0)
        gains[rows] = _ratio(plain, packed)
    log.info("passes in 12 bits over 16 bits, by rows: %s", gains)
    with atomic_write(file) as scratch:
        scratch.write_text(json.dumps(gains), encoding="utf-8")


def _sample(shapes: Shapes) -> Sequence[tuple[int, int]]:
    """Return shapes of weights in turn, each as often as its share of a pass's bytes asks for."""
    share = sampled_bytes(shapes) / _bytes(shapes)
    counts: dict[tuple[int, int], int] = {}
    for (n, k), count in shapes.items():
        rows = min(n, max(BLOCK, _MOST_WEIGHTS // k))
        counts[rows, k] = max(1, round(count * n * share / rows))
    turns = max(counts.values())
    return [
        shape
        for turn in range(turns)
        for shape, count in counts.items()
        if turn * count // turns != (turn + 1) * count // turns
    ]


def _ratio(first: Tape, second: Tape) -> float:
    """Return the best time of one tape over that of another; their replays alternate."""
    # On a busy machine the best of a few times is chance.
    best, unchanged = [math.inf, math.inf], 0
    for _ in range(_MOST_ROUNDS):
        before = [*best]
        for number, tape in enumerate((first, second)):
            start = time.perf_counter()
            tape.replay()
            best[number] = min(best[number], time.perf_counter() - start)
        better = any(now < _BETTER * then for now, then in zip(best, before, strict=True))
        unchanged = 0 if better else unchanged + 1
        if unchanged == _ROUNDS:
            break
    return best[0] / best[1]
