"""Specs and tiles of the linear kernels, y = epilogue(norm(x) W^T), with 4-bit, 16-bit or lossless 12-bit weights.

Legend: M rows, N output features, K input features, G group size, all of one weight of a gated pair.
Not handled: float16 activations of several rows with weights beyond float16 in the form "dot", and groups of 32 in the
form "groups". Tiles for shapes far from all of a table need `tools.kernels.search`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
import operator
import os
import re
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from river_compile.kernels.checks import check_choice, check_positive
from river_compile.kernels.files import cache_folder
from river_compile.kernels.messages import with_id
from river_compile.kernels.quant.lossless import BLOCK, FOUR, UNIT, UNIT_BYTES
from river_compile.kernels.triton.spec import (
    ACTIVATION_DTYPES,
    DEFAULT_DEVICE,
    Buffer,
    Cost,
    KernelSpec,
    Stage,
    is_power_of_two,
    next_power_of_two,
)

SHIPPED = Path(__file__).with_name("tiles.json")
GROUP_SIZES = (32, 64, 128)
NORMS = ("none", "rms", "rms_plus_one", "layer")
ACTIVATIONS = ("none", "silu", "gelu", "gelu_tanh", "relu")
MAX_EXACT_ROWS = 16  # of decoding and verification; a library multiplies more rows
ATTENTION_BLOCK = 32  # slots of a step of attention
Shape: TypeAlias = tuple[int, int]  # output and input features; of attention KV heads and slots
# By device and form. `SHIPPED` has architectures, and an unknown one takes the nearest older one's tiles. Devices of
# the tuning file include the version of Triton, since another one compiles the same source to other code. Both are
# JSON, {device: {form: {"NxK": fields of the tile, or splits}}}, written by `python -m tools.kernels.tune`.
Table: TypeAlias = dict[str, dict[str, dict[Shape, tuple[int, ...]]]]


def form_of(weights: str, group_size: int, dtype: str, row_by_row: bool) -> str:
    """Return the form of a matmul from the fields of a spec: "groups", "row" or "dot"."""
    # "groups" (4-bit weights, any number of rows): a `tl.dot` for each group, on the bits as they are. Triton before
    # 3.9 would pass each weight of groups of 32 through shared memory again. "row": multiply-adds, for one row. "dot":
    # `tl.dot` on unpacked weights.
    if weights == "w4" and group_size >= 64 and dtype != "float32":
        return "groups"
    return "row" if row_by_row and weights != "dense" else "dot"


def min_columns(weights: str, form: str) -> int:
    """Return the least output features of a tile: one, or a dot's 16, times a unit's of 12-bit weights."""
    one = FOUR if weights == "bf12" else 1
    return one if form == "row" else 16 * one


def part_name(name: str, index: int) -> str:
    """Return the name of the buffer of one of several weights, or of its bias."""
    return f"{name}_{index}" if index else name


@dataclass(frozen=True)
class LinearTile:
    """How one program tiles the matmul; powers of two except `split_k` and `num_stages`."""

    block_n: int  # output features of a program
    block_k: int  # input features of a step; a multiple of the group size for 4-bit weights
    block_m: int = 1  # rows of a program: 1 in the form "row", at least 8 in "groups", at least 16 in "dot"
    split_k: int = 1  # programs that share one output; a second launch adds them in a fixed order, without atomics
    num_warps: int = 4
    num_stages: int = 2  # depth of the software pipeline over the steps

    def __post_init__(self) -> None:
        check_positive(split_k=self.split_k, num_stages=self.num_stages)
        for name in ("block_n", "block_k", "block_m", "num_warps"):
            if not is_power_of_two(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)!r} is not a power of two")


@dataclass(frozen=True)
class LinearSpec(KernelSpec):
    """One linear kernel; the module's head has the legend."""

    family: ClassVar[str] = "linear"
    reduce_block: ClassVar[int] = 256

    # M for 1 to 16 rows; None for any number, given at launch. Weights of 16 bits, and of 12 bits from two rows on,
    # leave it open: these are the unquantized model's, which verifies drafts of several widths, and a row has the same
    # bits in all.
    rows: int | None
    in_features: int
    out_features: int  # of the result; a gated kernel reads 2 N weight rows, the gate's first
    tile: LinearTile
    # "w4", layout "triton" of `quant.layouts`; "dense", [N, K] in `dtype`; "bf12", the 12 bits of `quant.lossless`.
    weights: str = "w4"
    group_size: int = 64  # 32, 64 or 128; 0 for weights that have no groups
    dtype: str = "bfloat16"  # of the activations, the norm's weight, the bias, the residual and the result
    parameter_dtype: str = "float16"  # of scale and zero: float16 or bfloat16
    # "rms": x / rms(x) * w; "rms_plus_one": Gemma's (1 + w); "layer". It needs the whole row and excludes split-K.
    norm: str = "none"
    eps: float = 1e-6  # as in torch
    norm_bias: bool = False
    bias: bool = False
    residual: bool = False  # added last
    activation: str = "none"  # after the bias; in a gated kernel, of the gate only
    gated: bool = False  # the weight holds a gate and an up projection, which are multiplied
    x_stride: int = 0  # elements between two rows of x; 0 stands for K
    # 4-bit weights of a stack, of which each row of x names one; 0 for a single one. Up to 16 rows run one by one, to
    # read only the chosen weights; more rows are sorted by expert, in tiles of rows of one expert.
    experts: int = 0
    matrices: tuple[int, ...] = ()  # rows of each of several dense weights, which are not copied together; () for one

    def __post_init__(self) -> None:
        self._check_choices()
        if self.rows is not None and not 1 <= self.rows <= MAX_EXACT_ROWS:
            raise ValueError(f"rows={self.rows} is outside 1..{MAX_EXACT_ROWS}; use rows=None for more")
        if self.rows not in (None, *{"w4": (self.rows,), "dense": (), "bf12": (1,)}[self.weights]):
            raise ValueError(
                f"rows={self.rows}: one kernel serves any number of rows with weights={self.weights!r}; use rows=None"
            )
        if self.weights == "w4" and self.tile.block_k % self.group_size:
            raise ValueError(f"block_k={self.tile.block_k} is not a multiple of group_size={self.group_size}")
        least = {"row": 1, "groups": 8, "dot": 16}[self.form]
        if self.tile.block_m < least or (self.form == "row" and self.tile.block_m > 1):
            raise ValueError(f"block_m={self.tile.block_m} does not fit the form {self.form!r}: {least} for one row")
        columns = min_columns(self.weights, self.form)
        if self.tile.block_n < columns:
            raise ValueError(f"block_n={self.tile.block_n} is too narrow for form={self.form!r}; at least {columns}")
        if self.form == "dot" and self.dot_length < 16:
            raise ValueError(f"block_k={self.tile.block_k} leaves {self.dot_length} features to a dot; at least 16")
        if self.norm != "none" and self.tile.split_k > 1:
            raise ValueError(f"split_k={self.tile.split_k}: a norm in front needs the whole row; use split_k=1")
        if self.weights == "bf12" and self.tile.block_k % UNIT:
            raise ValueError(f"block_k={self.tile.block_k} does not hold whole units of {UNIT} 12-bit weights")
        if not self.divides_matrices(self.tile):
            raise ValueError(
                f"block_n={self.tile.block_n}, split_k={self.tile.split_k} do not fit {self.matrices} rows"
            )
        steps = math.ceil(self.in_features / self.tile.block_k)
        if self.tile.split_k > steps:
            raise ValueError(f"split_k={self.tile.split_k} exceeds the {steps} steps over K")

    def _check_choices(self) -> None:
        check_choice("weights", self.weights, ("w4", "dense", "bf12"))
        check_choice("dtype", self.dtype, ACTIVATION_DTYPES if self.weights != "bf12" else ("bfloat16",))
        check_choice("parameter_dtype", self.parameter_dtype, ("float16", "bfloat16"))
        check_choice("norm", self.norm, NORMS)
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("group_size", self.group_size, GROUP_SIZES if self.weights == "w4" else (0,))
        check_positive(in_features=self.in_features, out_features=self.out_features)
        if self.experts and (self.weights != "w4" or self.norm != "none" or self.bias or self.residual):
            raise ValueError(f"experts={self.experts} goes with 4-bit weights, without norm, bias and residual")
        rows = self.out_features * len(self.streams)
        if self.matrices and (self.weights != "dense" or sum(self.matrices) != rows or len(self.matrices) < 2):
            raise ValueError(f"matrices={self.matrices} are the rows of several dense weights, {rows} in all")
        if self.matrices and self.gated and self.matrices != (self.out_features,) * 2:
            raise ValueError(f"matrices={self.matrices}: a gated kernel takes a gate and an up projection of one size")
        if self.weights == "bf12" and self.gated and self.out_features % FOUR:
            raise ValueError(f"out_features={self.out_features}: a 12-bit gated pair has a multiple of {FOUR}")
        if self.norm_bias and self.norm != "layer":
            raise ValueError(f"norm_bias=True goes with norm='layer', not with norm={self.norm!r}")
        if self.x_stride and self.x_stride < self.in_features:
            raise ValueError(f"x_stride={self.x_stride} is smaller than the {self.in_features} features of a row")

    def divides_matrices(self, tile: LinearTile) -> bool:
        """Whether each program of a tile has rows of only one of `matrices`; with split-K there is no bias."""
        if not self.matrices:
            return True
        whole = self.gated or all(rows % tile.block_n == 0 for rows in self.matrices)
        return whole and (tile.split_k == 1 or not self.bias)

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the accumulators, one per weight."""
        return ("gate", "up") if self.gated else ("y",)

    @property
    def row_by_row(self) -> bool:
        """Whether a program computes one row."""
        return self.rows == 1 or (self.experts > 0 and self.rows is not None)

    @property
    def any_width(self) -> bool:
        """Whether all numbers of rows run this kernel, so that a row has the same bits in each."""
        return self.rows is None and self.weights != "w4"

    @property
    def form(self) -> str:
        return form_of(self.weights, self.group_size, self.dtype, self.row_by_row)

    @property
    def norm_at_the_end(self) -> bool:
        """Whether an RMSNorm's factor scales the sums of a row instead of each activation."""
        # Activations are rounded before it. In float16 they might overflow.
        no_overflow = self.form == "row" or self.dtype == "bfloat16" or (self.form == "dot" and self.dtype == "float32")
        return no_overflow and self.norm in ("rms", "rms_plus_one")

    @property
    def pair_base(self) -> int:
        """The power of two added to q in the form "groups": the ulp of 128 in bfloat16, of 1024 in float16, is 1."""
        return 128 if self.dtype == "bfloat16" else 1024

    @property
    def weights_made_at_once(self) -> int:
        """Packed weights that each of the counted instructions unpacks."""
        return 2 if self.form == "groups" or self.weights == "bf12" else 1

    @property
    def groups(self) -> int:
        """Groups of one weight row; the last may reach beyond K."""
        return math.ceil(self.in_features / self.group_size)

    @property
    def row_words(self) -> int:
        """32-bit words of one row of 4-bit weights, or of four rows of 12-bit weights."""
        if self.weights == "bf12":
            return math.ceil(self.in_features / UNIT) * UNIT_BYTES // 4
        return self.groups * self.group_size // 8

    @property
    def fours(self) -> int:
        """Units of four output features in 12-bit weights."""
        return math.ceil(self.out_features * len(self.streams) / BLOCK) * BLOCK // FOUR

    @property
    def dot_length(self) -> int:
        """Input features that one `tl.dot` sums."""
        return self.tile.block_k // {"w4": 8, "bf12": 4}.get(self.weights, 1)

    @property
    def steps(self) -> int:
        """Steps of one program over its part of K."""
        return math.ceil(math.ceil(self.in_features / self.tile.block_k) / self.tile.split_k)

    def buffers(self, rows: int | None = None) -> dict[str, Buffer]:
        m, k, n = self.rows or rows, self.in_features, self.out_features
        if m is None:
            raise ValueError(f"this {self.family} kernel takes any number of rows; pass the number as rows")
        found = {"x": Buffer(self.dtype, (m, k), strided=True)}
        if self.experts and self.row_by_row:
            found["expert"] = Buffer("int64", (m,))  # of each row; out of range: the row becomes zeros
        elif self.experts:
            blocks = self.blocks(m)  # of rows of one expert; M in `row` and E in `expert` mean none
            found |= {"row": Buffer("int64", (blocks * self.tile.block_m,)), "expert": Buffer("int64", (blocks,))}
        if self.norm != "none":
            found["norm_weight"] = Buffer(self.dtype, (k,))
        if self.norm_bias:
            found["norm_bias"] = Buffer(self.dtype, (k,))
        found |= self.weight_buffers
        if self.tile.split_k > 1:
            shape = (self.tile.split_k, len(self.streams), m, n)
            found["partial"] = Buffer("float32", shape, workspace=True)
        if self.bias:
            parts = self.matrices or (n * len(self.streams),)
            found |= {part_name("bias", i): Buffer(self.dtype, (size,)) for i, size in enumerate(parts)}
        if self.residual:
            found["residual"] = Buffer(self.dtype, (m, n))
        return {**found, "y": Buffer(self.dtype, (m, n))}

    def blocks(self, rows: int) -> int:
        """Return the row tiles of a launch; the last ones of experts may have gaps."""
        m = self.rows or rows
        if self.row_by_row:
            return m
        gaps = min(self.experts + 1, m) if self.experts else 0
        return m // self.tile.block_m + gaps if gaps else math.ceil(m / self.tile.block_m)

    def cost(self, rows: int | None = None) -> Cost:
        """Return the cost of a call in which as many experts as possible are read."""
        whole = super().cost(rows)
        if not self.experts:
            return whole
        unread = max(0, self.experts - self.buffers(rows)["y"].shape[0])
        stack = sum(buffer.bytes for buffer in self.weight_buffers.values())
        return Cost(whole.bytes - stack // self.experts * unread, whole.flops)

    @property
    def weight_buffers(self) -> dict[str, Buffer]:
        rows = self.out_features * len(self.streams) * max(1, self.experts)
        if self.weights == "dense":
            parts = enumerate(self.matrices or (rows,))
            return {part_name("weight", i): Buffer(self.dtype, (size, self.in_features)) for i, size in parts}
        if self.weights == "bf12":  # without patches, which lie at the end
            side = Buffer("int32", (4 + self.fours + 1,), strided=True)
            return {"units": Buffer("int32", (self.fours, self.row_words)), "side": side}
        return {"qweight": Buffer("int32", (rows, self.row_words)), "scale_zero": Buffer("int32", (rows, self.groups))}

    def stages(self) -> tuple[Stage, ...]:
        tile, n = self.tile, self.out_features
        names, scalars = list(self.buffers(1)), () if self.rows else ("rows",)

        def grid(rows: int) -> tuple[int, int, int]:
            return math.ceil(n / tile.block_n), self.blocks(rows), tile.split_k

        def reduce_grid(rows: int) -> tuple[int, int, int]:
            return math.ceil(n / self.reduce_block), self.rows or rows, 1

        if tile.split_k == 1:
            return (Stage(self.family, (*names, *scalars), grid, tile.num_warps, tile.num_stages),)
        partial = names.index("partial")
        matmul, epilogue = names[: partial + 1], names[partial:]
        return (
            Stage(f"{self.family}_partial", (*matmul, *scalars), grid, tile.num_warps, tile.num_stages),
            Stage(f"{self.family}_reduce", (*epilogue, *scalars), reduce_grid, 4, 1),
        )

    def flops(self, rows: int | None = None) -> int:
        m, n = self.buffers(rows)["y"].shape
        return 2 * m * n * self.in_features * len(self.streams)


def untiled(rows: int, in_features: int, out_features: int, **fields: Any) -> LinearSpec:
    """Return a spec for `rows` rows with a placeholder tile, the input of `best_tile`; many rows stay open."""
    step = max(128, fields.get("group_size", 64))
    fields = {"weights": "w4", "group_size": 64, "dtype": "bfloat16", **fields}
    exact = rows if rows <= {"w4": MAX_EXACT_ROWS, "bf12": 1, "dense": 0}[fields["weights"]] else None
    row_by_row = exact == 1 or bool(exact and fields.get("experts"))
    form = form_of(fields["weights"], fields["group_size"], fields["dtype"], row_by_row)
    tile = LinearTile(min_columns(fields["weights"], form), step, 1 if form == "row" else 16)
    return LinearSpec(exact, in_features, out_features, tile, **fields)


def best_tile(spec: LinearSpec, device: str = DEFAULT_DEVICE) -> LinearSpec:
    """Return `spec` with the tile measured for its shape on this device, else with that of the nearest shape."""
    form, shape = form_key(spec), (spec.out_features, spec.in_features)
    measured = read_table(tuning_file()).get(tuning_key(device), {}).get(form, {})
    shipped = _shipped(device)[form]
    found = measured.get(shape) or shipped[nearest(shipped, shape)]
    return dataclasses.replace(spec, tile=_adapt(LinearTile(*found), spec))


def form_key(spec: LinearSpec) -> str:
    """Names the kind of kernel that a table has tiles for, of any shape."""
    rows = "many rows" if spec.rows is None else f"up to {8 if min_rows(spec) == 8 else MAX_EXACT_ROWS} rows"
    rows = "any rows" if spec.any_width else "one row" if spec.row_by_row else rows
    weights = f"w4/{spec.group_size}" if spec.weights == "w4" else spec.weights
    dtype = "float32" if spec.dtype == "float32" else "16 bits"
    kind = "experts" if spec.experts else "gated" if spec.gated else "single"
    return f"{weights}, {dtype}, {rows}, {kind}{'' if spec.norm == 'none' else ' behind a norm'}"


def min_rows(spec: LinearSpec) -> int:
    """Return the least rows of a tile: a dot has at least 8 columns, for any number of rows."""
    if spec.form == "groups":
        return 8 if spec.row_by_row or (spec.rows or 16) <= 8 else 16
    return 1 if spec.row_by_row else 16


def _adapt(tile: LinearTile, spec: LinearSpec) -> LinearTile:
    """Change another shape's tile for a spec: weights are whole tiles, no split is empty."""
    splits = 1 if spec.matrices and spec.bias else min(tile.split_k, math.ceil(spec.in_features / tile.block_k))
    width = tile.block_n
    if spec.matrices and not spec.gated:
        width = max(math.gcd(width, *spec.matrices), min_columns(spec.weights, spec.form))
    return dataclasses.replace(tile, block_n=width, split_k=splits)


def interpreter_tile(spec: LinearSpec) -> LinearSpec:
    """Return `spec` with a large tile for Triton's interpreter, whose time depends on the number of operations."""
    width = max(16, min_columns(spec.weights, spec.form), min(512, next_power_of_two(spec.out_features)))
    if spec.matrices and not spec.gated:
        width = math.gcd(width, *spec.matrices)
    depth = max(128, min(2048, next_power_of_two(spec.in_features)))
    return dataclasses.replace(spec, tile=LinearTile(width, depth, min_rows(spec)))


def attention_splits(heads: int, slots: int, head_dim: int, device: str = DEFAULT_DEVICE) -> int:
    """Return how many programs share the cache of one of all `heads` KV heads."""
    sizes = {int(form.split()[1]): form for form in _shipped(device) if form.startswith("attention")}
    form = sizes[min(sizes, key=lambda size: (abs(math.log2(size / head_dim)), size))]
    entries = _shipped(device)[form]
    (splits,) = entries[nearest(entries, (heads, slots))]
    return min(splits, 1 << math.ceil(slots / ATTENTION_BLOCK).bit_length() - 1)


def nearest_architecture(name: str, known: Collection[str]) -> str:
    """Return the same architecture, else the newest older one of its vendor, else the oldest, else the default."""
    vendor, number = _numbered(name)
    of_vendor = sorted((other for other in known if _numbered(other)[0] == vendor), key=_numbered)
    older = [other for other in of_vendor if _numbered(other)[1] <= number]
    return (older[-1:] or of_vendor[:1] or [DEFAULT_DEVICE])[0]


def _numbered(architecture: str) -> tuple[str, int]:
    """Parse "sm_90" or "gfx90a" to the vendor's prefix and an increasing number; ("", 0) for anything else."""
    found = re.fullmatch(r"(sm_)(\d+)|(gfx)([0-9a-f]+)", architecture)
    if found is None:
        return "", 0
    vendor, number = filter(None, found.groups())
    return vendor, int(number, 16 if vendor == "gfx" else 10)


def nearest(shapes: Collection[Shape], shape: Shape) -> Shape:
    """Return the nearest shape by the logarithms of both sizes; of equally near ones the least."""

    def distance(other: Shape) -> tuple[float, Shape]:
        return math.log2(other[0] / shape[0]) ** 2 + math.log2(other[1] / shape[1]) ** 2, other

    return min(shapes, key=distance)


@functools.cache
def _shipped(device: str) -> dict[str, dict[Shape, tuple[int, ...]]]:
    table = read_table(SHIPPED)
    return table[nearest_architecture(device, table)]


def tuning_file() -> Path:
    """Return the path of measured tiles: $RIVER_COMPILE_TUNING, or ``tuning.json`` in the cache folder."""
    return Path(os.environ.get("RIVER_COMPILE_TUNING") or cache_folder() / "tuning.json")


@functools.cache
def tuning_key(device: str) -> str:
    """Names the device of measured tiles: "sm_90, triton 3.6" (the installed version), or "sm_90, no triton"."""
    if importlib.util.find_spec("triton") is None:
        return f"{device}, no triton"
    import triton  # not `importlib.metadata`: its packages have several names

    return f"{device}, triton {'.'.join(triton.__version__.split('.')[:2])}"


def read_table(path: Path) -> Table:
    """Read a table; a missing one is empty, a damaged one is empty with a warning."""
    try:
        return _read(path, path.stat().st_mtime_ns)
    except (FileNotFoundError, NotADirectoryError):
        return {}


@functools.cache
def _read(path: Path, _modified: int) -> Table:
    try:
        devices = json.loads(path.read_text(encoding="utf-8"))
        return {
            device: {
                form: {_shape(text): _values(form, found) for text, found in tiles.items()}
                for form, tiles in forms.items()
            }
            for device, forms in devices.items()
        }
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        message = f"Cannot read the tuning file {path}: {error}. Default tiles are used. Delete or repair the file"
        warnings.warn(with_id("RC084", message), stacklevel=3)
        return {}


def _shape(text: str) -> Shape:
    first, second = map(int, text.split("x"))
    return first, second


def _values(form: str, found: Sequence[int]) -> tuple[int, ...]:
    """Return the fields of a tile, or splits; raise a ValueError or TypeError for anything else."""
    if not form.startswith("attention"):
        LinearTile(*found)
    return tuple(map(operator.index, found))
