"""What a kernel takes on a device, estimated: a roofline with three corrections that decide between tiles at decode.

These are bytes in flight against what hides the memory's latency, whole waves of programs, and instructions, which were
counted in compiled kernels. It is made for the order of candidates, not for the microseconds. The result depends on
the shape and on the named device alone, never on the GPU that is there.
"""

from __future__ import annotations

import math

from river_compile.kernels.triton.linear import LinearSpec, min_columns
from river_compile.kernels.triton.spec import DTYPES
from river_compile.kernels.triton.tiles import ATTENTION_BLOCK

from .devices import Device

#: Instructions per weight of each kind and per activation of a row, counted in the generated code.
INSTRUCTIONS = {"w4": 4.8, "dense": 2.0, "bf12": 5.5, "x": 4.0}
#: In the form "dot", per weight in 12 bits, and per activation and warp behind a norm.
BF12_DOT, NORMALISE = 7.0, {"dense": 1.8, "bf12": 5.7}
_BITS = {"w4": 4, "dense": 16, "bf12": 12}
#: For which the tile of a kernel for all widths is chosen.
WIDTH = 4
_RESIDENT = 6  # programs of attention on a processor
LAUNCH_SECONDS = 2e-6  # from the end of one kernel of a graph until the next one works


def registers(spec: LinearSpec) -> int:
    """Estimate the registers that a thread of the kernel needs; beyond `most_registers` some would spill.

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
        length, operands = tile.block_k // 4, 5.0 if tile.block_n == min_columns(spec.weights, spec.form) else 2.5
    return math.ceil(48 + (tile.block_m * columns + operands * columns * length + tile.block_m * length / 2) / threads)


def thread_instructions(spec: LinearSpec) -> float:
    """Estimate what a thread of the form "groups" executes: a fit to what was counted in compiled kernels."""
    tile, words = spec.tile, spec.group_size / 64
    parts, columns = len(spec.streams) * tile.block_n / 16, tile.block_m / 8  # tiles of 16 weight rows, of 8 rows
    part = 30 * words + columns * (4 * words + 8) + 18  # bits to numbers, dots, scale and zero
    x = columns * words * (6 if spec.norm == "none" else 14 if spec.row_by_row else 34) + 3
    step = tile.block_k / spec.group_size / tile.num_warps * (parts * part + x)
    unrolled = 230 + spec.steps * (16 + step)  # the compiler does so where it stays short
    return unrolled if unrolled <= 1500 else 150 + spec.steps * (52 + step)


def instructions_per_weight(spec: LinearSpec) -> float:
    """Estimate instructions per weight of the form "groups", those of weights beyond the matrix included."""
    weights = len(spec.streams) * spec.tile.block_n * spec.tile.block_k * spec.steps
    return thread_instructions(spec) * 32 * spec.tile.num_warps / weights


def seconds(spec: LinearSpec, device: Device, rows: int | None = None) -> float:
    """Estimate the time of a kernel in seconds; `rows` as in `rows_of`.

    Memory (too few bytes on their way, and processors that are idle in the last wave, make it longer), the cache that
    all processors share and instructions work side by side; launches and steps that follow one another are waited for.
    """
    tile, m = spec.tile, rows_of(spec, rows)
    threads = 32 * tile.num_warps
    programs = math.ceil(spec.out_features / tile.block_n) * spec.blocks(m) * tile.split_k
    resident = min(32, 2048 // threads, 65536 // (registers(spec) * threads), device.shared // _shared(spec))
    resident = max(1, resident)
    per_processor = programs / device.processors
    waves = math.ceil(per_processor / resident)
    moved = spec.cost(m).bytes / device.bandwidth
    memory = moved / _bandwidth_share(spec, device, min(per_processor, resident))
    idle = max(1.0, waves / max(per_processor / resident, 1e-9)) if per_processor > resident else 1.0
    if spec.form == "groups":
        # A processor with one program more than others is what the kernel waits for; ten warps hide their latencies.
        most = math.ceil(per_processor)
        issued = thread_instructions(spec) * threads * most * device.processors
        issued /= min(1.0, min(most, resident) * tile.num_warps / 10)
    else:
        issued = _instructions(spec, programs)
    instructions = issued / (device.processors * device.lanes * device.clock * 0.7)
    if spec.form == "dot":
        weights = programs * spec.steps * tile.block_k * tile.block_n * len(spec.streams)
        instructions += weights * tile.block_m * 2 / (device.dot_flops * 0.3)
    turns = waves * spec.steps * (0.05e-6 if _pipelined(spec) else 0.3e-6)  # or each waits for memory
    cache = (spec.cost(m).bytes + shared_bytes(spec, m)) / device.cache
    waits = turns + LAUNCH_SECONDS * len(spec.stages())
    return max(memory * idle, cache, instructions) + waits


def attention_seconds(heads: int, slots: int, device: Device, group: int, head_dim: int, splits: int) -> float:
    """Estimate attention in 16 bits, split so often, with six programs resident on a processor.

    The loop over blocks is not pipelined. Each block waits for memory's 0.9 us and for 300 instructions that follow
    one another (counted for heads of 128, 190 for 64), while the other programs of a processor run. The last
    program puts the parts together, 16 KB of them in 0.3 us.
    """
    programs, block = heads * splits, 4 * ATTENTION_BLOCK * head_dim
    per_processor = programs / device.processors
    waves = math.ceil(per_processor / _RESIDENT)
    at_once = min(math.ceil(per_processor), _RESIDENT)
    instructions = (80 + 1.72 * head_dim) * 128  # of a program's threads, for a block
    moved = 4 * slots * head_dim * heads / device.bandwidth
    turns, most = math.ceil(math.ceil(slots / ATTENTION_BLOCK) / splits), math.ceil(per_processor)
    chain = 0.9e-6 + instructions / 128 * 5 / device.clock
    read, issued = block * device.processors / device.bandwidth, instructions / (device.lanes * device.clock * 0.7)
    parts = 1.5e-6 + 4 * splits * group * head_dim / (16384 / 0.3e-6) if splits > 1 else 0.0
    in_flight = turns * waves * max(0.0, chain - at_once * max(read, issued))  # (too few bytes are on their way)
    memory, cache = in_flight + max(moved, turns * most * read), moved * device.bandwidth / device.cache
    waits = parts + waves * 1e-6 + LAUNCH_SECONDS  # (a program begins with its query)
    return max(memory, cache, turns * most * issued) + waits


def rows_of(spec: LinearSpec, rows: int | None = None) -> int:
    """Return the rows that a spec counts with; where it leaves them open and no caller says, 64, or `WIDTH`."""
    return spec.rows or rows or (WIDTH if spec.any_width else 64)


def shared_bytes(spec: LinearSpec, rows: int | None = None) -> int:
    """Return the bytes of activations and of the norm's weight that all programs read, of which memory sends few.

    A norm in front of the form "dot" may go through the rows once more than the product.
    """
    tile, m = spec.tile, rows_of(spec, rows)
    programs = math.ceil(spec.out_features / tile.block_n) * spec.blocks(m)
    passes = 2 if spec.form == "dot" and spec.norm != "none" and not spec.norm_at_the_end else 1
    lines = passes * min(m, tile.block_m) + (spec.norm != "none")
    return programs * lines * spec.in_features * DTYPES[spec.dtype][1]


def bytes_ahead(spec: LinearSpec) -> float:
    """Return the bytes of weights that a program has on their way before it uses the first of them."""
    ahead = max(1, min(spec.tile.num_stages - 1, spec.steps)) if _pipelined(spec) else 1
    return _step_bytes(spec) * ahead


def _bandwidth_share(spec: LinearSpec, device: Device, programs: float) -> float:
    """Return the part of the bandwidth that `programs` of a kernel on each processor keep busy.

    About 48 KiB in flight do; copies into shared memory are always on their way, so that the latency itself, of 0.9 us,
    is all that there is to cover.
    """
    tile, bits = spec.tile, _BITS[spec.weights]
    if _pipelined(spec):
        return min(1.0, programs * bytes_ahead(spec) / (device.bandwidth / device.processors * 0.9e-6))
    share = min(1.0, programs * bytes_ahead(spec) / 49152)
    narrow = bits == 4 and tile.block_n * tile.block_k / 8 / (32 * tile.num_warps) < 8  # than 16 bytes of a lane
    return share / 1.5 if narrow else share


def _pipelined(spec: LinearSpec) -> bool:
    """Whether weights of the steps to come are copied into shared memory while a step is computed."""
    return spec.form == "groups" or (spec.form == "dot" and spec.tile.num_stages > 1)


def _step_bytes(spec: LinearSpec) -> float:
    """Return the bytes of weights of one step of a program."""
    return len(spec.streams) * spec.tile.block_n * spec.tile.block_k * _BITS[spec.weights] / 8


def _shared(spec: LinearSpec) -> int:
    """Estimate the shared memory of a program: steps on their way, with their rows of activations, and some more."""
    if not _pipelined(spec):
        return 4096
    rows = spec.tile.block_m * spec.tile.block_k * DTYPES[spec.dtype][1]
    return math.ceil((spec.tile.num_stages - 1) * (_step_bytes(spec) + rows)) + 4096


def _instructions(spec: LinearSpec, programs: int) -> float:
    """Return the instructions of all threads: every weight of each tile, and the activations in every program.

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
