"""Specs of the linear kernels, y = epilogue(norm(x) W^T), with 4-bit, 16-bit or lossless 12-bit weights.

Legend: M rows, N output features, K input features, G group size, all of one weight of a gated pair.
Not handled: float16 activations of several rows with weights beyond float16 in the form "dot", and groups of 32 in the
form "groups".
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

from river_compile.kernels import MAX_EXACT_ROWS
from river_compile.kernels.checks import check_choice, check_positive
from river_compile.kernels.portable import ACTIVATIONS, NORMS
from river_compile.kernels.quant.lossless import BLOCK, FOUR, UNIT, UNIT_BYTES
from river_compile.kernels.triton.spec import (
    ACTIVATION_DTYPES,
    Buffer,
    Cost,
    KernelSpec,
    Stage,
    is_power_of_two,
)

GROUP_SIZES = (32, 64, 128)


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
class LinearProblem:
    """What a linear kernel computes, whatever its tile; the module's head has the legend."""

    # M for 1 to 16 rows; None for any number, given at launch. Weights of 16 bits, and of 12 bits from two rows on,
    # leave it open: these are the unquantized model's, which verifies drafts of several widths, and a row has the same
    # bits in all.
    rows: int | None
    in_features: int
    out_features: int  # of the result; a gated kernel reads 2 N weight rows, the gate's first
    _: KW_ONLY
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

    def _check_choices(self) -> None:
        check_choice("weights", self.weights, ("w4", "dense", "bf12"))
        check_choice("dtype", self.dtype, ACTIVATION_DTYPES if self.weights != "bf12" else ("bfloat16",))
        check_choice("parameter_dtype", self.parameter_dtype, ("float16", "bfloat16"))
        check_choice("norm", self.norm, NORMS)
        check_choice("activation", self.activation, tuple(ACTIVATIONS))
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
    def weight_buffers(self) -> dict[str, Buffer]:
        rows = self.out_features * len(self.streams) * max(1, self.experts)
        if self.weights == "dense":
            parts = enumerate(self.matrices or (rows,))
            return {part_name("weight", i): Buffer(self.dtype, (size, self.in_features)) for i, size in parts}
        if self.weights == "bf12":  # without patches, which lie at the end
            side = Buffer("int32", (4 + self.fours + 1,), strided=True)
            return {"units": Buffer("int32", (self.fours, self.row_words)), "side": side}
        return {"qweight": Buffer("int32", (rows, self.row_words)), "scale_zero": Buffer("int32", (rows, self.groups))}


@dataclass(frozen=True)
class LinearSpec(LinearProblem, KernelSpec):
    """One linear kernel: a problem and its tile."""

    family: ClassVar[str] = "linear"
    reduce_block: ClassVar[int] = 256

    tile: LinearTile

    def __post_init__(self) -> None:
        super().__post_init__()
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
