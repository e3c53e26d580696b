"""Make packed weights: from known quantized ones, or from parameters and statistics of their inputs.

Not handled: statistics and threads (:mod:`river_compile.twins.making`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from river_compile.errors import UnsupportedGraphError
from river_compile.kernels.quant.calibrated import OBSERVING, output_sqnr_db, quantize_observed
from river_compile.kernels.quant.data_free import quantize
from river_compile.kernels.quant.grid import QuantizedWeight, decibels, sqnr_db
from river_compile.kernels.quant.layouts import PackedLinear, pack, pack_lossless, pack_lossless_stack, pack_stack
from river_compile.kernels.quant.quick import can_pack_mse, pack_mse
from river_compile.passes.program import Matmul
from river_compile.twins.observe import ExpertMoments, InputMoments, Moments
from river_compile.twins.weights import LOSSLESS, Parameters, TwinWeight, weak_refs
from river_compile.upstream.tensors import as_ordinary

UNOBSERVED = "hqq"  # reads weights alone: replaces a calibrated quantizer without statistics
QUICK = "mse"  # packed at the speed at which weights are read: drafts until better twins are there
_STORED_AS = torch.bfloat16  # scale and zero-point in the CPU's kernel; others store an exact form
_ROWS_COMPARED = 128  # output features that give the SQNR to a tenth of a dB

# A quantized weight, and the fields of its `TwinWeight` about the loss.
Grid = tuple[QuantizedWeight | PackedLinear, dict[str, Any]]


@torch.no_grad()
def make_weight(
    matmul: Matmul,
    parameters: Parameters,
    digest: str,
    asked: str,
    known: Moments | None,
    device: torch.device,
) -> TwinWeight:
    """Quantize and pack a matmul's weight; raise an UnsupportedGraphError if values are not finite."""
    try:
        grid, facts = _grid(matmul, parameters, asked, known)
    except ValueError as error:
        names = zip(matmul.name.split("|"), parameters.weights, strict=not matmul.experts)
        name = next((name for name, weight in names if not weight.isfinite().all()), matmul.name)
        raise UnsupportedGraphError(
            f"Cannot make a 4-bit twin of {name}: {error}. Load intact weights", id="RC022"
        ) from None
    return pack_weight(matmul, parameters, digest, asked, grid, facts, device)


def pack_weight(
    matmul: Matmul,
    parameters: Parameters,
    digest: str,
    asked: str,
    grid: QuantizedWeight | PackedLinear,
    facts: Mapping[str, Any],
    device: torch.device,
) -> TwinWeight:
    """Pack a known quantized weight for a matmul's kernel; on a CPU, a file's own tensors if they fit."""
    scale = facts.get("input_scale")
    scale = None if scale is None else scale.to(device)
    if isinstance(grid, PackedLinear):
        weight = grid.to(device).as_layout(matmul.layout)
    elif matmul.experts:
        weight = pack_stack(grid.to(device), matmul.layout, matmul.experts)
    else:
        weight = pack(grid.to(device), matmul.layout)
    return TwinWeight(
        matmul=matmul,
        weight=weight,
        extras=tuple(extra.to(device) for extra in _extras(matmul, parameters, scale)),
        asked=asked,
        digest=digest,
        made_from=weak_refs(parameters.tensors),
        **{**facts, "input_scale": scale},
    )


def _grid(matmul: Matmul, parameters: Parameters, asked: str, known: Moments | None) -> Grid:
    if asked == LOSSLESS:
        facts = {"quantizer": asked, "sqnr": math.inf}
        if matmul.experts:
            return pack_lossless_stack(parameters.weights[0], matmul.layout, matmul.transposed), facts
        return pack_lossless(parameters.weights, matmul.layout), facts
    quantizer = UNOBSERVED if known is None and asked in OBSERVING else asked
    if matmul.experts:
        moments = known if isinstance(known, ExpertMoments) else None
        return _quantize_stack(matmul, parameters.weights[0], quantizer, moments)
    return _quantize_matrix(matmul, parameters, quantizer, known if isinstance(known, InputMoments) else None)


def _quantize_matrix(matmul: Matmul, parameters: Parameters, quantizer: str, inputs: InputMoments | None) -> Grid:
    """Quantize a matmul's weight; "awq" and "gptq" need the second moments of its inputs."""
    parts = [w.T if matmul.transposed else w for w in map(as_ordinary, parameters.weights)]
    weight = parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)
    if _packs_at_once(matmul, weight, quantizer):
        return _packed_at_once(matmul, weight)
    some = slice(None, None, max(1, len(weight) // _ROWS_COMPARED))
    sample = weight[some].float()
    if inputs is None:
        grid = quantize(weight, matmul.group_size, quantizer).rounded(_STORED_AS)
        return grid, {"quantizer": quantizer, "sqnr": sqnr_db(sample, grid.rows(some).dequantize())}
    moments = inputs.cheapest(weight.device)
    grid, scale = quantize_observed(
        weight, matmul.group_size, quantizer, moments, _STORED_AS, matmul.scales_inputs, inputs.tokens
    )
    stands_for = grid.rows(some).dequantize() / (1.0 if scale is None else scale)
    return grid, {
        "quantizer": quantizer,
        "input_scale": scale,
        "sqnr": sqnr_db(sample, stands_for),
        "output_sqnr": output_sqnr_db(sample, stands_for, moments),
    }


def _packs_at_once(matmul: Matmul, weight: Tensor, quantizer: str) -> bool:
    return quantizer == QUICK and can_pack_mse(weight, matmul.group_size, matmul.layout)


def _packed_at_once(matmul: Matmul, weight: Tensor) -> Grid:
    packed, sqnr = pack_mse(weight, matmul.group_size)
    return packed, {"quantizer": QUICK, "sqnr": sqnr}


def _quantize_stack(matmul: Matmul, stack: Tensor, quantizer: str, known: ExpertMoments | None) -> Grid:
    """Quantize experts one after another, so that one at a time is in float32."""
    stack = stack.detach().mT if matmul.transposed else stack.detach()
    if _packs_at_once(matmul, stack, quantizer):
        return _packed_at_once(matmul, stack)
    grids, signal, noise = [], [0.0, 0.0], [0.0, 0.0]  # of weights, of outputs
    for expert, weight in enumerate(stack):
        matrix = weight.float()
        if known is None:
            grid = quantize(matrix, matmul.group_size, quantizer).rounded(_STORED_AS)
        else:
            inputs, tokens = known.for_expert(expert, matrix.device)
            few = tokens or math.inf  # all experts' moments are of many
            grid, _ = quantize_observed(matrix, matmul.group_size, quantizer, inputs, _STORED_AS, False, few)
            signal[1] += tokens * inputs.energy(matrix)
            noise[1] += tokens * inputs.energy(matrix - grid.dequantize())
        signal[0] += matrix.square().sum(dtype=torch.float64).item()
        noise[0] += (matrix - grid.dequantize()).square().sum(dtype=torch.float64).item()
        grids.append(grid)
    of_weights, of_outputs = map(decibels, signal, noise)
    facts = {"quantizer": quantizer, "sqnr": of_weights, "output_sqnr": None if known is None else of_outputs}
    return QuantizedWeight.stacked(grids), facts


def _extras(matmul: Matmul, parameters: Parameters, scale: Tensor | None) -> tuple[Tensor, ...]:
    """Return the operands of a twin's graph after the packed weight (see `TwinWeight`)."""
    like = parameters.weights[0]
    scale = None if scale is None else scale.to(like.device)
    extras: list[Tensor] = []
    if any(bias is not None for bias in parameters.biases):
        biases = zip(parameters.biases, matmul.out_features, strict=True)
        zeros = functools.partial(torch.zeros, dtype=like.dtype, device=like.device)
        extras.append(torch.cat([zeros(n) if bias is None else bias.detach() for bias, n in biases]))
    if matmul.scales_inputs:
        scale = torch.ones(matmul.in_features, device=like.device) if scale is None else scale
        norms = [norm.detach() for norm in parameters.folds]
        extras += [(norm.float() / scale).to(norm.dtype) for norm in norms] or [scale.reciprocal().to(like.dtype)]
    return tuple(extras)
