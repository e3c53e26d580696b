"""One 4-bit matmul of a twin: its grid, what the grid costs, and what the twin's graph takes of it.

Not handled: which matmuls are made, and from what; see :mod:`river_compile.twins.registry`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from river_compile.errors import UnsupportedGraphError
from river_compile.kernels.quant.calibrated import output_sqnr_db, quantize_observed
from river_compile.kernels.quant.grid import QuantizedWeight, decibels, quantize, sqnr_db
from river_compile.kernels.quant.layouts import PackedLinear
from river_compile.passes.program import Matmul
from river_compile.twins.calibration_stats import ExpertMoments, InputMoments
from river_compile.twins.parameter_stamp import HeldSources, ParameterStamp, Sources
from river_compile.upstream.tensors import as_ordinary

LOSSLESS = "lossless"  # stands for a quantizer where weights stay what they are
_STORED_AS = torch.bfloat16  # scale and zero, in the CPU's kernel; others store what is exact for them
_ROWS_COMPARED = 256  # output features by which the outputs' ratio is known to a few hundredths of a dB


@dataclass(kw_only=True)
class Quantized:
    """A 4-bit matrix that was just found, or as an artifact holds it; ratios are signal to quantization noise in dB."""

    weight: QuantizedWeight | PackedLinear
    quantizer: str  # what found it
    sqnr: float  # of the weights
    output_sqnr: float | None = None  # of the outputs on the observed text, None if nothing was observed
    statistics: str = ""  # what the quantizer knew of the inputs, in words; empty if it looked at the weights alone
    input_scale: Tensor | None = None  # float32 [K], what its inputs are divided by; None: by nothing

    @property
    def quality(self) -> float:
        """The ratio of the outputs if they were observed, else of the weights."""
        return self.sqnr if self.output_sqnr is None else self.output_sqnr


@dataclass(kw_only=True, eq=False)
class PackedMatmul(Quantized):
    """One matmul of a twin, or of a packed backbone, as its kernel reads it.

    It is one object, with the same tensors, for as long as graphs are compiled with them: where its parameters change
    it is packed again in place (:meth:`become`).
    """

    weight: PackedLinear
    linear: Matmul  # which it is
    asked: str  # the quantizer that the options ask for
    sources: HeldSources  # the parameters that it stands for
    stamp: ParameterStamp  # how they looked when they were last compared
    digest: str  # their hash; see parameter_stamp.py
    # What the twin's graph takes after the matrix: the bias [N], if any, and for scaled inputs the norm's
    # parameters divided by the scale, or its inverse.
    extras: tuple[Tensor, ...] = ()
    artifact: str = ""  # the folder that it was read from, empty if it was quantized here
    key: tuple[object, ...] = ()  # how it was asked for, beside its parameters

    @property
    def name(self) -> str:
        return self.linear.name

    @property
    def group_size(self) -> int:
        return self.linear.group_size

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of the merged matrix."""
        return self.linear.shape

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The operands of the twin's graph, in order."""
        return self.weight.qweight, self.weight.scale_zero, *self.extras

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def stands_for(self, sources: Sources, *, thorough: bool = False) -> bool:
        """Tells whether it was made from these parameters as they are now, by their digest if their stamp differs.

        Those that it was made from and that were put elsewhere, or others of the same content, are its sources then.
        """
        stamp = ParameterStamp(sources.tensors)
        if not thorough and stamp == self.stamp:
            sources.known_as(self.digest)
            return True
        if sources.digest != self.digest:
            return False
        self.sources, self.stamp = HeldSources(sources), stamp
        return True

    def fresh_sources(self) -> Sources | None:
        """Returns the parameters it was made from, None if one of them changed since or is gone."""
        sources = self.sources.get()
        return sources if sources is not None and self.stands_for(sources) else None

    def become(self, other: PackedMatmul) -> None:
        """Takes over another packing of the same linear, in the tensors that compiled code holds.

        Raises:
            UnsupportedGraphError: weights of the backbone have values now that these do not hold.
        """
        taken = other.tensors
        if self.weight.unpacked:
            taken = (other.weight.dequantize(self.weight.qweight.dtype), self.weight.scale_zero, *other.extras)
        if [mine.shape for mine in self.tensors] != [new.shape for new in taken]:
            raise UnsupportedGraphError(
                f"the weights of {self.name} changed, and what they were packed in ({self.weight.layout}) does not "
                "hold them; use backbone_weights='model'"
            )
        with torch.inference_mode():  # (which may write to any tensor)
            for mine, new in zip(self.tensors, taken, strict=True):
                mine.copy_(new)
        self.quantizer, self.statistics = other.quantizer, other.statistics
        self.artifact, self.input_scale = other.artifact, other.input_scale
        self.sources, self.stamp, self.digest = other.sources, other.stamp, other.digest
        self.sqnr, self.output_sqnr = other.sqnr, other.output_sqnr

    def dequantize(self) -> Tensor:
        """Returns the matrix ``[N, K]`` that the twin multiplies its block's inputs by, float32."""
        weight = self.weight.dequantize()
        return weight if self.input_scale is None else weight / self.input_scale


def quantize_site(
    linear: Matmul, weights: Sequence[Tensor], quantizer: str, inputs: InputMoments | None = None
) -> Quantized:
    """Finds the grid of a product's weights; "awq" and "gptq" need the second moments of its inputs."""
    weight = torch.cat([w.T if linear.transposed else w for w in map(as_ordinary, weights)])
    if inputs is None:
        grid = quantize(weight, linear.group_size, quantizer).rounded(_STORED_AS)
        return Quantized(weight=grid, quantizer=quantizer, sqnr=sqnr_db(weight, grid.dequantize()))
    moments = inputs.cheapest(weight.device)
    grid, scale = quantize_observed(
        weight, linear.group_size, quantizer, moments, _STORED_AS, linear.scales_inputs, inputs.tokens
    )
    stands_for = grid.dequantize() if scale is None else grid.dequantize() / scale
    some = slice(None, None, max(1, len(weight) // _ROWS_COMPARED))
    return Quantized(
        weight=grid,
        quantizer=quantizer,
        input_scale=scale,
        sqnr=sqnr_db(weight, stands_for),
        output_sqnr=output_sqnr_db(weight[some], stands_for[some], moments),
    )


def quantize_stack(linear: Matmul, stack: Tensor, quantizer: str, known: ExpertMoments | None = None) -> Quantized:
    """Finds the grids of experts, one after another, so that only one of them is held in float32."""
    grids, signal, noise = [], [0.0, 0.0], [0.0, 0.0]  # of weights, of outputs
    for expert, of_expert in enumerate(stack.detach().mT if linear.transposed else stack.detach()):
        matrix = of_expert.float()
        if known is None:
            grid = quantize(matrix, linear.group_size, quantizer).rounded(_STORED_AS)
        else:
            inputs, tokens = known.of(expert, matrix.device)
            few = tokens or math.inf  # (the moments of all experts are of many)
            grid, _ = quantize_observed(matrix, linear.group_size, quantizer, inputs, _STORED_AS, False, few)
            signal[1] += tokens * inputs.energy(matrix)
            noise[1] += tokens * inputs.energy(matrix - grid.dequantize())
        signal[0] += matrix.square().sum(dtype=torch.float64).item()
        noise[0] += (matrix - grid.dequantize()).square().sum(dtype=torch.float64).item()
        grids.append(grid)
    of_weights, of_outputs = map(decibels, signal, noise)
    output_sqnr = None if known is None else of_outputs
    weight = QuantizedWeight.stacked(grids)
    return Quantized(weight=weight, quantizer=quantizer, sqnr=of_weights, output_sqnr=output_sqnr)


def extras_of(linear: Matmul, sources: Sources, scale: Tensor | None) -> tuple[Tensor, ...]:
    """Returns what a twin's graph takes beside the packed matrix (see `PackedMatmul`)."""
    like = sources.weights[0]
    extras: list[Tensor] = []
    if any(bias is not None for bias in sources.biases):
        biases = zip(sources.biases, linear.out_features, strict=True)
        zeros = functools.partial(torch.zeros, dtype=like.dtype, device=like.device)
        extras.append(torch.cat([zeros(n) if bias is None else bias.detach() for bias, n in biases]))
    if linear.scales_inputs:
        scale = torch.ones(linear.in_features, device=like.device) if scale is None else scale
        norms = [norm.detach() for norm in sources.folds]
        extras += [(norm.float() / scale).to(norm.dtype) for norm in norms] or [scale.reciprocal().to(like.dtype)]
    return tuple(extras)
