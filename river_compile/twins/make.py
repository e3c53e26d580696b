"""One 4-bit matrix product of a twin: its grid, what the grid costs, and what the twin's graph takes of it.

Not handled: which products are made, and from what; see :mod:`river_compile.twins.pack`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.utils.weak import TensorWeakRef

from river_compile.kernels.quant.calibrated import output_energy, output_sqnr_db, quantize_observed
from river_compile.kernels.quant.grid import QuantizedWeight, decibels, quantize, sqnr_db
from river_compile.kernels.quant.layouts import PackedLinear
from river_compile.passes.program import LinearSite

_STORED_AS = torch.bfloat16  # scale and zero, in the CPU's kernel; others store what is exact for them


@dataclass(frozen=True, kw_only=True)
class Ratios:
    """What a 4-bit matrix costs, in dB of signal to quantization noise.

    Attributes:
        sqnr: of the weights.
        output_sqnr: of the outputs on the observed text, None where nothing was observed.
    """

    sqnr: float
    output_sqnr: float | None = None

    @property
    def quality(self) -> float:
        """The ratio that a floor is about: of the outputs where they were observed."""
        return self.sqnr if self.output_sqnr is None else self.output_sqnr

    def below(self, floor: float | None) -> str:
        """Returns why a matrix stays in 16 bits with this floor in dB (None: no floor), empty where it does not."""
        return f"SQNR below min_sqnr={floor:g} dB" if floor is not None and self.quality < floor else ""


@dataclass(frozen=True, kw_only=True)
class Grid(Ratios):
    """A 4-bit matrix that was just found, or as an artifact holds it (None where it was left in 16 bits).

    `input_scale` is what its inputs are divided by, float32 ``[K]``, None: by nothing.
    """

    weight: QuantizedWeight | PackedLinear | None
    input_scale: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class PackedSite(Ratios):
    """One matrix product of a twin as its kernel reads it, or why it stays in 16 bits.

    Attributes:
        name, out_features, in_features, transposed, group_size, experts: as in its :class:`LinearSite`.
        quantizer: "hqq", "rtn", "awq" or "gptq".
        weight: the packed matrix, None where the product stays in 16 bits.
        extras: what the twin's graph takes after it: the bias ``[N]`` where a linear has one, and where inputs are
            scaled the norm's parameters divided by the scale, or its inverse.
        input_scale: float32 ``[K]``, what "awq" divides the inputs by, None where they stay as they are.
        reason: why the product stays in 16 bits, empty where it does not.
        artifact: the folder that its grid was read from, empty where it was quantized here.
        made_from: the parameters it stands for, each with its version of that time.
    """

    name: str
    out_features: tuple[int, ...]
    in_features: int
    transposed: bool
    group_size: int
    quantizer: str
    made_from: tuple[tuple[TensorWeakRef, int], ...]
    weight: PackedLinear | None = None
    extras: tuple[Tensor, ...] = ()
    input_scale: Tensor | None = None
    reason: str = ""
    artifact: str = ""
    experts: int = 0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the twin's graph takes, in order; nothing where the product stays in 16 bits."""
        return () if self.weight is None else (self.weight.qweight, self.weight.scale_zero, *self.extras)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of the merged matrix; the experts of a stack lie one below the other."""
        return sum(self.out_features), self.in_features

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def kept(self) -> bool:
        """True for a product that stays in 16 bits."""
        return self.weight is None

    def sources(self) -> list[Tensor] | None:
        """Returns the parameters it was made from, None where one of them changed since or is gone."""
        tensors = [ref() for ref, _ in self.made_from]
        fresh = all(t is not None and version_of(t) == v for t, (_, v) in zip(tensors, self.made_from, strict=True))
        return tensors if fresh else None

    def dequantize(self) -> Tensor:
        """Returns the matrix ``[N, K]`` that the twin multiplies its block's inputs by, float32."""
        assert self.weight is not None, f"{self.name} stays in 16 bits"
        weight = self.weight.dequantize()
        return weight if self.input_scale is None else weight / self.input_scale


def quantize_site(
    site: LinearSite, values: Mapping[fx.Node, Tensor], quantizer: str, moments: Tensor | None = None
) -> Grid:
    """Finds the grid of a product; "awq" and "gptq" need the second moments ``[K, K]`` of its inputs.

    `values` are the real tensors of parameter placeholders.
    """
    weight = torch.cat([values[node].T if site.transposed else values[node] for node in site.weights])
    if moments is None:
        grid = quantize(weight, site.group_size, quantizer).rounded(_STORED_AS)
        return Grid(weight=grid, sqnr=sqnr_db(weight, grid.dequantize()))
    grid, scale = quantize_observed(
        weight, site.group_size, quantizer, moments, _STORED_AS, may_scale=site.scales_inputs
    )
    stands_for = grid.dequantize() if scale is None else grid.dequantize() / scale
    return Grid(
        weight=grid,
        input_scale=scale,
        sqnr=sqnr_db(weight, stands_for),
        output_sqnr=output_sqnr_db(weight, stands_for, moments),
    )


def quantize_stack(
    site: LinearSite, stack: Tensor, quantizer: str, moments: Callable[[int], tuple[Tensor, int]] | None = None
) -> Grid:
    """Finds the grids of experts, one after another, so that only one of them is held in float32.

    `moments` gives the second moments ``[K, K]`` of an expert's inputs and over how many tokens.
    """
    grids, signal, noise = [], [0.0, 0.0], [0.0, 0.0]  # of weights, of outputs
    for expert, weight in enumerate(stack.detach().mT if site.transposed else stack.detach()):
        matrix = weight.float()
        if moments is None:
            grid = quantize(matrix, site.group_size, quantizer).rounded(_STORED_AS)
        else:
            inputs, tokens = moments(expert)
            grid, _ = quantize_observed(matrix, site.group_size, quantizer, inputs, _STORED_AS, may_scale=False)
            signal[1] += tokens * output_energy(matrix, inputs)
            noise[1] += tokens * output_energy(matrix - grid.dequantize(), inputs)
        signal[0] += matrix.square().sum(dtype=torch.float64).item()
        noise[0] += (matrix - grid.dequantize()).square().sum(dtype=torch.float64).item()
        grids.append(grid)
    of_weights, of_outputs = map(decibels, signal, noise)
    output_sqnr = None if moments is None else of_outputs
    return Grid(weight=QuantizedWeight.stacked(grids), sqnr=of_weights, output_sqnr=output_sqnr)


def extras_of(site: LinearSite, values: Mapping[fx.Node, Tensor], scale: Tensor | None) -> tuple[Tensor, ...]:
    """Returns what a twin's graph takes beside the packed matrix (see `PackedSite`)."""
    like = values[site.weights[0]]
    extras: list[Tensor] = []
    if site.has_bias:
        biases = zip(site.biases, site.out_features, strict=True)
        extras.append(torch.cat([like.new_zeros(n) if node is None else values[node].detach() for node, n in biases]))
    if site.scales_inputs:
        scale = torch.ones(site.in_features, device=like.device) if scale is None else scale
        norms = [values[node].detach() for node in site.folds]
        extras += [(norm.float() / scale).to(norm.dtype) for norm in norms] or [scale.reciprocal().to(like.dtype)]
    return tuple(extras)


def version_of(tensor: Tensor) -> int:
    """Returns a number that grows with every change in place.

    PyTorch does not count the changes of inference tensors, such as the weights of a model made under
    ``torch.inference_mode()``: they are taken to stay as they are.
    """
    return 0 if tensor.is_inference() else tensor._version
