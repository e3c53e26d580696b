"""The packed weights of a model's twins: made once, shared by all its graphs, freed with the model.

Each matrix product of a twin (a :class:`LinearSite`) is quantized from the parameters it stands for, packed in the
layout of the kernel that will read it, on the parameters' device, and kept under its first parameter, which is held
weakly: when the model goes, so do its twins. Where an artifact is named, the quantized grid is read from there, and
packed as ever.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary
from tqdm import tqdm

from river_compile.kernels.pack import PackedLinear, pack
from river_compile.kernels.quantize import QuantizedWeight, quantize, sqnr_db
from river_compile.passes.types import LinearSite

if TYPE_CHECKING:
    from .artifact import Artifact, SavedMatrix

log = logging.getLogger("river_compile.packing")


@dataclass(frozen=True)
class PackedSite:
    """The 4-bit weights of one matrix product.

    Attributes:
        name: module paths of the linears it stands for, joined by "|".
        tensors: what the twin's graph takes: qweight, scale_zero and, where a linear has one, the bias ``[N]``.
        shape: (out_features, in_features) of the merged matrix.
        group_size: consecutive input features that share a scale and a zero.
        sqnr: signal-to-quantization-noise ratio in dB.
        seconds: time that quantizing (or reading) and packing took.
        layout: name of the packing.
        quantizer: "hqq" or "rtn".
        artifact: the folder that its grid was read from, empty where it was quantized here.
    """

    name: str
    tensors: tuple[Tensor, ...]
    shape: tuple[int, int]
    group_size: int
    sqnr: float
    seconds: float
    layout: str
    quantizer: str
    artifact: str = ""

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors)

    def unpack(self) -> QuantizedWeight:
        """Returns the grid that its bytes stand for."""
        n, k = self.shape
        return PackedLinear(self.layout, *self.tensors[:2], self.group_size, k, n).unpack()


@dataclass(frozen=True)
class _Entry:
    """A packed site and what it was made from: it holds as long as these parameters live and keep their version."""

    packed: PackedSite
    sources: tuple[TensorWeakRef, ...]
    versions: tuple[int, ...]

    def made_from(self, tensors: Sequence[Tensor]) -> bool:
        return all(ref() is t for ref, t in zip(self.sources, tensors, strict=True)) and self.versions == tuple(
            t._version for t in tensors
        )


class PackedWeights:
    """All packed weights of one model."""

    def __init__(self) -> None:
        self._entries: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._lock = threading.Lock()
        self._opened: Artifact | None = None
        self.seconds = 0.0

    def pack(
        self,
        sites: Sequence[LinearSite],
        values: dict[fx.Node, Tensor],
        quantizer: str,
        artifact: str | Path | None = None,
    ) -> dict[LinearSite, PackedSite]:
        """Returns the packed weights of the sites, making those that are missing (with a progress bar when many).

        Args:
            sites: matrix products of twins.
            values: the real tensor of each parameter placeholder.
            quantizer: "hqq" or "rtn".
            artifact: the folder to read grids from instead of quantizing, see :mod:`river_compile.artifact`.

        Raises:
            ArtifactError: (a ``ValueError``) the artifact is damaged or not this model's; nothing of it is used.
        """
        with self._lock:
            start = time.perf_counter()
            maker = _Maker(values, quantizer, self._open(artifact))
            missing = [site for site in sites if self._find(site, maker) is None]
            self._make(missing, maker)
            self.seconds += time.perf_counter() - start
            return {site: self._find(site, maker) for site in sites}

    def all(self) -> list[PackedSite]:
        """Returns what is packed at the moment."""
        return [entry.packed for entry in self._all_entries()]

    def made(self) -> list[tuple[PackedSite, list[Tensor] | None]]:
        """Returns what is packed, each with the parameters it was made from: None where those changed since."""
        pairs = []
        for entry in self._all_entries():
            sources = [ref() for ref in entry.sources]
            alive = all(source is not None for source in sources)
            pairs.append((entry.packed, sources if alive and entry.made_from(sources) else None))
        return pairs

    def _all_entries(self) -> list[_Entry]:
        return [entry for entries in self._entries.values() for entry in entries.values()]

    def _open(self, artifact: str | Path | None) -> Artifact | None:
        """Reads an artifact unless it is the one that was read last."""
        if artifact is None:
            return None
        if self._opened is None or self._opened.folder != Path(artifact):
            from .artifact import Artifact

            self._opened = Artifact(artifact)
        return self._opened

    def _find(self, site: LinearSite, maker: _Maker) -> PackedSite | None:
        entry = self._entries.get(maker.values[site.weights[0]], {}).get(maker.key(site))
        return entry.packed if entry and entry.made_from(_sources(site, maker.values)) else None

    def _make(self, sites: Sequence[LinearSite], maker: _Maker) -> None:
        with (
            ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool,
            tqdm(total=len(sites), desc="river: packing 4-bit twins", unit="matrix", leave=False, delay=1) as bar,
        ):
            # An artifact fits as a whole or not at all: every matrix is looked up before the first one is packed.
            saved = list(pool.map(maker.find_saved, sites))
            for site, packed in zip(sites, pool.map(maker.make, sites, saved), strict=True):
                sources = _sources(site, maker.values)
                entry = _Entry(packed, tuple(map(TensorWeakRef, sources)), tuple(t._version for t in sources))
                self._entries.setdefault(sources[0], {})[maker.key(site)] = entry
                bar.update()


@dataclass(frozen=True)
class _Maker:
    """Makes packed sites in one way: from the parameters, or from an artifact that was made from them."""

    values: dict[fx.Node, Tensor]
    quantizer: str
    artifact: Artifact | None

    @property
    def origin(self) -> str:
        return str(self.artifact.folder) if self.artifact else ""

    def key(self, site: LinearSite) -> tuple:
        return (site.name, site.group_size, site.layout, self.quantizer, self.origin)

    def find_saved(self, site: LinearSite) -> SavedMatrix | None:
        if self.artifact is None:
            return None
        return self.artifact.find(site.name, self.quantizer, site.group_size, _sources(site, self.values))

    @torch.no_grad()
    def make(self, site: LinearSite, saved: SavedMatrix | None) -> PackedSite:
        start = time.perf_counter()
        if saved is None:
            weight = torch.cat([self.values[node].T if site.transposed else self.values[node] for node in site.weights])
            grid = quantize(weight, site.group_size, self.quantizer).rounded(torch.bfloat16)
            sqnr = sqnr_db(weight, grid.dequantize())
        else:
            grid, sqnr = self.artifact.grid(saved).to(self.values[site.weights[0]].device), float(saved.sqnr_db)
        packed = pack(grid, site.layout)
        tensors = (packed.qweight, packed.scale_zero)
        if site.has_bias:
            tensors += (_merged_bias(site, self.values),)
        seconds = time.perf_counter() - start
        return PackedSite(
            site.name, tensors, grid.shape, site.group_size, sqnr, seconds, site.layout, self.quantizer, self.origin
        )


def _sources(site: LinearSite, values: dict[fx.Node, Tensor]) -> list[Tensor]:
    return [values[node] for node in (*site.weights, *site.biases) if node is not None]


def _merged_bias(site: LinearSite, values: dict[fx.Node, Tensor]) -> Tensor:
    like = values[site.weights[0]]
    parts = [
        like.new_zeros(n) if node is None else values[node].detach()
        for node, n in zip(site.biases, site.out_features, strict=True)
    ]
    return torch.cat(parts)
