"""Linear kernels and exit scores: from tensors to a launch. Rows of x may be strided; the rest is made contiguous.

Norms, activations and layouts are checked in `operators`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from river_compile.kernels.quant import lossless
from river_compile.kernels.quant.layouts import PackedLinear
from river_compile.kernels.triton.cache import ExitScoreSpec
from river_compile.kernels.triton.linear import LinearSpec, part_name, untiled
from river_compile.kernels.triton.loader import device_of, drop_none, dtype_name, find_launch, load
from river_compile.kernels.triton.tiles import best_tile, interpreter_tile


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
    """Run a linear kernel, else as `ops.linear`; several dense weights are stacked, and all have a bias or none."""
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
    others = drop_none(norm_weight=norm_weight, norm_bias=norm_bias, residual=residual)
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
    find_launch(("linear", *packing, norm, eps, activation, gated), given, rows, describe)(given)
    return y.reshape(*x.shape[:-1], n)


def _packed(weight: PackedLinear) -> dict[str, Tensor]:
    if weight.layout == lossless.LAYOUT_12BIT_TRITON:
        return {"units": weight.qweight.flatten(1).view(torch.int32), "side": weight.scale_zero}
    return {"qweight": weight.qweight, "scale_zero": weight.scale_zero.view(torch.int32).squeeze(-1)}


def _weight_fields(weight: PackedLinear | Tensor | Sequence[Tensor]) -> dict[str, Any]:
    if isinstance(weight, PackedLinear) and weight.layout == lossless.LAYOUT_12BIT_TRITON:
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
    """Run a linear kernel of stacked weights in the layout "triton", as `ops.experts`."""
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
    """Sort rows, by `expert` int64 ``[M]``, into blocks of one expert's rows, without a device sync."""
    # Returns "row" int64 [blocks * block_m], M in a gap, and "expert" int64 [blocks], E for a block without rows.
    # `blocks` suffices for any choice of experts (`LinearSpec.blocks`); rows with an invalid expert go to blocks of E.
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


def residual_score(update: Tensor, residual: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
    """Run a kernel as `ops.residual_score`; tensors of different dtypes raise a ValueError too."""
    if not update.shape == residual.shape == previous.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (update, residual, previous))
        raise ValueError(f"update, residual and previous have one shape; these have {shapes}")
    inputs = {"update": update, "residual": residual, "previous": previous}
    given = {name: tensor.reshape(-1, update.shape[-1]).contiguous() for name, tensor in inputs.items()}
    hidden = torch.empty_like(given["update"])
    score = update.new_empty(1, dtype=torch.float32)
    given |= {"hidden": hidden, "score": score}
    rows, features = hidden.shape

    def describe() -> ExitScoreSpec:
        return ExitScoreSpec(rows, features, dtype_name(update))

    find_launch(("exit_score",), given, 1, describe)(given)
    return hidden.view(update.shape), score.view(())
