"""Specs of the linear kernels: y = epilogue(norm(x) W^T), with W in 4 bits, in 16, or in 12 that stand for 16.

Three forms (see the template): "groups" for 4-bit weights in groups of 64 or 128 and activations of 16 bits, whatever
the number of rows: one `tl.dot` for each group, on the bits as they are. Other 4-bit weights, and those of 12 bits, are
a matrix-vector product on ordinary multiply-adds for one row ("row"), else `tl.dot` on weights made beforehand ("dot"),
as those of 16 bits are for any number of rows.

Weights of 16 and 12 bits are the backbone's, which verifies drafts in passes of several widths: one kernel serves them
all and does not know how many rows there are, so a row has the same bits in each (with weights of 12 bits, from two
rows on). Such passes have up to 16 rows; more are a library's.

Split-K writes partial sums that a second launch adds in a fixed order: no atomics, so two runs are bit-identical. A
norm in front needs the whole row and excludes split-K.

With `experts` the weight is a stack of matrices and each row of x names the one it meets: x has the rows that a router
made, one for each token and expert. Up to 16 rows are as many products of one row, so that only matrices that were
chosen are read; more rows are sorted by expert, in tiles of rows of one expert.

Matrices in 16 bits that meet the same x may be several tensors, whose rows `matrices` counts: q|k|v of one product,
gate and up of another. A program finds its own, so that nothing is copied together.

Weights in 12 bits are those of `quant.bf12`: four rows make a unit, and patches are added to the sums afterwards.

Not handled: float16 activations of several rows with weights beyond float16 in the form "dot", which takes both in one
dtype; groups of 32 in the form "groups" (Triton before 3.9
passes each weight through shared memory again).

Legend: M rows, N output features, K input features, G group size, all of one weight matrix of a gated pair.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from river_compile.kernels.checks import check_choice, check_positive
from river_compile.kernels.quant.bf12 import BLOCK, FOUR, UNIT, UNIT_BYTES
from river_compile.kernels.triton.spec import (
    ACTIVATION_DTYPES,
    Buffer,
    Cost,
    KernelSpec,
    Stage,
    is_power_of_two,
)

GROUP_SIZES = (32, 64, 128)
NORMS = ("none", "rms", "rms_plus_one", "layer")
ACTIVATIONS = ("none", "silu", "gelu", "gelu_tanh", "relu")
MAX_EXACT_ROWS = 16


def form_of(weights: str, group_size: int, dtype: str, row_by_row: bool) -> str:
    """Returns the form of a product, by the fields of a spec: "groups", "row" or "dot"."""
    if weights == "w4" and group_size >= 64 and dtype != "float32":
        return "groups"
    return "row" if row_by_row and weights != "dense" else "dot"


def least_columns(weights: str, form: str) -> int:
    """Returns the least output features of a tile: one, or a dot's 16; of weights in 12 bits as many units."""
    one = FOUR if weights == "bf12" else 1
    return one if form == "row" else 16 * one


def part_name(name: str, index: int) -> str:
    """Returns the name of the buffer of one of several matrices, or of its bias."""
    return f"{name}_{index}" if index else name


@dataclass(frozen=True)
class LinearTile:
    """How one program cuts the product; powers of two except `split_k`."""

    block_n: int  # output features of a program
    block_k: int  # input features of a step; a multiple of the group size for 4-bit weights
    block_m: int = 1  # rows of a program: 1 in the form "row", at least 8 in "groups", at least 16 in "dot"
    split_k: int = 1  # programs that share one output; more than 1 adds a second launch
    num_warps: int = 4
    num_stages: int = 2  # depth of the software pipeline over the steps

    def __post_init__(self) -> None:
        check_positive(split_k=self.split_k, num_stages=self.num_stages)
        for name in ("block_n", "block_k", "block_m", "num_warps"):
            if not is_power_of_two(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)!r} is not a power of two")


@dataclass(frozen=True)
class LinearSpec(KernelSpec):
    """One linear kernel. See the module's legend."""

    family: ClassVar[str] = "linear"
    reduce_block: ClassVar[int] = 256

    rows: (
        int | None
    )  # M for 1 to 16 rows; None for any number, given at launch, as all of 16 and several of 12 bits are
    in_features: int
    out_features: int  # of the result; a gated kernel reads 2 N weight rows, the gate's first
    tile: LinearTile
    weights: str = "w4"  # the layout "triton" of `quant.layouts`; "dense", [N, K] in `dtype`; "bf12" of `quant.bf12`
    group_size: int = 64  # 32, 64 or 128; 0 for weights that have no groups
    dtype: str = "bfloat16"  # of the activations, the norm's weight, the bias, the residual and the result
    parameter_dtype: str = "float16"  # of scale and zero: float16 or bfloat16
    norm: str = "none"  # "rms": x / rms(x) * w; "rms_plus_one": Gemma's (1 + w); "layer"
    eps: float = 1e-6  # as in torch
    norm_bias: bool = False
    bias: bool = False
    residual: bool = False  # added last
    activation: str = "none"  # after the bias; in a gated kernel of the gate alone
    gated: bool = False  # the weight holds a gate and an up projection, whose product is the result
    x_stride: int = 0  # elements between two rows of x; 0 stands for K
    experts: int = 0  # matrices of a stack, all 4-bit and of this shape; 0 for a single one
    matrices: tuple[int, ...] = ()  # rows of each of several dense matrices, one below the other; () for a single one

    def __post_init__(self) -> None:
        self._check_choices()
        if self.rows is not None and not 1 <= self.rows <= MAX_EXACT_ROWS:
            raise ValueError(f"rows={self.rows} is outside 1..{MAX_EXACT_ROWS}; use rows=None for more")
        if self.rows not in (None, *{"w4": (self.rows,), "dense": (), "bf12": (1,)}[self.weights]):
            raise ValueError(
                f"rows={self.rows}: one kernel serves all passes of weights={self.weights!r}; use rows=None"
            )
        if self.weights == "w4" and self.tile.block_k % self.group_size:
            raise ValueError(f"block_k={self.tile.block_k} is not a multiple of group_size={self.group_size}")
        least = {"row": 1, "groups": 8, "dot": 16}[self.form]
        if self.tile.block_m < least or (self.form == "row" and self.tile.block_m > 1):
            raise ValueError(f"block_m={self.tile.block_m} does not fit the form {self.form!r}: {least} for one row")
        columns = least_columns(self.weights, self.form)
        if self.tile.block_n < columns:
            raise ValueError(f"block_n={self.tile.block_n} is too narrow for form={self.form!r}; at least {columns}")
        if self.form == "dot" and self.dot_length < 16:
            raise ValueError(f"block_k={self.tile.block_k} leaves {self.dot_length} features to a dot; at least 16")
        if self.norm != "none" and self.tile.split_k > 1:
            raise ValueError(f"split_k={self.tile.split_k}: a norm in front needs the whole row; use split_k=1")
        if self.weights == "bf12" and self.tile.block_k % UNIT:
            raise ValueError(f"block_k={self.tile.block_k} does not hold whole units of {UNIT} weights in 12 bits")
        if not self.parts_fit(self.tile):
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
            raise ValueError(f"matrices={self.matrices} are the rows of several dense matrices, {rows} in all")
        if self.matrices and self.gated and self.matrices != (self.out_features,) * 2:
            raise ValueError(f"matrices={self.matrices}: a gated kernel takes a gate and an up projection of one size")
        if self.weights == "bf12" and self.gated and self.out_features % FOUR:
            raise ValueError(f"out_features={self.out_features}: a pair in 12 bits has a multiple of {FOUR}")
        if self.norm_bias and self.norm != "layer":
            raise ValueError(f"norm_bias=True goes with norm='layer', not with norm={self.norm!r}")
        if self.x_stride and self.x_stride < self.in_features:
            raise ValueError(f"x_stride={self.x_stride} is smaller than the {self.in_features} features of a row")

    def parts_fit(self, tile: LinearTile) -> bool:
        """Whether each program of a tile has one of `matrices` alone; partial sums of several meet no bias."""
        if not self.matrices:
            return True
        whole = self.gated or all(rows % tile.block_n == 0 for rows in self.matrices)
        return whole and (tile.split_k == 1 or not self.bias)

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the accumulators, one per weight matrix."""
        return ("gate", "up") if self.gated else ("y",)

    @property
    def row_by_row(self) -> bool:
        """Whether a program makes one row."""
        return self.rows == 1 or (self.experts > 0 and self.rows is not None)

    @property
    def any_width(self) -> bool:
        """Whether passes of all widths run this kernel, so that a row has the same bits in each."""
        return self.rows is None and self.weights != "w4"

    @property
    def form(self) -> str:
        """How the product is made: "groups", "row" or "dot"."""
        return form_of(self.weights, self.group_size, self.dtype, self.row_by_row)

    @property
    def norm_at_the_end(self) -> bool:
        """Whether an RMSNorm's common factor meets the sums of a row instead of each activation.

        Activations that are rounded before it must not overflow, which in float16 they might.
        """
        fits = self.form == "row" or self.dtype == "bfloat16" or (self.form == "dot" and self.dtype == "float32")
        return fits and self.norm in ("rms", "rms_plus_one")

    @property
    def pair_base(self) -> int:
        """The power of two that the form "groups" puts q into: the ulp of 128 in bfloat16, of 1024 in float16, is 1."""
        return 128 if self.dtype == "bfloat16" else 1024

    @property
    def weights_made_at_once(self) -> int:
        """Packed weights that the instructions which are counted turn into numbers, each."""
        return 2 if self.form == "groups" or self.weights == "bf12" else 1

    @property
    def groups(self) -> int:
        """Groups of one weight row; the last may reach beyond K."""
        return math.ceil(self.in_features / self.group_size)

    @property
    def row_words(self) -> int:
        """32-bit words of one row of 4-bit weights, 8 each; of four rows in 12 bits, those of their units."""
        if self.weights == "bf12":
            return math.ceil(self.in_features / UNIT) * UNIT_BYTES // 4
        return self.groups * self.group_size // 8

    @property
    def fours(self) -> int:
        """Fours of output features that weights in 12 bits have."""
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
            raise ValueError(f"this {self.family} kernel takes any number of rows; say how many")
        found = {"x": Buffer(self.dtype, (m, k), strided=True)}
        if self.experts and self.row_by_row:
            found["expert"] = Buffer("int64", (m,))  # of each row; no matrix's number: the row becomes zeros
        elif self.experts:
            blocks = self.blocks(m)  # of rows of one expert; M in `row` and E in `expert` stand for none
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
        """Returns how many tiles of rows a launch has; experts' last tiles may have gaps."""
        m = self.rows or rows
        if self.row_by_row:
            return m
        gaps = min(self.experts + 1, m) if self.experts else 0
        return m // self.tile.block_m + gaps if gaps else math.ceil(m / self.tile.block_m)

    def cost(self, rows: int | None = None) -> Cost:
        """Returns what a call costs, where every row has an expert of its own as long as there are any."""
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
        if self.weights == "bf12":  # (as if there were no patches, which lie at the end)
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
        partial = names.index("partial")  # what stands before it makes the product, and what comes after it the result
        product, epilogue = names[: partial + 1], names[partial:]
        return (
            Stage(f"{self.family}_partial", (*product, *scalars), grid, tile.num_warps, tile.num_stages),
            Stage(f"{self.family}_reduce", (*epilogue, *scalars), reduce_grid, 4, 1),
        )

    def flops(self, rows: int | None = None) -> int:
        m, n = self.buffers(rows)["y"].shape
        return 2 * m * n * self.in_features * len(self.streams)
