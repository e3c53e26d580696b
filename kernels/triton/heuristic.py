"""Which tile a linear kernel gets: a cost model over legal candidates, or the choice that a tuning run has saved.

The model is a roofline with three corrections that decide between tiles at decode: bytes in flight against what hides
the memory's latency, whole waves of programs, and instructions per weight. It is made for the order of candidates, not
for the microseconds. The result depends on the shape and on the named device alone, never on the GPU that is there.

A tuning file is JSON, ``{device: {key: tile fields}}``, written by `python -m river_compile.kernels.tools.tune` to
$RIVER_COMPILE_TUNING or ``tuning.json`` in the cache directory, where it is looked up first.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from river_compile.kernels.files import cache_folder

from .devices import DEFAULT_DEVICE, Device, known
from .linear import MAX_EXACT_ROWS, LinearSpec, LinearTile
from .spec import next_power_of_two

MAX_REGISTERS = 168
#: Instructions per 4-bit weight (and, read plain) and per activation of a row, counted in the generated code.
INSTRUCTIONS = {"w4": 4.5, "dense": 2.0, "x": 4.0}


def registers(spec: LinearSpec) -> int:
    """Estimates the registers that a thread of the kernel needs; beyond `MAX_REGISTERS` some would spill."""
    tile, matrices = spec.tile, len(spec.streams)
    threads = 32 * tile.num_warps
    columns = matrices * tile.block_n
    if tile.block_m == 1:  # a word (or two weights), two sums and an operand of each
        return math.ceil(32 + 4 * columns * tile.block_k / (8 if spec.weights == "w4" else 2) / threads)
    length = tile.block_k // 8
    return math.ceil(48 + (tile.block_m * columns + 3 * columns * length + tile.block_m * length / 2) / threads)


def candidates(spec: LinearSpec) -> Iterator[LinearSpec]:
    """Yields `spec` with every legal tile of the search space; its own tile is ignored."""
    for tile in _row_tiles(spec) if spec.row_by_row else _dot_tiles(spec):
        if tile.split_k <= math.ceil(spec.in_features / tile.block_k):
            candidate = dataclasses.replace(spec, tile=tile)
            if registers(candidate) <= MAX_REGISTERS:
                yield candidate


def _row_tiles(spec: LinearSpec) -> Iterator[LinearTile]:
    # Lanes lie side by side along K, 16 bytes each (32 weights of 4 bits; two loads of 16 bits), so that a warp reads
    # whole lines and a lane needs few activations; more rows of W then only repeat the pattern.
    splits = (1,) if spec.norm != "none" else (1, 2, 4)
    per_warp = 1024 if spec.weights == "w4" else 512
    deepest = max(spec.group_size or 32, next_power_of_two(spec.in_features))
    depths = {min(per_warp * warps, deepest): warps for warps in (8, 4, 2, 1)}
    for (depth, warps), block_n, split_k in itertools.product(depths.items(), (1, 2, 4, 8, 16, 32), splits):
        yield LinearTile(block_n, depth, 1, split_k, warps)


def _dot_tiles(spec: LinearSpec) -> Iterator[LinearTile]:
    # What stands in front of the dot is unrolled eight times: deeper steps or a pipeline on top of a norm, two
    # products or exact float32 run out of registers.
    heavy = spec.norm != "none" or spec.gated or spec.dtype == "float32"
    widths = (16,) if spec.dtype == "float32" else (16, 32)
    heights = (16,) if spec.rows or heavy else (16, 32, 64)
    depths = (128,) if spec.dtype == "float32" else (128, 256)
    if spec.norm != "none" and spec.gated and spec.dtype != "float32":
        widths, depths = (32,), (128,)
    if spec.weights == "dense" and spec.dtype != "float32":
        widths, depths = (32, 64), (128,)
    splits = (1,) if spec.norm != "none" else (1, 2, 4)
    for block_n, block_m, depth, split_k in itertools.product(widths, heights, depths, splits):
        yield LinearTile(block_n, depth, block_m, split_k, 4, 1 if heavy else 2)


def seconds(spec: LinearSpec, device: Device, rows: int | None = None) -> float:
    """Estimates the time of a kernel in seconds; `rows` (64 if None) counts where the spec leaves M open."""
    tile, m = spec.tile, spec.rows or rows or 64
    threads, matrices = 32 * tile.num_warps, len(spec.streams)
    programs = math.ceil(spec.out_features / tile.block_n) * spec.blocks(m) * tile.split_k
    resident = max(1, min(32, 2048 // threads, 65536 // (registers(spec) * threads)))
    per_processor = programs / device.processors
    waves = math.ceil(per_processor / resident)
    # The memory: what is in flight on one processor, of the about 48 KiB that cover its latency.
    bits = 4 if spec.weights == "w4" else 16
    step_bytes = matrices * tile.block_n * tile.block_k * bits / 8
    in_flight = min(per_processor, resident) * step_bytes
    memory = spec.cost(m).bytes / (device.bandwidth * min(1.0, in_flight / 49152))
    memory *= max(1.0, waves / max(per_processor / resident, 1e-9)) if per_processor > resident else 1.0
    if bits == 4 and tile.block_n * tile.block_k / 8 / threads < 8:  # words per lane: narrower than 16-byte loads
        memory *= 1.5
    # The instructions: every weight of the tile, masked or not, and the activations again in every program.
    weights = programs * spec.steps * tile.block_k * tile.block_n * matrices
    activations = programs * spec.steps * tile.block_k * tile.block_m
    issued = weights * INSTRUCTIONS[spec.weights] + activations * INSTRUCTIONS["x"] / (1 if tile.block_m == 1 else 4)
    instructions = issued / (device.processors * device.lanes * device.clock * 0.7)
    dots = weights * tile.block_m * 2 / (device.dot_flops * 0.3) if tile.block_m > 1 else 0.0
    launches = 2e-6 * len(spec.stages())
    return max(memory, instructions + dots) + waves * spec.steps * 0.3e-6 + launches


def best_tile(spec: LinearSpec, device: str = DEFAULT_DEVICE, rows: int | None = None) -> LinearSpec:
    """Returns `spec` with the saved tile of the device where there is one, else the cost model's; its own is ignored.

    A device that only a tuning file names counts as the default one in the model. `rows` as in `seconds`.
    """
    saved = saved_tiles(tuning_file()).get(device, {}).get(tuning_key(spec))
    if saved is not None:
        return dataclasses.replace(spec, tile=saved)
    return _modelled(spec, known(device), rows)


@functools.cache
def _modelled(spec: LinearSpec, device: Device, rows: int | None) -> LinearSpec:
    return min(candidates(spec), key=lambda candidate: seconds(candidate, device, rows))


def interpreter_tile(spec: LinearSpec) -> LinearSpec:
    """Returns `spec` with a tile for Triton's interpreter, whose time goes by operations and not by their size."""
    width = max(16, min(512, next_power_of_two(spec.out_features)))
    depth = max(128, min(2048, next_power_of_two(spec.in_features)))
    return dataclasses.replace(spec, tile=LinearTile(width, depth, 1 if spec.row_by_row else 16))


def attention_splits(heads: int, slots: int, device: Device) -> int:
    """Returns how many programs share the cache of one of all `heads` KV heads, to fill the processors twice."""
    wanted = min(2 * device.processors // heads, math.ceil(slots / 64), 32)
    return 1 << max(0, wanted.bit_length() - 1) if wanted > 1 else 1


def untiled(rows: int, in_features: int, out_features: int, **fields: Any) -> LinearSpec:
    """Returns a spec for `rows` rows with a placeholder tile, the input of `best_tile`; many rows stay open."""
    step = max(128, fields.get("group_size", 64))
    exact = rows if rows <= MAX_EXACT_ROWS else None
    tile = LinearTile(16, step, 1 if rows == 1 or (exact and fields.get("experts")) else 16)
    return LinearSpec(exact, in_features, out_features, tile, **fields)


def tuning_file() -> Path:
    """Returns where tuned tiles are saved."""
    return Path(os.environ.get("RIVER_COMPILE_TUNING") or cache_folder() / "tuning.json")


def tuning_key(spec: LinearSpec) -> str:
    """Names what a tuned tile is for: the fields of the spec that move bytes or instructions."""
    parts = [spec.weights, spec.group_size, spec.dtype, spec.rows, spec.in_features, spec.out_features, spec.norm]
    stack = [f"of{spec.experts}"] if spec.experts else []
    return "-".join(map(str, [*parts, "gated" if spec.gated else "single", *stack]))


def saved_tiles(path: Path) -> dict[str, dict[str, LinearTile]]:
    """Reads a tuning file; a missing one is empty, a damaged one is empty with a warning."""
    try:
        return _read_tiles(path, path.stat().st_mtime_ns)
    except FileNotFoundError:
        return {}


@functools.cache
def _read_tiles(path: Path, _modified: int) -> dict[str, dict[str, LinearTile]]:
    try:
        devices = json.loads(path.read_text())
        return {d: {key: LinearTile(**tile) for key, tile in tiles.items()} for d, tiles in devices.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        warnings.warn(f"the tuning file {path} cannot be read and is ignored: {error}", stacklevel=3)
        return {}
