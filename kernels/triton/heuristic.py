"""Which tile a linear kernel gets: a cost model over legal candidates, or the choice that a tuning run has saved.

The model is a roofline with three corrections that decide between tiles at decode: bytes in flight against what hides
the memory's latency, whole waves of programs, and instructions, which were counted in compiled kernels. It is made for
the order of candidates, not for the microseconds. The result depends on the shape and on the named device alone, never
on the GPU that is there.

A tuning file is JSON, ``{device and Triton version: {key: tile fields}}`` (see `tuned_for`), written by
`python -m tools.kernels.tune` to $RIVER_COMPILE_TUNING or ``tuning.json`` in the cache directory, where
it is looked up first. What was measured with another version of Triton counts for nothing, since that compiles the same
source to other code.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from river_compile.kernels.files import cache_folder
from river_compile.kernels.quant.bf12 import UNIT
from river_compile.kernels.triton.devices import DEFAULT_DEVICE, Device, known
from river_compile.kernels.triton.linear import MAX_EXACT_ROWS, LinearSpec, LinearTile, form_of, least_columns
from river_compile.kernels.triton.spec import DTYPES, next_power_of_two

MAX_REGISTERS = 168
#: Of the form "groups": with four warps, a quarter of a processor's warps are resident.
MAX_GROUP_REGISTERS = 128
#: Instructions per weight of each kind and per activation of a row, counted in the generated code.
INSTRUCTIONS = {"w4": 4.8, "dense": 2.0, "bf12": 5.5, "x": 4.0}
#: In the form "dot", per weight in 12 bits, and per activation and warp behind a norm.
BF12_DOT, NORMALISE = 7.0, {"dense": 1.8, "bf12": 5.7}
_BITS = {"w4": 4, "dense": 16, "bf12": 12}
ATTENTION_BLOCK = 32  # slots of a step of attention
#: For which the tile of a kernel for all widths is chosen.
WIDTH = 4
LAUNCH_SECONDS = 2e-6  # from the end of one kernel of a graph until the next one works

#: Per weight of the form "groups", where a tile allows it: with up to 8 rows, and with more. (An H100 takes as long for
#: 4.2 as for the weight's bytes.)
MOST_INSTRUCTIONS = (3.2, 3.4)


def registers(spec: LinearSpec) -> int:
    """Estimates the registers that a thread of the kernel needs; beyond `most_registers` some would spill.

    In the form "groups" the estimate is what the worst of Triton 3.6, 3.7 and 3.9 takes.
    """
    tile, matrices = spec.tile, len(spec.streams)
    threads = 32 * tile.num_warps
    columns = matrices * tile.block_n
    if spec.form == "groups":  # two sums, and an operand
        return math.ceil(60 + 3 * columns * tile.block_m * (tile.block_k // spec.group_size) / threads)
    if spec.weights == "bf12" and spec.form == "row":
        return math.ceil(16 + columns * tile.block_k / threads)
    if spec.form == "row":  # a word, two sums and an operand of each
        return math.ceil(32 + 4 * columns * tile.block_k / 8 / threads)
    length, operands = tile.block_k // 8, 3.0
    if spec.weights == "bf12":  # wide tiles unpack one of a unit's rows after another
        length, operands = tile.block_k // 4, 5.0 if tile.block_n == least_columns(spec.weights, spec.form) else 2.5
    return math.ceil(48 + (tile.block_m * columns + operands * columns * length + tile.block_m * length / 2) / threads)


def most_registers(spec: LinearSpec) -> int:
    """Returns how many estimated registers a candidate may have."""
    return MAX_GROUP_REGISTERS if spec.form == "groups" and spec.tile.block_m == 8 else MAX_REGISTERS


def thread_instructions(spec: LinearSpec) -> float:
    """Estimates what a thread of the form "groups" executes: a fit to what was counted in compiled kernels."""
    tile, words = spec.tile, spec.group_size / 64
    parts, columns = len(spec.streams) * tile.block_n / 16, tile.block_m / 8  # tiles of 16 weight rows, of 8 rows
    part = 30 * words + columns * (4 * words + 8) + 18  # bits to numbers, dots, scale and zero
    x = columns * words * (6 if spec.norm == "none" else 14 if spec.row_by_row else 34) + 3
    step = tile.block_k / spec.group_size / tile.num_warps * (parts * part + x)
    unrolled = 230 + spec.steps * (16 + step)  # the compiler does so where it stays short
    return unrolled if unrolled <= 1500 else 150 + spec.steps * (52 + step)


def instructions_per_weight(spec: LinearSpec) -> float:
    """Estimates instructions per weight of the form "groups", those of weights beyond the matrix included."""
    weights = len(spec.streams) * spec.tile.block_n * spec.tile.block_k * spec.steps
    return thread_instructions(spec) * 32 * spec.tile.num_warps / weights


def candidates(spec: LinearSpec, device: Device) -> Iterator[LinearSpec]:
    """Yields `spec` with every legal tile of the search space for a device; its own tile is ignored."""
    if spec.form == "groups":
        tiles = _group_tiles(spec, device)
    else:
        tiles = _row_tiles(spec) if spec.form == "row" else _dot_tiles(spec, device)
    for tile in tiles:
        if tile.split_k <= math.ceil(spec.in_features / tile.block_k) and spec.parts_fit(tile):
            candidate = dataclasses.replace(spec, tile=tile)
            if registers(candidate) <= most_registers(candidate):
                yield candidate


def _group_tiles(spec: LinearSpec, device: Device) -> Iterator[LinearTile]:
    # A warp has groups of its own, so a step is a number of groups for each warp, and no split-K is needed.
    if device.backend != "cuda":  # matrix cores take 16 columns, and narrow tiles load words of 8 bytes
        yield LinearTile(32, 4 * spec.group_size, 16, 1, 4, 2)
        return
    heights = (least_rows(spec),) if spec.rows else (16, 32)
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
    """Returns how many steps are on their way at once: three, or what was seen to keep values in registers.

    Behind a norm, pairs of matrices spill with several rows in longer pipelines than two, and on sm_100 with one row in
    shorter ones than four (Triton 3.9), where single matrices spill in longer ones than three (3.7 and 3.9). Triton 3.6
    and 3.7 unroll four steps in a pipeline of three into too many registers.
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
    # Lanes lie side by side along K, 16 bytes each (32 weights of 4 bits), so that a warp reads whole lines and a lane
    # needs few activations; more rows of W then only repeat the pattern.
    splits = (1,) if spec.norm != "none" else (1, 2, 4)
    per_warp = 1024 if spec.weights == "w4" else 512
    twelve, least = spec.weights == "bf12", least_columns(spec.weights, spec.form)
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
        heights, wide = (16,), 2 * least_columns(spec.weights, spec.form)
        cuts = [(wide, 64, 4, 3), (wide // 2, 128, 4, 2)]
    for (block_n, depth, warps, stages), block_m, split_k in itertools.product(cuts, heights, splits):
        yield LinearTile(block_n, depth, block_m, split_k, warps, stages)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Where the seconds of a kernel go: memory, cache and instructions side by side, and what is waited for."""

    bytes: float  # what memory takes at its full bandwidth
    in_flight: float  # and longer, since too few bytes are on their way
    tail: float  # and longer, since processors are idle in the last wave
    cache: float  # the cache that all processors share: weights, and the activations that each program reads
    instructions: float
    waits: float  # steps that follow one another, and launches
    waves: float  # of programs, the last one as the part that it fills

    @property
    def total(self) -> float:
        return max(self.bytes + self.in_flight + self.tail, self.cache, self.instructions) + self.waits

    @property
    def bound(self) -> str:
        """What most of the time is spent on; "bytes" where those alone are four fifths of memory's part or more."""
        memory = self.bytes + self.in_flight + self.tail
        longest = max(memory, self.cache, self.instructions)
        if self.waits > longest:
            return "latency"
        if longest > memory:
            return "cache" if self.cache == longest else "instructions"
        if self.bytes >= 0.8 * memory:
            return "bytes"
        return "in flight" if self.in_flight > self.tail else "tail"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiler made of a kernel, in the place of the model's estimates."""

    resident: int  # programs that a processor holds at once
    instructions: float | None = None  # of a thread, all steps together; None where they were not counted


def seconds(spec: LinearSpec, device: Device, rows: int | None = None) -> float:
    """Estimates the time of a kernel in seconds; `rows` as in `rows_of`."""
    return estimate(spec, device, rows).total


def estimate(spec: LinearSpec, device: Device, rows: int | None = None, compiled: Compiled | None = None) -> Estimate:
    """Estimates the parts of `seconds`, by what was compiled where that is given."""
    tile, m = spec.tile, rows_of(spec, rows)
    threads = 32 * tile.num_warps
    programs = math.ceil(spec.out_features / tile.block_n) * spec.blocks(m) * tile.split_k
    resident = min(32, 2048 // threads, 65536 // (registers(spec) * threads), device.shared // _shared(spec))
    resident = max(1, resident)
    of_thread = thread_instructions(spec) if spec.form == "groups" else None
    if compiled is not None:
        resident = max(1, compiled.resident)
        if compiled.instructions is not None:
            of_thread, threads = compiled.instructions, device.warp * tile.num_warps
    per_processor = programs / device.processors
    waves = math.ceil(per_processor / resident)
    moved = spec.cost(m).bytes / device.bandwidth
    memory = moved / _bandwidth_share(spec, device, min(per_processor, resident))
    idle = max(1.0, waves / max(per_processor / resident, 1e-9)) if per_processor > resident else 1.0
    if of_thread is None:
        issued = _instructions(spec, programs)
    elif spec.form == "groups":
        # A processor with one program more than others is what the kernel waits for; ten warps hide their latencies.
        most = math.ceil(per_processor)
        issued = of_thread * threads * most * device.processors
        issued /= min(1.0, min(most, resident) * tile.num_warps / 10)
    else:
        issued = of_thread * threads * programs
    instructions = issued / (device.processors * device.lanes * device.clock * 0.7)
    if spec.form == "dot":
        weights = programs * spec.steps * tile.block_k * tile.block_n * len(spec.streams)
        instructions += weights * tile.block_m * 2 / (device.dot_flops * 0.3)
    turns = waves * spec.steps * (0.05e-6 if _pipelined(spec) else 0.3e-6)  # or each waits for memory
    cache = (spec.cost(m).bytes + shared_bytes(spec, m)) / device.cache
    waits = turns + LAUNCH_SECONDS * len(spec.stages())
    return Estimate(moved, memory - moved, memory * (idle - 1), cache, instructions, waits, per_processor / resident)


def rows_of(spec: LinearSpec, rows: int | None = None) -> int:
    """Returns the rows that a spec counts with; where it leaves them open and nobody says, 64, or `WIDTH`."""
    return spec.rows or rows or (WIDTH if spec.any_width else 64)


def shared_bytes(spec: LinearSpec, rows: int | None = None) -> int:
    """Returns the bytes of activations and of the norm's weight that all programs read, of which memory sends few.

    A norm in front of the form "dot" may go through the rows once more than the product.
    """
    tile, m = spec.tile, rows_of(spec, rows)
    programs = math.ceil(spec.out_features / tile.block_n) * spec.blocks(m)
    passes = 2 if spec.form == "dot" and spec.norm != "none" and not spec.norm_at_the_end else 1
    lines = passes * min(m, tile.block_m) + (spec.norm != "none")
    return programs * lines * spec.in_features * DTYPES[spec.dtype][1]


def _bandwidth_share(spec: LinearSpec, device: Device, programs: float) -> float:
    """Returns the part of the bandwidth that `programs` of a kernel on each processor keep busy.

    About 48 KiB in flight do; copies into shared memory are always on their way, so that the latency itself, of 0.9 us,
    is all that there is to cover.
    """
    tile, bits = spec.tile, _BITS[spec.weights]
    if _pipelined(spec):
        return min(1.0, programs * bytes_ahead(spec) / (device.bandwidth / device.processors * 0.9e-6))
    share = min(1.0, programs * bytes_ahead(spec) / 49152)
    narrow = bits == 4 and tile.block_n * tile.block_k / 8 / (32 * tile.num_warps) < 8  # than 16 bytes of a lane
    return share / 1.5 if narrow else share


def bytes_ahead(spec: LinearSpec) -> float:
    """Returns the bytes of weights that a program has on their way before it uses the first of them."""
    ahead = max(1, min(spec.tile.num_stages - 1, spec.steps)) if _pipelined(spec) else 1
    return _step_bytes(spec) * ahead


def _pipelined(spec: LinearSpec) -> bool:
    """Whether weights of the steps to come are copied into shared memory while a step is computed."""
    return spec.form == "groups" or (spec.form == "dot" and spec.tile.num_stages > 1)


def _step_bytes(spec: LinearSpec) -> float:
    """Returns the bytes of weights of one step of a program."""
    return len(spec.streams) * spec.tile.block_n * spec.tile.block_k * _BITS[spec.weights] / 8


def _shared(spec: LinearSpec) -> int:
    """Estimates the shared memory of a program: steps on their way, with their rows of activations, and some more."""
    if not _pipelined(spec):
        return 4096
    rows = spec.tile.block_m * spec.tile.block_k * DTYPES[spec.dtype][1]
    return math.ceil((spec.tile.num_stages - 1) * (_step_bytes(spec) + rows)) + 4096


def _instructions(spec: LinearSpec, programs: int) -> float:
    """Returns the instructions of all threads: every weight of each tile, and the activations in every program.

    In the form "dot" each warp makes operands of all of them, and normalises them if there is a norm.
    """
    tile = spec.tile
    weights = programs * spec.steps * tile.block_k * tile.block_n * len(spec.streams)
    activations = programs * spec.steps * tile.block_k * tile.block_m / (1 if spec.form == "row" else 4)
    each, x = INSTRUCTIONS[spec.weights], INSTRUCTIONS["x"]
    if spec.form == "dot" and spec.weights == "bf12":
        each = BF12_DOT
    if spec.form == "dot" and spec.norm != "none" and spec.weights != "w4":
        x *= tile.num_warps * NORMALISE[spec.weights]
    once = 250 * programs * 32 * tile.num_warps if spec.weights == "bf12" else 0  # sums of lanes and warps, patches
    return weights * each + activations * x + once


def best_tile(spec: LinearSpec, device: str = DEFAULT_DEVICE, rows: int | None = None) -> LinearSpec:
    """Returns `spec` with the saved tile of the device and this Triton where there is one, else the cost model's.

    Its own is ignored. A device that only a tuning file names counts as the default one in the model; `rows` as in
    `seconds`, but that a kernel for all widths has one tile.
    """
    rows = WIDTH if spec.any_width else rows
    saved = saved_tiles(tuning_file()).get(tuned_for(device), {})
    if tuning_key(spec) in saved:
        return dataclasses.replace(spec, tile=saved[tuning_key(spec)])
    return _modelled(spec, known(device), rows)


@functools.cache
def _modelled(spec: LinearSpec, device: Device, rows: int | None) -> LinearSpec:
    return min(candidates(spec, device), key=lambda candidate: cost(candidate, device, rows))


def cost(spec: LinearSpec, device: Device, rows: int | None = None) -> tuple[bool, float]:
    """Returns what candidates are compared by: whether instructions abound, then the time.

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


def interpreter_tile(spec: LinearSpec) -> LinearSpec:
    """Returns `spec` with a tile for Triton's interpreter, whose time goes by operations and not by their size."""
    width = max(16, least_columns(spec.weights, spec.form), min(512, next_power_of_two(spec.out_features)))
    if spec.matrices and not spec.gated:
        width = math.gcd(width, *spec.matrices)
    depth = max(128, min(2048, next_power_of_two(spec.in_features)))
    return dataclasses.replace(spec, tile=LinearTile(width, depth, least_rows(spec)))


def least_rows(spec: LinearSpec) -> int:
    """Returns the least rows of a tile: columns of a dot, of which at least 8 are made, whatever the rows."""
    if spec.form == "groups":
        return 8 if spec.row_by_row or (spec.rows or 16) <= 8 else 16
    return 1 if spec.row_by_row else 16


def attention_splits(heads: int, slots: int, device: Device, group: int, head_dim: int) -> int:
    """Returns how many programs share the cache of one of all `heads` KV heads, of `group` query heads each."""
    most = math.ceil(slots / ATTENTION_BLOCK).bit_length() - 1

    def time(splits: int) -> float:
        return attention_estimate(heads, slots, device, group, head_dim, splits).total

    return min((1 << power for power in range(most + 1)), key=time)


def attention_estimate(
    heads: int, slots: int, device: Device, group: int, head_dim: int, splits: int, resident: int = 6, times: int = 1
) -> Estimate:
    """Estimates attention in 16 bits, split so often, with so many programs resident on a processor.

    Of several positions `times` programs read the same slots, all but the first from the cache that processors share.

    The loop over blocks is not pipelined: each waits for memory's 0.9 us and for 300 instructions that follow one
    another (counted for heads of 128, 190 for 64), while the other programs of a processor have their turns. The last
    program puts the parts together, 16 KB of them in 0.3 us.
    """
    programs, block = times * heads * splits, 4 * ATTENTION_BLOCK * head_dim
    per_processor = programs / device.processors
    waves = math.ceil(per_processor / resident)
    at_once = min(math.ceil(per_processor), resident)
    instructions = (80 + 1.72 * head_dim) * 128  # of a program's threads, for a block
    moved = 4 * slots * head_dim * heads / device.bandwidth
    issued = device.lanes * device.clock * 0.7
    turns, most = math.ceil(math.ceil(slots / ATTENTION_BLOCK) / splits), math.ceil(per_processor)
    chain = 0.9e-6 + instructions / 128 * 5 / device.clock
    read, issued = (
        block * device.processors / device.bandwidth / times,
        instructions / (device.lanes * device.clock * 0.7),
    )
    parts = 1.5e-6 + 4 * splits * group * head_dim / (16384 / 0.3e-6) if splits > 1 else 0.0
    return Estimate(
        bytes=moved,
        in_flight=turns * waves * max(0.0, chain - at_once * max(read, issued)),
        tail=max(0.0, turns * most * read - moved),
        cache=times * moved * device.bandwidth / device.cache,
        instructions=turns * most * issued,
        waits=parts + waves * 1e-6 + LAUNCH_SECONDS,  # (a program begins with its query)
        waves=per_processor / resident,
    )


def untiled(rows: int, in_features: int, out_features: int, **fields: Any) -> LinearSpec:
    """Returns a spec for `rows` rows with a placeholder tile, the input of `best_tile`; many rows stay open."""
    step = max(128, fields.get("group_size", 64))
    fields = {"weights": "w4", "group_size": 64, "dtype": "bfloat16", **fields}
    exact = rows if rows <= {"w4": MAX_EXACT_ROWS, "bf12": 1, "dense": 0}[fields["weights"]] else None
    row_by_row = exact == 1 or bool(exact and fields.get("experts"))
    form = form_of(fields["weights"], fields["group_size"], fields["dtype"], row_by_row)
    tile = LinearTile(least_columns(fields["weights"], form), step, 1 if form == "row" else 16)
    return LinearSpec(exact, in_features, out_features, tile, **fields)


def tuning_file() -> Path:
    """Returns where tuned tiles are saved."""
    return Path(os.environ.get("RIVER_COMPILE_TUNING") or cache_folder() / "tuning.json")


@functools.cache
def tuned_for(device: str) -> str:
    """Names whom a measured tile is for: "sm_90, triton 3.6", with the version that is installed, or "no triton"."""
    if importlib.util.find_spec("triton") is None:
        return f"{device}, no triton"
    import triton  # (whose packages have several names)

    return f"{device}, triton {'.'.join(triton.__version__.split('.')[:2])}"


def tuning_key(spec: LinearSpec) -> str:
    """Names what a tuned tile is for: the fields of the spec that move bytes or instructions."""
    parts = [spec.weights, spec.group_size, spec.dtype, spec.rows, spec.in_features, spec.out_features, spec.norm]
    stack = [f"of{spec.experts}"] if spec.experts else []
    several = [f"parts{'_'.join(map(str, spec.matrices))}"] if spec.matrices else []
    return "-".join(map(str, [*parts, "gated" if spec.gated else "single", *stack, *several]))


def saved_tiles(path: Path) -> dict[str, dict[str, LinearTile]]:
    """Reads a tuning file; one that is not there is empty, a damaged one is empty with a warning."""
    try:
        return _read_tiles(path, path.stat().st_mtime_ns)
    except (FileNotFoundError, NotADirectoryError):
        return {}


@functools.cache
def _read_tiles(path: Path, _modified: int) -> dict[str, dict[str, LinearTile]]:
    try:
        devices = json.loads(path.read_text())
        return {d: {key: LinearTile(**tile) for key, tile in tiles.items()} for d, tiles in devices.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        warnings.warn(f"the tuning file {path} cannot be read and is ignored: {error}", stacklevel=3)
        return {}
