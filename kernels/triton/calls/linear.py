"""Products: from tensors to a linear kernel's launch, for one matrix, several below each other, and stacks of experts.

Buffers are made contiguous where the kernel wants them so; rows of x may be strided. Shapes of `ops.linear` are
flattened to rows here. What the operators check (norms, activations, layouts) is checked there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from river_compile.kernels.quant import bf12
from river_compile.kernels.quant.layouts import PackedLinear
from river_compile.kernels.triton import launch
from river_compile.kernels.triton.devices import device_of
from river_compile.kernels.triton.linear import LinearSpec, part_name
from river_compile.kernels.triton.loader import dtype_name, load
from river_compile.kernels.triton.tiles import best_tile, interpreter_tile, untiled


def linear(
    x: Tensor,
    weight: PackedLinear | Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor] | None,
    residual: Tensor | None = None,
    norm: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    activation: str = "none",
    gated: bool = False,
) -> Tensor:
    """Runs a linear kernel; `weight` is packed for the generated kernels or dense, the rest as in `ops.linear`.

    Several dense matrices stand for one, their rows below each other; each has a bias then, or none has.

    Raises:
        ValueError: a buffer of the wrong shape or dtype, or a combination that no kernel has.
    """
    matrix: dict[str, Tensor]
    if isinstance(weight, PackedLinear):
        matrix, weight_rows = _packed(weight), weight.out_features
    else:
        parts = _parts(weight)
        matrix, weight_rows = _named("weight", parts), sum(part.shape[0] for part in parts)
    n, k = weight_rows // (2 if gated else 1), x.shape[-1]
    x2 = x.reshape(-1, k)
    rows = x2.shape[0]
    if rows > 1 and (x2.stride(1) != 1 or x2.stride(0) < k):
        x2 = x2.contiguous()
    y = x.new_empty((rows, n))
    if rows == 0:
        return y.reshape(*x.shape[:-1], n)
    if residual is not None:
        residual = residual.reshape(-1, n).contiguous()
    others = launch.present(norm_weight=norm_weight, norm_bias=norm_bias, residual=residual)
    given = {"x": x2, **matrix, **others, **_named("bias", _parts(bias)), "y": y}

    def describe() -> LinearSpec:
        spec = untiled(
            rows,
            k,
            n,
            **_weight_fields(weight),
            dtype=dtype_name(x),
            norm=norm,
            eps=eps,
            norm_bias=norm_bias is not None,
            bias=bool(_parts(bias)),
            residual=residual is not None,
            activation=activation,
            gated=gated,
            x_stride=x2.stride(0) if rows > 1 and x2.stride(0) != k else 0,
        )
        return best_tile(spec, device_of(x)) if x.is_cuda else interpreter_tile(spec)

    packing = (weight.group_size, weight.scale_zero.dtype) if isinstance(weight, PackedLinear) else ()
    launch.chosen(("linear", *packing, norm, eps, activation, gated), given, rows, describe)(given)
    return y.reshape(*x.shape[:-1], n)


def _packed(weight: PackedLinear) -> dict[str, Tensor]:
    if weight.layout == bf12.GENERATED:
        return {"units": weight.qweight.flatten(1).view(torch.int32), "side": weight.scale_zero}
    return {"qweight": weight.qweight, "scale_zero": weight.scale_zero.view(torch.int32).squeeze(-1)}


def _weight_fields(weight: PackedLinear | Tensor | Sequence[Tensor]) -> dict[str, Any]:
    if isinstance(weight, PackedLinear) and weight.layout == bf12.GENERATED:
        return {"weights": "bf12", "group_size": 0}
    if isinstance(weight, PackedLinear):
        return {"group_size": weight.group_size, "parameter_dtype": dtype_name(weight.scale_zero)}
    parts = _parts(weight)
    return {"weights": "dense", "group_size": 0, "matrices": tuple(map(len, parts)) if len(parts) > 1 else ()}


def _parts(matrix: Tensor | Sequence[Tensor] | None) -> Sequence[Tensor]:
    return () if matrix is None else (matrix,) if isinstance(matrix, Tensor) else matrix


def _named(name: str, parts: Sequence[Tensor]) -> dict[str, Tensor]:
    return {part_name(name, i): part for i, part in enumerate(parts)}


def experts(x: Tensor, weight: PackedLinear, expert: Tensor) -> Tensor:
    """Runs a linear kernel of stacked matrices; arguments as in `ops.experts`, `weight` in the layout "triton".

    Raises:
        ValueError: a buffer of the wrong shape or dtype.
    """
    (rows, k), n, stack = x.shape, weight.out_features, weight.experts
    y = x.new_empty((rows, n))
    if rows == 0:
        return y
    fields = _weight_fields(weight) | {"dtype": dtype_name(x)}
    spec = untiled(rows, k, n, **fields, experts=stack)
    spec = best_tile(spec, device_of(x)) if x.is_cuda else interpreter_tile(spec)
    matrices = {
        "qweight": weight.qweight.flatten(0, 1),
        "scale_zero": weight.scale_zero.view(torch.int32).squeeze(-1).flatten(0, 1),
    }
    chosen = {"expert": expert.long().contiguous()}
    if not spec.row_by_row:
        chosen = rows_by_expert(chosen["expert"], stack, spec.blocks(rows), spec.tile.block_m)
    load(spec, interpret=not x.is_cuda)(rows=rows, x=x.contiguous(), **chosen, **matrices, y=y)
    return y


def rows_by_expert(expert: Tensor, experts: int, blocks: int, block_m: int) -> dict[str, Tensor]:
    """Sorts rows into blocks of one expert's rows each, without a number that the host would have to wait for.

    Args:
        expert: int64 ``[M]``, the expert of each row; a row with no expert's number goes to blocks of E.
        experts: E.
        blocks: how many are made; enough for whatever the rows chose (`LinearSpec.blocks`).
        block_m: rows of a block.

    Returns:
        "row": int64 ``[blocks * block_m]``, M where a block has a gap; "expert": int64 ``[blocks]``, E for a block
        without rows.
    """
    rows = len(expert)
    expert = torch.where((expert >= 0) & (expert < experts), expert, experts)
    found, order = expert.sort(stable=True)
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=expert.device)
    counts.scatter_add_(0, expert, torch.ones_like(expert))
    needed = (counts + block_m - 1) // block_m  # blocks of each expert
    ends = needed.cumsum(0)
    before = counts.cumsum(0) - counts  # rows of earlier experts
    starts = (ends - needed) * block_m
    place = starts[found] + torch.arange(rows, device=expert.device) - before[found]
    row = torch.full((blocks * block_m,), rows, dtype=torch.int64, device=expert.device)
    owner = torch.searchsorted(ends, torch.arange(blocks, device=expert.device), right=True)
    return {"row": row.scatter_(0, place, order), "expert": owner}
