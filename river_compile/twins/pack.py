"""The packed weights of a model's twins: made once, shared by all its graphs, freed with the model, saved on request.

Each matrix product of a twin (a :class:`LinearSite`) is quantized from the parameters it stands for, or its grid is
read from an artifact; packed in the layout of the kernel that will read it, on the parameters' device; and kept under
its first parameter, which is held weakly: when the model goes, so do its twins.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary
from tqdm import tqdm

from river_compile.config import RiverConfig
from river_compile.errors import ArtifactError, OptionError
from river_compile.kernels.quant.calibrated import OBSERVING
from river_compile.kernels.quant.layouts import PackedLinear, pack, pack_stack
from river_compile.passes.program import LinearSite
from river_compile.state import find_state

from .artifact import Artifact, write_artifact
from .make import Grid, PackedSite, extras_of, quantize_site, quantize_stack, version_of
from .observe import ExpertMoments, InputMoments, Observation


def save(model: nn.Module, folder: str | Path) -> Path:
    """Writes the packed twins of a model; ``options={"artifact": folder}`` reads them at the next start.

    Args:
        model: a model that has generated with the backend, so that its twins are packed.
        folder: where to; must not exist or be empty. It appears complete or not at all.

    Returns:
        The folder.

    Raises:
        ArtifactError: (a ``ValueError``) nothing is packed, the weights changed since, or the folder cannot be written.
    """
    folder = Path(folder)
    state = find_state(model)
    made = state.of(PackedWeights).all() if state else []
    if not made:
        raise ArtifactError(
            f"cannot save to {folder}: no twin of this model is packed; generate a token with "
            'model.compile(backend="river") first'
        )
    fresh = [site for site in made if site.sources() is not None]
    stale = sorted({site.name for site in made} - {site.name for site in fresh})
    if stale:
        raise ArtifactError(f"cannot save to {folder}: {changed_since(stale[0])}")
    write_artifact(folder, fresh)
    return folder


def changed_since(name: str) -> str:
    """Returns the message about a product whose parameters are not those that it was made from."""
    fix = "call torch._dynamo.reset() and generate a token first"
    return f"the weights of {name} changed after they were packed; {fix}"


class GraphTwins(tuple[PackedSite, ...]):
    """The packed matrices of one traced graph's twins."""


class PackedWeights:
    """All packed weights of one model; `seconds` is the time that making them took."""

    def __init__(self) -> None:
        self._packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # by first parameter, then by how
        self._lock = threading.Lock()
        self._opened: Artifact | None = None
        self.seconds = 0.0

    def pack(
        self,
        sites: Sequence[LinearSite],
        values: Mapping[fx.Node, Tensor],
        config: RiverConfig,
        observation: Observation | None = None,
    ) -> dict[LinearSite, PackedSite]:
        """Returns the packed weights of the sites, making those that are missing (with a progress bar when many).

        Args:
            sites: matrix products of twins.
            values: the real tensor of each parameter placeholder.
            config: its `quantizer`, `min_sqnr` and `artifact` say how.
            observation: what the matrices read, which "awq" and "gptq" need.

        Raises:
            ArtifactError: (a ``ValueError``) the artifact is damaged or not this model's; nothing of it is used.
            OptionError: (a ``ValueError``) the quantizer needs an observation and has none.
        """
        with self._lock:
            start = time.perf_counter()
            if config.artifact is not None and (self._opened is None or self._opened.folder != Path(config.artifact)):
                self._opened = Artifact(config.artifact)
            maker = _Maker(values, config, None if config.artifact is None else self._opened, observation)
            found = {site: made for site in sites if (made := self._find(site, maker)) is not None}
            missing = [site for site in sites if site not in found]
            found |= self._make(missing, maker)
            self.seconds += time.perf_counter() - start
            return found

    def all(self) -> list[PackedSite]:
        """Returns what is packed at the moment."""
        return [site for sites in self._packed.values() for site in sites.values()]

    def _find(self, site: LinearSite, maker: _Maker) -> PackedSite | None:
        made = self._packed.get(maker.values[site.weights[0]], {}).get(maker.key(site))
        sources = made.sources() if made else None
        same = sources is not None and all(a is b for a, b in zip(sources, maker.sources(site), strict=True))
        return made if same else None

    def _make(self, sites: Sequence[LinearSite], maker: _Maker) -> dict[LinearSite, PackedSite]:
        found = {}
        with (
            ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool,
            tqdm(total=len(sites), desc="river: packing 4-bit twins", unit="matrix", leave=False, delay=1) as bar,
        ):
            # An artifact fits as a whole or not at all: every matrix is looked up before the first one is packed.
            known = list(pool.map(maker.look_up, sites))
            for site, made in zip(sites, pool.map(maker.make, sites, known), strict=True):
                self._packed.setdefault(maker.values[site.weights[0]], {})[maker.key(site)] = made
                found[site] = made
                bar.update()
        return found


@dataclass(frozen=True)
class _Maker:
    """Makes packed products in one way; see `PackedWeights.pack` for the fields."""

    values: Mapping[fx.Node, Tensor]
    config: RiverConfig
    artifact: Artifact | None
    observation: Observation | None

    @property
    def origin(self) -> str:
        return str(self.artifact.folder) if self.artifact else ""

    def key(self, site: LinearSite) -> tuple[object, ...]:
        """Returns what, beside the parameters, decides how a product is packed."""
        observed = self.observation if self.config.quantizer in OBSERVING and self.artifact is None else None
        number = 0 if observed is None else observed.number
        how = (self.config.quantizer, self.config.min_sqnr, self.origin, number)
        return (site.name, site.group_size, site.layout, *how)

    def sources(self, site: LinearSite) -> list[Tensor]:
        """Returns the parameters that a product is made from."""
        return [self.values[node] for node in (*site.weights, *site.biases, *site.folds) if node is not None]

    def look_up(self, site: LinearSite) -> Grid | InputMoments | ExpertMoments | None:
        """Returns what the artifact holds of a product, or what was observed where the quantizer asks for that."""
        quantizer = self.config.quantizer
        if self.artifact is not None:
            return self.artifact.find(site, quantizer, self.sources(site), self.config.min_sqnr)
        if quantizer not in OBSERVING:
            return None
        weight = self.values[site.weights[0]]
        moments: InputMoments | ExpertMoments | None = None
        if self.observation is not None:
            observed = self.observation
            moments = observed.moments_of_stack(weight) if site.experts else observed.moments_of(weight)
        if moments is None:
            why = "was not observed" if self.observation is None else f"was not: no text reached {site.name}"
            raise OptionError(
                f"quantizer={quantizer!r} needs to know what the model's matrices read, and this model {why}; call "
                "river_compile.observe(model, tokenizer, texts) before the first generation, name an artifact=, or use "
                "quantizer='hqq'"
            )
        return moments

    @torch.no_grad()
    def make(self, site: LinearSite, known: Grid | InputMoments | ExpertMoments | None) -> PackedSite:
        """Quantizes, or reads, and packs a product; below the floor there is nothing to pack."""
        made_from = tuple((TensorWeakRef(tensor), version_of(tensor)) for tensor in self.sources(site))
        if isinstance(known, Grid):
            found = known
        elif site.experts:
            each = known.of if isinstance(known, ExpertMoments) else None
            found = quantize_stack(site, self.values[site.weights[0]], self.config.quantizer, each)
        else:
            moments = known.matrix() if isinstance(known, InputMoments) else None
            found = quantize_site(site, self.values, self.config.quantizer, moments)
        reason, weight, scale = found.below(self.config.min_sqnr), None, None
        extras: tuple[Tensor, ...] = ()
        if not reason:
            device = self.values[site.weights[0]].device
            grid = found.weight.unpack() if isinstance(found.weight, PackedLinear) else found.weight
            assert grid is not None, "an artifact refuses what it does not hold"
            scale = None if found.input_scale is None else found.input_scale.to(device)
            grid, extras = grid.to(device), extras_of(site, self.values, scale)
            weight = pack_stack(grid, site.layout, site.experts) if site.experts else pack(grid, site.layout)
        return PackedSite(
            name=site.name,
            out_features=site.out_features,
            in_features=site.in_features,
            transposed=site.transposed,
            group_size=site.group_size,
            quantizer=self.config.quantizer,
            made_from=made_from,
            weight=weight,
            extras=extras,
            input_scale=scale,
            reason=reason,
            sqnr=found.sqnr,
            output_sqnr=found.output_sqnr,
            artifact=self.origin,
            experts=site.experts,
        )
