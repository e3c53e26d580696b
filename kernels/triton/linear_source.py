"""Triton source of the linear kernels (see `linear` for the specs).

How a 4-bit word is read. A word holds 8 weights of one group, nibble j of word i being feature j * (G / 8) + i, so that
the activations of one nibble are consecutive. OR-ing a nibble into the mantissa of 2^23 gives the float 2^23 + 16^p q
(p is the nibble's place in its half word), and one subtraction gives 16^p (q - 8) exactly: no integer conversion. The
power of 16 is taken out again exactly, from the activations (one row) or from the scale (`tl.dot`).

One row:    per word  dot = sum_j (q_j - 8) x_j,  then per group  y += scale * dot + zero * sum_j x_j, in float32.
More rows:  w = (q - 8) * scale + zero, one fused multiply-add per weight, rounded for `tl.dot`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .expressions import Expression, bounded, code, quotient, remainder, symbol
from .linear import REDUCE_BLOCK, LinearSpec
from .spec import Lines, next_power_of_two

ROW_STATISTICS_BLOCK = 1024

TRITON_TYPES = {"float32": "tl.float32", "float16": "tl.float16", "bfloat16": "tl.bfloat16"}

#: Weights of one row pass once and must not push the activations, which every program reads, out of the cache.
STREAMED = ', eviction_policy="evict_first"'

ACTIVATION_CODE = {
    "silu": "{v} / (1.0 + tl.exp(-{v}))",
    "gelu": "0.5 * {v} * (1.0 + tl.erf({v} * 0.7071067811865476))",
    # tanh(u) = 1 - 2 / (exp(2 u) + 1), which stays finite where exp overflows; 2 sqrt(2 / pi) = 1.5957691216057308
    "gelu_tanh": "{v} * (1.0 - 1.0 / (tl.exp(1.5957691216057308 * ({v} + 0.044715 * {v} * {v} * {v})) + 1.0))",
    "relu": "tl.maximum({v}, 0.0)",
}

n, m, t, g, i, k, step, split = (symbol(name) for name in ("n", "m", "t", "g", "i", "k", "step", "split"))


def write_linear(spec: LinearSpec, lines: Lines) -> None:
    """Writes the stages of a linear kernel."""
    stages = spec.stages()
    with _body(stages[0].define, lines):
        if spec.tile.block_m == 1:
            (_write_w4_row if spec.weights == "w4" else _write_dense_row)(spec, lines)
        else:
            _write_dot(spec, lines)
    if len(stages) > 1:
        with _body(stages[1].define, lines):
            _write_reduce(spec, lines)


@contextmanager
def _body(define, lines: Lines) -> Iterator[None]:
    define(lines)
    with lines.indented():
        yield


def masked(*conditions: str | bool, other: str | None = "0.0") -> str:
    """Returns the mask arguments of a load or (`other` None) a store for the conditions that are not empty."""
    used = [f"({condition})" for condition in conditions if condition]
    if not used:
        return ""
    text = used[0][1:-1] if len(used) == 1 else " & ".join(used)
    return f", mask={text}" + (f", other={other}" if other is not None else "")


def nibble(word: str, j: int) -> str:
    """Returns code for 16^(j % 4) * (q - 8) of nibble j, exact in float32; `word` and `word`_high hold the bits."""
    place = j % 4
    source = word if j < 4 else f"{word}_high"
    bits = f"(({source} & {0xF << 4 * place:#x}) | 0x4B000000)"
    return f"({bits}.to(tl.float32, bitcast=True) - {float(2**23 + 8 * 16**place)})"


# ---------------------------------------------------------------------------------------------------------- one row


def _write_w4_row(spec: LinearSpec, lines: Lines) -> None:
    tile, words = spec.tile, spec.group_words
    groups_per_step = tile.block_k // spec.group_size
    shape = f"({tile.block_n}, {groups_per_step}, {words})"
    lines.add(
        f"n = tl.program_id(0) * {tile.block_n} + tl.arange(0, {tile.block_n})[:, None, None]",
        f"lane_g = tl.arange(0, {groups_per_step})[None, :, None]",
        f"i = tl.arange(0, {words})[None, None, :]",
    )
    _write_row_start(spec, lines, shape, f"(1, {groups_per_step}, {words})")
    with lines.loop("step", spec.steps):
        lines.add(f"g = {code(_first_step(spec) * groups_per_step)} + lane_g")
        live_g = f"g < {spec.groups}" if spec.masks_k else ""
        live_n = _live_n(spec)
        # All weight loads stand first: they are what the kernel waits for.
        for stream in spec.streams:
            word = _weight_row(spec, stream) * spec.groups * words + g * words + i
            load = f"qweight_ptr + {code(word)}{masked(live_n, live_g, other='0')}{STREAMED}"
            lines.add(f"{stream}_word = tl.load({load})")
        for stream in spec.streams:
            pair = code(_weight_row(spec, stream) * spec.groups + g)
            lines.add(f"{stream}_pair = tl.load(scale_zero_ptr + {pair}{masked(live_n, live_g, other='0')})")
        for stream in spec.streams:
            _write_parameters(spec, lines, stream)
            lines.add(f"{stream}_word_high = {stream}_word >> 16")
        for j in range(8):
            _write_row_nibble(spec, lines, j)
        for stream in spec.streams:
            lines.add(f"{stream} += {stream}_scale * {stream}_dot + {stream}_zero * x_sum")
    for stream in spec.streams:
        lines.add(f"{stream} = tl.sum(tl.sum({stream}, axis=2), axis=1)")
    _write_row_end(spec, lines, "tl.sum(tl.sum(tl.sum(squares, axis=2), axis=1), axis=0)")


def _write_row_nibble(spec: LinearSpec, lines: Lines, j: int) -> None:
    feature = code(g * spec.group_size + j * spec.group_words + i)
    lines.add(f"# Nibble {j} of every word.", f"k = {feature}")
    _write_row_features(spec, lines, _live_k(spec))
    lines.add("x_sum = x" if j == 0 else "x_sum += x")
    if j % 4:
        lines.add(f"x = x * {16.0 ** -(j % 4)!r}")
    for stream in spec.streams:
        lines.add(f"{stream}_dot {'=' if j == 0 else '+='} {nibble(f'{stream}_word', j)} * x")


def _write_dense_row(spec: LinearSpec, lines: Lines) -> None:
    tile = spec.tile
    lines.add(
        f"n = tl.program_id(0) * {tile.block_n} + tl.arange(0, {tile.block_n})[:, None]",
        f"lane_k = tl.arange(0, {tile.block_k})[None, :]",
    )
    _write_row_start(spec, lines, f"({tile.block_n}, {tile.block_k})", f"(1, {tile.block_k})")
    with lines.loop("step", spec.steps):
        lines.add(f"k = {code(_first_step(spec) * tile.block_k)} + lane_k")
        for stream in spec.streams:
            weight = code(_weight_row(spec, stream) * spec.in_features + k)
            load = f"weight_ptr + {weight}{masked(_live_n(spec), _live_k(spec))}{STREAMED}"
            lines.add(f"{stream}_weight = tl.load({load})")
        _write_row_features(spec, lines, _live_k(spec))
        for stream in spec.streams:
            lines.add(f"{stream} += {stream}_weight.to(tl.float32) * x")
    for stream in spec.streams:
        lines.add(f"{stream} = tl.sum({stream}, axis=1)")
    _write_row_end(spec, lines, "tl.sum(tl.sum(squares, axis=1), axis=0)")


def _write_row_start(spec: LinearSpec, lines: Lines, shape: str, x_shape: str) -> None:
    if _wide(spec):
        lines.add("n = n.to(tl.int64)")
    if spec.tile.split_k > 1:
        lines.add("split = tl.program_id(2)")
    if spec.norm == "layer":
        _write_row_statistics(spec, lines)
    for stream in spec.streams:
        lines.add(f"{stream} = tl.zeros({shape}, tl.float32)")
    if spec.norm.startswith("rms"):
        lines.add(f"squares = tl.zeros({x_shape}, tl.float32)")


def _write_row_features(spec: LinearSpec, lines: Lines, live: str) -> None:
    """Loads x at k as float32 and normalises it; an RMSNorm's common factor is left to the end."""
    lines.add(f"x = tl.load(x_ptr + k{masked(live)}).to(tl.float32)")
    if spec.norm.startswith("rms"):
        lines.add("squares += x * x")
    if spec.norm != "none":
        _write_normalise(spec, lines, by_row=spec.norm == "layer")


def _write_row_end(spec: LinearSpec, lines: Lines, squares: str) -> None:
    tile = spec.tile
    if spec.norm.startswith("rms"):
        lines.add(f"rstd = tl.rsqrt({squares} / {float(spec.in_features)} + {spec.eps!r})")
        lines.add(*(f"{stream} = {stream} * rstd" for stream in spec.streams))
    lines.add(f"n = tl.program_id(0) * {tile.block_n} + tl.arange(0, {tile.block_n})")
    _write_result(spec, lines, 0, [_live_n(spec)])


# ---------------------------------------------------------------------------------------------------- two rows or more


def _write_dot(spec: LinearSpec, lines: Lines) -> None:
    tile = spec.tile
    lines.add(
        f"n = tl.program_id(0) * {tile.block_n} + tl.arange(0, {tile.block_n})[:, None]",
        f"m = tl.program_id(1) * {tile.block_m} + tl.arange(0, {tile.block_m})[:, None]",
        f"t = tl.arange(0, {spec.dot_length})[None, :]",
    )
    live_n, live_m = _live_n(spec), _live_m(spec)
    if _wide(spec):
        lines.add("n = n.to(tl.int64)")
    if tile.split_k > 1:
        lines.add("split = tl.program_id(2)")
    if spec.norm != "none":
        _write_row_statistics(spec, lines)
    for stream in spec.streams:
        lines.add(f"{stream} = tl.zeros(({tile.block_m}, {tile.block_n}), tl.float32)")
    with lines.loop("step", spec.steps):
        (_write_w4_dot_step if spec.weights == "w4" else _write_dense_dot_step)(spec, lines, live_n, live_m)
    lines.add(f"n = tl.program_id(0) * {tile.block_n} + tl.arange(0, {tile.block_n})[None, :]")
    _write_result(spec, lines, m, [live_m, live_n])


def _write_w4_dot_step(spec: LinearSpec, lines: Lines, live_n: str, live_m: str) -> None:
    tile, words = spec.tile, spec.group_words
    groups = tile.block_k // spec.group_size
    first = _first_step(spec)
    word = first * spec.dot_length + t
    live_word = f"{code(word)} < {spec.groups * words}" if spec.masks_k else ""
    lines.add(f"g = {code(first * groups)} + tl.arange(0, {groups})[None, :]")
    live_g = f"g < {spec.groups}" if spec.masks_k else ""
    for stream in spec.streams:
        row = _weight_row(spec, stream)
        address = code(row * spec.groups * words + word)
        lines.add(f"{stream}_word = tl.load(qweight_ptr + {address}{masked(live_n, live_word, other='0')})")
        pair = code(row * spec.groups + g)
        lines.add(f"{stream}_pair = tl.load(scale_zero_ptr + {pair}{masked(live_n, live_g, other='0')})")
        _write_parameters(spec, lines, stream)
        for name in ("scale", "zero"):
            _write_spread(spec, lines, f"{stream}_{name}", groups)
        lines.add(f"{stream}_word_high = {stream}_word >> 16")
    # Feature of nibble j of word t: the quotient names the group, the remainder the place in it.
    limits = {t: spec.dot_length}
    in_step = bounded(quotient(t, words) * spec.group_size + remainder(t, words), limits)
    for j in range(8):
        lines.add(f"# Nibble {j} of every word.", f"k = {code(first * tile.block_k + in_step + j * words, limits)}")
        _write_dot_features(spec, lines, live_m)
        for stream in spec.streams:
            scale = f"{stream}_scale" if j % 4 == 0 else f"({stream}_scale * {16.0 ** -(j % 4)!r})"
            lines.add(f"{stream}_weight = {nibble(f'{stream}_word', j)} * {scale} + {stream}_zero")
            lines.add(f"{stream}_weight = {stream}_weight.to({TRITON_TYPES[spec.dtype]})")
            _write_product(spec, lines, stream)


def _write_spread(spec: LinearSpec, lines: Lines, name: str, groups: int) -> None:
    """Repeats one value per group for every word of the group."""
    if groups > 1:
        block_n, words = spec.tile.block_n, spec.group_words
        lines.add(
            f"{name} = tl.broadcast_to({name}[:, :, None], ({block_n}, {groups}, {words}))",
            f"{name} = tl.reshape({name}, ({block_n}, {spec.dot_length}))",
        )


def _write_dense_dot_step(spec: LinearSpec, lines: Lines, live_n: str, live_m: str) -> None:
    lines.add(f"k = {code(_first_step(spec) * spec.tile.block_k + t)}")
    _write_dot_features(spec, lines, live_m)
    for stream in spec.streams:
        weight = code(_weight_row(spec, stream) * spec.in_features + k)
        lines.add(f"{stream}_weight = tl.load(weight_ptr + {weight}{masked(live_n, _live_k(spec))})")
        _write_product(spec, lines, stream)


def _write_dot_features(spec: LinearSpec, lines: Lines, live_m: str) -> None:
    """Loads x at the tile's rows and features k, normalised, in the activations' dtype."""
    lines.add(f"x = tl.load(x_ptr + {code(m * spec.row_stride + k)}{masked(live_m, _live_k(spec))})")
    if spec.norm != "none":
        lines.add("x = x.to(tl.float32)")
        _write_normalise(spec, lines, by_row=True)
        lines.add(f"x = x.to({TRITON_TYPES[spec.dtype]})")


def _write_product(spec: LinearSpec, lines: Lines, stream: str) -> None:
    precision = ', input_precision="ieee"' if spec.dtype == "float32" else ""
    lines.add(f"{stream} = tl.dot(x, tl.trans({stream}_weight), {stream}{precision})")


# ------------------------------------------------------------------------------------------------------ shared pieces


def _first_step(spec: LinearSpec) -> Expression:
    """Index of the current step among all steps of the matrix."""
    current = step if spec.steps > 1 else 0
    return current + split * spec.steps if spec.tile.split_k > 1 else current


def _weight_row(spec: LinearSpec, stream: str) -> Expression:
    return n + spec.out_features if stream == "up" else n


def _live_n(spec: LinearSpec) -> str:
    return f"n < {spec.out_features}" if spec.masks_n else ""


def _live_k(spec: LinearSpec) -> str:
    return f"k < {spec.in_features}" if spec.masks_k else ""


def _live_m(spec: LinearSpec) -> str:
    limit = "rows" if spec.rows is None else str(spec.rows)
    return f"m < {limit}" if spec.masks_m else ""


def _wide(spec: LinearSpec) -> bool:
    """Whether a weight's address needs 64 bits."""
    elements = spec.in_features * spec.out_features * len(spec.streams)
    return elements // (8 if spec.weights == "w4" else 1) >= 2**31


def _write_parameters(spec: LinearSpec, lines: Lines, stream: str) -> None:
    """Unpacks scale (low half) and zero (high half) of a 32-bit pair into float32."""
    pair = f"{stream}_pair"
    if spec.parameter_dtype == "bfloat16":  # a bfloat16 is the upper half of a float32
        scale, zero = f"({pair} << 16)", f"({pair} & -65536)"
        lines.add(f"{stream}_scale = {scale}.to(tl.float32, bitcast=True)")
        lines.add(f"{stream}_zero = {zero}.to(tl.float32, bitcast=True)")
    else:
        lines.add(f"{stream}_scale = {pair}.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)")
        lines.add(f"{stream}_zero = ({pair} >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)")


def _write_row_statistics(spec: LinearSpec, lines: Lines) -> None:
    """Writes mean (LayerNorm) and rstd of the program's rows; two passes over x, whose second reads the cache.

    `x_row` is the address of the rows. A block of rows has shape [block_m, 1], a single row none.
    """
    block = min(next_power_of_two(spec.in_features), ROW_STATISTICS_BLOCK)
    steps = -(-spec.in_features // block)
    tall = spec.tile.block_m > 1
    row, live_m = (f"{code(m * spec.row_stride)} + ", _live_m(spec)) if tall else ("", "")
    lanes = f"tl.arange(0, {block})" + ("[None, :]" if tall else "")
    axis, keep = (1, "[:, None]") if tall else (0, "")
    shape = f"({spec.tile.block_m}, {block})" if tall else f"({block},)"
    position = f"row_step * {block} + {lanes}" if steps > 1 else lanes
    live = f"row_k < {spec.in_features}" if spec.in_features % block else ""
    centred = spec.norm == "layer"
    for name, value in (("mean", "row"), ("rstd", "row * row"))[0 if centred else 1 :]:
        lines.add(f"sums = tl.zeros({shape}, tl.float32)")
        with lines.loop("row_step", steps):
            lines.add(f"row_k = {position}")
            lines.add(f"row = tl.load(x_ptr + {row}row_k{masked(live_m, live)}).to(tl.float32)")
            if centred and name == "rstd":
                lines.add(f"row = {f'tl.where({live}, row - mean, 0.0)' if live else 'row - mean'}")
            lines.add(f"sums += {value}")
        total = f"tl.sum(sums, axis={axis}){keep} / {float(spec.in_features)}"
        lines.add(f"{name} = {total}" if name == "mean" else f"rstd = tl.rsqrt({total} + {spec.eps!r})")


def _write_normalise(spec: LinearSpec, lines: Lines, *, by_row: bool) -> None:
    """Scales the float32 x; `by_row` applies the row's statistics too. Features beyond K become 0 by their weight."""
    live = masked(_live_k(spec))
    lines.add(f"norm_weight = tl.load(norm_weight_ptr + k{live}).to(tl.float32)")
    weight = "(1.0 + norm_weight)" if spec.norm == "rms_plus_one" else "norm_weight"
    lines.add(f"x = {'(x - mean)' if spec.norm == 'layer' else 'x'} * {f'rstd * {weight}' if by_row else weight}")
    if spec.norm_bias:
        lines.add(f"x += tl.load(norm_bias_ptr + k{live}).to(tl.float32)")


def _write_result(spec: LinearSpec, lines: Lines, row: Expression, live: list[str]) -> None:
    """Stores the accumulators: as partial sums, or through the epilogue."""
    if spec.tile.split_k == 1:
        _write_epilogue(spec, lines, row, live)
        return
    rows = symbol("rows") if spec.rows is None else spec.rows
    for s, stream in enumerate(spec.streams):
        address = code(((split * len(spec.streams) + s) * rows + row) * spec.out_features + n)
        lines.add(f"tl.store(partial_ptr + {address}, {stream}{masked(*live, other=None)})")


def _write_reduce(spec: LinearSpec, lines: Lines) -> None:
    lines.add(f"n = tl.program_id(0) * {REDUCE_BLOCK} + tl.arange(0, {REDUCE_BLOCK})", "m = tl.program_id(1)")
    rows = symbol("rows") if spec.rows is None else spec.rows
    live = f"n < {spec.out_features}" if spec.out_features % REDUCE_BLOCK else ""
    for s, stream in enumerate(spec.streams):
        for part in range(spec.tile.split_k):
            address = code(((part * len(spec.streams) + s) * rows + m) * spec.out_features + n)
            lines.add(f"{stream} {'+' if part else ''}= tl.load(partial_ptr + {address}{masked(live)})")
    _write_epilogue(spec, lines, m, [live])


def _write_epilogue(spec: LinearSpec, lines: Lines, row: Expression, live: list[str]) -> None:
    """Bias, activation, product, residual and cast, in this order, and the store."""
    live_n = next((condition for condition in live if condition.startswith("n ")), "")
    if spec.bias:
        for stream in spec.streams:
            address = code(_weight_row(spec, stream))
            lines.add(f"{stream} += tl.load(bias_ptr + {address}{masked(live_n)}).to(tl.float32)")
    if spec.activation != "none":
        lines.add(f"{spec.streams[0]} = {ACTIVATION_CODE[spec.activation].format(v=spec.streams[0])}")
    result = spec.streams[0]
    if spec.gated:
        lines.add("y = gate * up")
        result = "y"
    address = code(row * spec.out_features + n)
    if spec.residual:
        lines.add(f"y += tl.load(residual_ptr + {address}{masked(*live)}).to(tl.float32)")
    lines.add(f"tl.store(y_ptr + {address}, {result}.to({TRITON_TYPES[spec.out_dtype]}){masked(*live, other=None)})")
