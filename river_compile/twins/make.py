"""Makes the 4-bit weights of one matrix product of a twin: from the parameters, or from an artifact.

What a product reads is asked of the model's observation where the quantizer needs it. A product whose signal-to-noise
ratio falls below a floor gets no 4-bit weights: the backend then leaves it in 16 bits.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from river_compile.errors import OptionError
from river_compile.kernels.quant.calibrated import OBSERVING, output_sqnr_db, quantize_observed
from river_compile.kernels.quant.grid import QuantizedWeight, quantize, sqnr_db
from river_compile.kernels.quant.layouts import PackedLinear, pack
from river_compile.passes.program import LinearSite

if TYPE_CHECKING:
    from .artifact import Artifact, SavedMatrix
    from .observe import Observation

_STORED_AS = torch.bfloat16  # scale and zero, in the CPU's kernel; others store what is exact for them


@dataclass(frozen=True)
class PackedSite:
    """The 4-bit weights of one matrix product.

    Attributes:
        name: module paths of the linears it stands for, joined by "|".
        tensors: what the twin's graph takes: qweight, scale_zero, the bias ``[N]`` where a linear has one, and where
            inputs are scaled the norm's parameters divided by the scale, or its inverse. None at all where the
            product stays in 16 bits.
        reason: why it stays in 16 bits, empty where it has 4-bit weights.
        out_features: of each linear.
        in_features: of all of them.
        transposed: the parameters are stored as ``[K, N]``.
        group_size: consecutive input features that share a scale and a zero.
        sqnr: signal-to-quantization-noise ratio of the weights in dB.
        seconds: time that quantizing (or reading) and packing took.
        layout: name of the packing.
        quantizer: "hqq", "rtn", "awq" or "gptq".
        artifact: the folder that its grid was read from, empty where it was quantized here.
        output_sqnr: signal-to-noise ratio of the outputs on the observed text in dB, None with "hqq" and "rtn".
        input_scale: float32 ``[K]``, what "awq" divides the inputs by, None where they stay as they are.
    """

    name: str
    tensors: tuple[Tensor, ...]
    out_features: tuple[int, ...]
    in_features: int
    transposed: bool
    group_size: int
    sqnr: float
    seconds: float
    layout: str
    quantizer: str
    artifact: str = ""
    output_sqnr: float | None = None
    input_scale: Tensor | None = None
    reason: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of the merged matrix."""
        return sum(self.out_features), self.in_features

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors)

    @property
    def kept(self) -> bool:
        """True for a product that stays in 16 bits, below the floor of the signal-to-noise ratio."""
        return bool(self.reason)

    @property
    def quality(self) -> float:
        """The signal-to-noise ratio that the floor is about: of the outputs where they were observed."""
        return self.sqnr if self.output_sqnr is None else self.output_sqnr

    def unpack(self) -> QuantizedWeight:
        """Returns the grid that its bytes stand for."""
        n, k = self.shape
        return PackedLinear(self.layout, *self.tensors[:2], self.group_size, k, n).unpack()

    def dequantize(self) -> Tensor:
        """Returns the matrix ``[N, K]`` that the twin multiplies its block's inputs by, float32."""
        weight = self.unpack().dequantize()
        return weight if self.input_scale is None else weight / self.input_scale


@dataclass(frozen=True)
class Maker:
    """Makes packed products in one way.

    Attributes:
        values: the real tensor of each parameter placeholder.
        quantizer: "hqq", "rtn", "awq" or "gptq".
        min_sqnr: products of less dB stay in 16 bits; None for no floor.
        artifact: where to read grids from instead of quantizing.
        observation: what the model's matrices read.
    """

    values: Mapping[fx.Node, Tensor]
    quantizer: str
    min_sqnr: float | None = None
    artifact: Artifact | None = None
    observation: Observation | None = None

    @property
    def origin(self) -> str:
        return str(self.artifact.folder) if self.artifact else ""

    def key(self, site: LinearSite) -> tuple:
        """Returns what, beside the parameters, decides how a product is packed."""
        observes = self.quantizer in OBSERVING and self.artifact is None and self.observation is not None
        observed = self.observation.number if observes else 0
        return (site.name, site.group_size, site.layout, self.quantizer, self.min_sqnr, self.origin, observed)

    def sources(self, site: LinearSite) -> list[Tensor]:
        """Returns the parameters that a product is made from."""
        return [self.values[node] for node in (*site.weights, *site.biases, *site.folds) if node is not None]

    def find_saved(self, site: LinearSite) -> SavedMatrix | None:
        """Returns a product's entry in the artifact, None without one.

        Raises:
            ArtifactError: (a ``ValueError``) it has none that fits.
        """
        if self.artifact is None:
            return None
        saved = self.artifact.find(site.name, self.quantizer, site.group_size, self.sources(site))
        if not self._why_not(saved.quality):
            self.artifact.check_stored(saved)
        return saved

    def check(self, sites: Sequence[LinearSite]) -> None:
        """Raises an OptionError (a ``ValueError``) where the quantizer lacks what it must know of a product."""
        if self.quantizer not in OBSERVING or self.artifact is not None:
            return
        for site in sites:
            if self.observation is None or self.observation.moments_of(self.values[site.weights[0]]) is None:
                why = "was not observed" if self.observation is None else f"was not: no text reached {site.name}"
                raise OptionError(
                    f"quantizer={self.quantizer!r} needs to know what the model's matrices read, and this model {why}; "
                    "call river_compile.observe(model, tokenizer, texts) before the first generation, name an "
                    "artifact=, or use quantizer='hqq'"
                )

    @torch.no_grad()
    def make(self, site: LinearSite, saved: SavedMatrix | None) -> PackedSite:
        """Quantizes, or reads, and packs a product."""
        start = time.perf_counter()
        device = self.values[site.weights[0]].device
        made = self._quantized(site) if saved is None else self._read(saved, device)
        tensors: tuple[Tensor, ...] = ()
        reason = self._why_not(made.quality)
        if made.grid is not None and not reason:
            packed = pack(made.grid, site.layout)
            tensors = (packed.qweight, packed.scale_zero, *self._rest(site, made.input_scale))
        return PackedSite(
            name=site.name,
            tensors=tensors,
            out_features=site.out_features,
            in_features=site.in_features,
            transposed=site.transposed,
            group_size=site.group_size,
            sqnr=made.sqnr,
            seconds=time.perf_counter() - start,
            layout=site.layout,
            quantizer=self.quantizer,
            artifact=self.origin,
            output_sqnr=made.output_sqnr,
            input_scale=made.input_scale if tensors else None,
            reason=reason,
        )

    def _why_not(self, quality: float) -> str:
        """Returns why a product of this signal-to-noise ratio stays in 16 bits, empty where it does not."""
        low = self.min_sqnr is not None and quality < self.min_sqnr
        return f"SQNR below min_sqnr={self.min_sqnr:g} dB" if low else ""

    def _quantized(self, site: LinearSite) -> _Made:
        weight = torch.cat([self.values[node].T if site.transposed else self.values[node] for node in site.weights])
        if self.quantizer not in OBSERVING:
            grid = quantize(weight, site.group_size, self.quantizer).rounded(_STORED_AS)
            return _Made(grid, sqnr_db(weight, grid.dequantize()))
        moments = self.observation.moments_of(self.values[site.weights[0]]).matrix()
        grid, scale = quantize_observed(
            weight, site.group_size, self.quantizer, moments, _STORED_AS, may_scale=site.scales_inputs
        )
        stands_for = grid.dequantize() if scale is None else grid.dequantize() / scale
        return _Made(grid, sqnr_db(weight, stands_for), output_sqnr_db(weight, stands_for, moments), scale)

    def _read(self, saved: SavedMatrix, device: torch.device) -> _Made:
        scale = self.artifact.input_scale(saved)
        return _Made(
            self.artifact.grid(saved).to(device) if saved.stored else None,
            float(saved.sqnr_db),
            None if saved.output_sqnr_db is None else float(saved.output_sqnr_db),
            None if scale is None else scale.to(device),
        )

    def _rest(self, site: LinearSite, scale: Tensor | None) -> list[Tensor]:
        """Returns what a twin's graph takes beside the packed matrix: bias, and what scales the inputs."""
        rest = [_merged_bias(site, self.values)] if site.has_bias else []
        if not site.scales_inputs:
            return rest
        dtype = self.values[site.weights[0]].dtype
        if scale is None:
            scale = torch.ones(site.in_features, device=self.values[site.weights[0]].device)
        if not site.folds:
            return [*rest, scale.reciprocal().to(dtype)]
        folded = [self.values[node].detach() for node in site.folds]
        return [*rest, *((norm.float() / scale).to(norm.dtype) for norm in folded)]


@dataclass(frozen=True)
class _Made:
    """A grid and what it costs; no grid where only the cost was saved."""

    grid: QuantizedWeight | None
    sqnr: float
    output_sqnr: float | None = None
    input_scale: Tensor | None = None

    @property
    def quality(self) -> float:
        """The signal-to-noise ratio that the floor is about: of the outputs where they were observed."""
        return self.sqnr if self.output_sqnr is None else self.output_sqnr


def _merged_bias(site: LinearSite, values: Mapping[fx.Node, Tensor]) -> Tensor:
    like = values[site.weights[0]]
    parts = [
        like.new_zeros(n) if node is None else values[node].detach()
        for node, n in zip(site.biases, site.out_features, strict=True)
    ]
    return torch.cat(parts)
