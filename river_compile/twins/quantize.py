"""Makes the packed matrices of twins: from a known grid, or from weights and what is known of their inputs.

Where a quantizer asks for statistics and there are none, one that looks at weights alone takes its place, and the
product says so. Not handled: which products are made, and when; see :mod:`river_compile.twins.registry`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from river_compile.config import RiverConfig
from river_compile.errors import OptionError, UnsupportedGraphError
from river_compile.kernels.quant.calibrated import OBSERVING
from river_compile.kernels.quant.grid import QuantizedWeight
from river_compile.kernels.quant.layouts import PackedLinear, pack, pack_lossless, pack_stack
from river_compile.passes.program import Matmul
from river_compile.twins.artifact import Artifact
from river_compile.twins.calibration_stats import ExpertMoments, InputMoments, Moments, Observation
from river_compile.twins.packed import LOSSLESS, PackedMatmul, Quantized, extras_of, quantize_site, quantize_stack
from river_compile.twins.parameter_stamp import HeldSources, ParameterStamp, Sources

UNOBSERVED = "hqq"  # what looks at weights alone, for those without statistics
Known = Quantized | Moments | None  # of a product, before it is quantized


@dataclass(frozen=True)
class Maker:
    """Makes packed matmuls in one way.

    Attributes:
        config: its `quantizer` and `artifact` say how.
        artifact: what is read instead of made.
        number: distinguishes the statistics that it was made to use.
        observation: what the matrices read, where that was recorded before.
        lossless: of the backbone's matmuls, which no quantizer and no artifact changes.
    """

    config: RiverConfig
    artifact: Artifact | None
    number: int
    observation: Observation | None = None
    lossless: bool = False

    @property
    def quantizer(self) -> str:
        return LOSSLESS if self.lossless else self.config.quantizer

    @property
    def origin(self) -> str:
        return str(self.artifact.folder) if self.artifact else ""

    def key(self, site: Matmul) -> tuple[object, ...]:
        """Returns the key of a packing beside its parameters."""
        number = self.number if self.needs_statistics else 0
        return site.name, site.group_size, site.layout, self.quantizer, self.origin, number

    @property
    def needs_statistics(self) -> bool:
        """Whether products are made with statistics."""
        return self.artifact is None and self.quantizer in OBSERVING

    def look_up(self, site: Matmul, sources: Sources) -> Known:
        """Returns the artifact's entry of a matmul, or the recorded moments of its inputs, None if there are none."""
        quantizer = self.quantizer
        if self.artifact is not None and (not self.lossless or site.name in self.artifact.names):
            return self.artifact.find(site, quantizer, sources.digest)
        if self.observation is None or not self.needs_statistics:
            return None
        moments = self.observation.moments_of(sources.weights[0])
        if moments is None and not self.observation.own:
            raise OptionError(
                f"quantizer={quantizer!r} needs to know what the model's matrices read, and no observed text reached "
                f"{site.name}; call river_compile.observe(model, tokenizer, texts) with other texts before the first "
                "generation, name an artifact=, or use quantizer='hqq'"
            )
        return moments

    def make(self, site: Matmul, sources: Sources, known: Known) -> PackedMatmul:
        """Quantizes, or reads, and packs a linear."""
        made = _made(site, sources, self.quantizer, known)
        return replace(made, key=self.key(site), artifact=self.origin)


def needs_moments(site: PackedMatmul) -> bool:
    """Tells whether a packed matmul is made again with statistics."""
    return site.asked in OBSERVING


def made_again(site: PackedMatmul, sources: Sources, known: Known) -> PackedMatmul:
    """Returns a new packing of a matmul from its current parameters, which no artifact has."""
    return _made(site.linear, sources, site.asked, known)


@torch.no_grad()
def _made(
    linear: Matmul,
    sources: Sources,
    asked: str,
    known: Known,
) -> PackedMatmul:
    """Packs a product from a known grid, or quantizes it with what is known of its inputs."""
    held, stamp, digest = HeldSources(sources), ParameterStamp(sources.tensors), sources.digest
    found = known if isinstance(known, Quantized) else _quantized(linear, sources, asked, known)
    device = sources.weights[0].device
    scale = None if found.input_scale is None else found.input_scale.to(device)
    return PackedMatmul(
        linear=linear,
        quantizer=found.quantizer,
        asked=asked,
        statistics=found.statistics,
        sources=held,
        stamp=stamp,
        digest=digest,
        weight=_packed(found.weight, linear, device),
        extras=extras_of(linear, sources, scale),
        input_scale=scale,
        sqnr=found.sqnr,
        output_sqnr=found.output_sqnr,
    )


def _packed(weight: QuantizedWeight | PackedLinear, linear: Matmul, device: torch.device) -> PackedLinear:
    """Returns a grid as a product's kernel reads it: the artifact's own tensors where they are that on a CPU."""
    if isinstance(weight, PackedLinear):
        return weight.to(device).as_layout(linear.layout)
    grid, experts = weight.to(device), linear.experts
    return pack_stack(grid, linear.layout, experts) if experts else pack(grid, linear.layout)


def _quantized(linear: Matmul, sources: Sources, asked: str, known: Moments | None) -> Quantized:
    """Raises an UnsupportedGraphError that names the product where its weights, or their inputs, are not finite."""
    try:
        return _grid(linear, sources, asked, known)
    except ValueError as error:
        names = zip(linear.name.split("|"), sources.weights, strict=not linear.experts)
        name = next((name for name, weight in names if not weight.isfinite().all()), linear.name)
        raise UnsupportedGraphError(f"no 4-bit twin can be made of {name}: {error}") from None


def _grid(linear: Matmul, sources: Sources, asked: str, known: Moments | None) -> Quantized:
    if asked == LOSSLESS:
        return Quantized(weight=pack_lossless(sources.weights, linear.layout), quantizer=asked, sqnr=math.inf)
    quantizer = UNOBSERVED if known is None and asked in OBSERVING else asked
    if linear.experts:
        return quantize_stack(
            linear, sources.weights[0], quantizer, known if isinstance(known, ExpertMoments) else None
        )
    return quantize_site(linear, sources.weights, quantizer, known if isinstance(known, InputMoments) else None)
