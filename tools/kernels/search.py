"""The search for a kernel's tile: every legal candidate for a device, and the cheapest by the cost model.

What it finds for many shapes is the product's table (`tools.kernels.tune`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

from river_compile.kernels.quant.lossless import UNIT
from river_compile.kernels.triton.linear import LinearSpec, LinearTile, min_columns
from river_compile.kernels.triton.spec import next_power_of_two
from river_compile.kernels.triton.tiles import ATTENTION_BLOCK, min_rows

from .cost_model import WIDTH, attention_seconds, instructions_per_weight, registers, seconds
from .devices import Device

MAX_REGISTERS = 168
#: Of the form "groups": with four warps, a quarter of a processor's warps are resident.
MAX_GROUP_REGISTERS = 128
#: Per weight of the form "groups", where a tile allows it: with up to 8 rows, and with more. (An H100 takes as long for
#: 4.2 as for the weight's bytes.)
MOST_INSTRUCTIONS = (3.2, 3.4)


def cheapest(spec: LinearSpec, device: Device, rows: int | None = None) -> LinearSpec:
    """Return `spec` with the cheapest candidate's tile; its own is ignored.

    `rows` are as in `seconds`, but that a kernel for all widths has one tile.
    """
    rows = WIDTH if spec.any_width else rows
    return min(candidates(spec, device), key=lambda candidate: cost(candidate, device, rows))


def cost(spec: LinearSpec, device: Device, rows: int | None = None) -> tuple[bool, float]:
    """Return what candidates are compared by: whether instructions abound, then the time.

    The form "groups" has too many where a weight takes more than `MOST_INSTRUCTIONS`, or where fewer than three steps
    leave the start of the pipeline the larger part. (Times of two tiles are closer than their estimate is good, and
    fewer instructions leave a processor's issue slots to others.) Small matrices, and those of programs for less
    than a third of the processors, are a matter of latencies alone.
    """
    large = spec.form == "groups" and spec.in_features * spec.out_features * len(spec.streams) > 2**21
    large = large and 3 * math.ceil(spec.out_features / 32) >= device.processors
    limit = MOST_INSTRUCTIONS[spec.tile.block_m > 8]
    many = large and (spec.steps < 3 or instructions_per_weight(spec) > limit)
    return many, seconds(spec, device, rows)


def candidates(spec: LinearSpec, device: Device) -> Iterator[LinearSpec]:
    """Yield `spec` with every legal tile of the search space for a device; its own tile is ignored."""
    if spec.form == "groups":
        tiles = _group_tiles(spec, device)
    else:
        tiles = _row_tiles(spec) if spec.form == "row" else _dot_tiles(spec, device)
    for tile in tiles:
        if tile.split_k <= math.ceil(spec.in_features / tile.block_k) and spec.divides_matrices(tile):
            candidate = dataclasses.replace(spec, tile=tile)
            if registers(candidate) <= most_registers(candidate):
                yield candidate


def most_registers(spec: LinearSpec) -> int:
    """Return how many estimated registers a candidate may have."""
    return MAX_GROUP_REGISTERS if spec.form == "groups" and spec.tile.block_m == 8 else MAX_REGISTERS


def _group_tiles(spec: LinearSpec, device: Device) -> Iterator[LinearTile]:
    # A warp has its own groups, so a step is a number of groups for each warp, and no split-K is needed.
    if device.backend != "cuda":  # matrix cores take 16 columns, and narrow tiles load words of 8 bytes
        yield LinearTile(32, 4 * spec.group_size, 16, 1, 4, 2)
        return
    heights = (min_rows(spec),) if spec.rows else (16, 32)
    deepest = max(4 * spec.group_size, spec.in_features // 2)  # a single step would not be pipelined
    # Two groups each of a gated pair, and wide tiles of eight warps but those below, have too many sums for Triton 3.6;
    # narrow tiles of a pair were seen to spill there. Start and end of eight warps take too long for less than 8 steps.
    widths, numbers = ((32,), (1,)) if spec.gated else ((16, 32, 64), (1, 2))
    for block_n, block_m, warps, each in itertools.product(widths, heights, (4, 8), numbers):
        depth = warps * each * spec.group_size
        wide = block_n == 32 and each == 1 and (block_m == 8 or spec.norm == "none") and spec.in_features >= 8 * depth
        if depth <= deepest and (warps == 4 or block_n == 16 or wide):
            stages = _pipeline(spec, device, block_n, steps=math.ceil(spec.in_features / depth))
            yield LinearTile(block_n, depth, block_m, 1, warps, stages)


def _pipeline(spec: LinearSpec, device: Device, block_n: int, steps: int) -> int:
    """Return how many steps are on their way at a time: three, or what was seen to keep values in registers.

    Behind a norm, pairs of matrices spill with several rows in longer pipelines than two. On sm_100 they spill with one
    row in shorter ones than four (Triton 3.9), where single matrices spill in longer ones than three (3.7 and 3.9).
    Triton 3.6 and 3.7 unroll four steps in a pipeline of three into too many registers.
    """
    behind_norm = spec.norm != "none"
    if behind_norm and spec.gated and not spec.row_by_row:
        return 2
    if behind_norm and device.name == "sm_100":
        return 4 if spec.gated else 3
    if block_n == 16:
        return 4
    return 4 if behind_norm and steps <= 4 else 3


def _row_tiles(spec: LinearSpec) -> Iterator[LinearTile]:
    # Lanes lie side by side along K, 16 bytes each (32 4-bit weights), so that a warp reads whole lines and a lane
    # needs few activations. More rows of W then only repeat the pattern.
    splits = (1,) if spec.norm != "none" else (1, 2, 4)
    per_warp = 1024 if spec.weights == "w4" else 512
    twelve, least = spec.weights == "bf12", min_columns(spec.weights, spec.form)
    deepest = max(spec.group_size or UNIT, next_power_of_two(spec.in_features))
    depths = {min(per_warp * warps, deepest): warps for warps in (8, 4, 2, 1)}
    widths = (least,) if twelve else (1, 2, 4, 8, 16, 32)
    for (depth, warps), block_n, split_k in itertools.product(depths.items(), widths, splits):
        yield LinearTile(block_n, depth, 1, split_k, warps)


def _dot_tiles(spec: LinearSpec, device: Device) -> Iterator[LinearTile]:
    splits = (1,) if spec.norm != "none" else (1, 2, 4)
    if spec.weights == "w4" or spec.dtype == "float32":
        # What stands in front of the dot is unrolled eight times: deeper steps or a pipeline on top of a norm, two
        # products or exact float32 run out of registers.
        heavy = spec.norm != "none" or spec.gated or spec.dtype == "float32"
        widths, depths = ((16,), (128,)) if spec.dtype == "float32" else ((16, 32), (128, 256))
        heights = (16,) if spec.rows or heavy else (16, 32, 64)
        if spec.norm != "none" and spec.gated and spec.dtype != "float32":
            widths, depths = (32,), (128,)
        cuts = [(width, depth, 4, 1 if heavy else 2) for width in widths for depth in depths]
    elif spec.weights == "dense":
        # Weights go to the dot as they are, so that copies of steps to come cost no registers but shared memory.
        heights = (16,)
        # A warp has 8 columns or more: others would repeat what it does. Deep steps spare instructions behind a norm,
        # and of few programs each waits for its own bytes, which they hold.
        cuts = [(32, 128, 4, 4), (64, 128, 4, 4), (32, 256, 4, 3)]
        cuts += [(32, 512, 4, 3)] if spec.out_features < 16 * device.processors else []
        cuts = cuts if device.backend == "cuda" else [(*cut[:3], 2) for cut in cuts]
    else:
        # Every warp normalises all activations, so wide tiles of few warps do it for the most weights.
        heights, wide = (16,), 2 * min_columns(spec.weights, spec.form)
        cuts = [(wide, 64, 4, 3), (wide // 2, 128, 4, 2)]
    for (block_n, depth, warps, stages), block_m, split_k in itertools.product(cuts, heights, splits):
        yield LinearTile(block_n, depth, block_m, split_k, warps, stages)


def cheapest_splits(heads: int, slots: int, device: Device, group: int, head_dim: int) -> int:
    """Return how many programs share the cache of one of all `heads` KV heads, of `group` query heads each."""
    most = math.ceil(slots / ATTENTION_BLOCK).bit_length() - 1

    def time(splits: int) -> float:
        return attention_seconds(heads, slots, device, group, head_dim, splits)

    return min((1 << power for power in range(most + 1)), key=time)
