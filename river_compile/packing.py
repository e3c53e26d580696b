"""The packed weights of a model's twins: made once, shared by all its graphs, freed with the model.

Each matrix product of a twin (a :class:`LinearSite`) is quantized from the parameters it stands for, packed for the
CPU's int4 kernel and kept under its first parameter, which is held weakly: when the model goes, so do its twins.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary
from tqdm import tqdm

from river_compile.kernels.pack import pack
from river_compile.kernels.quantize import quantize, sqnr_db
from river_compile.passes.types import LinearSite

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
        seconds: time that quantizing and packing took.
    """

    name: str
    tensors: tuple[Tensor, ...]
    shape: tuple[int, int]
    group_size: int
    sqnr: float
    seconds: float

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors)


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
        self.seconds = 0.0

    def pack(
        self, sites: Sequence[LinearSite], values: dict[fx.Node, Tensor], quantizer: str
    ) -> dict[LinearSite, PackedSite]:
        """Returns the packed weights of the sites, making those that are missing (with a progress bar when many).

        Args:
            sites: matrix products of twins.
            values: the real tensor of each parameter placeholder.
            quantizer: "hqq" or "rtn".
        """
        with self._lock:
            missing = [site for site in sites if self._find(site, values, quantizer) is None]
            start = time.perf_counter()
            self._make(missing, values, quantizer)
            self.seconds += time.perf_counter() - start
            return {site: self._find(site, values, quantizer) for site in sites}

    def all(self) -> list[PackedSite]:
        """Returns what is packed at the moment."""
        return [entry.packed for entries in self._entries.values() for entry in entries.values()]

    def _find(self, site: LinearSite, values: dict[fx.Node, Tensor], quantizer: str) -> PackedSite | None:
        entry = self._entries.get(values[site.weights[0]], {}).get(_key(site, quantizer))
        return entry.packed if entry and entry.made_from(_sources(site, values)) else None

    def _make(self, sites: Sequence[LinearSite], values: dict[fx.Node, Tensor], quantizer: str) -> None:
        def make(site: LinearSite) -> tuple[LinearSite, PackedSite]:
            return site, _pack_site(site, values, quantizer)

        with (
            ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool,
            tqdm(total=len(sites), desc="river: packing 4-bit twins", unit="matrix", leave=False, delay=1) as bar,
        ):
            for site, packed in pool.map(make, sites):
                sources = _sources(site, values)
                entry = _Entry(packed, tuple(map(TensorWeakRef, sources)), tuple(t._version for t in sources))
                self._entries.setdefault(sources[0], {})[_key(site, quantizer)] = entry
                bar.update()


def _key(site: LinearSite, quantizer: str) -> tuple:
    return (site.name, site.group_size, site.layout, quantizer)


def _sources(site: LinearSite, values: dict[fx.Node, Tensor]) -> list[Tensor]:
    return [values[node] for node in (*site.weights, *site.biases) if node is not None]


@torch.no_grad()
def _pack_site(site: LinearSite, values: dict[fx.Node, Tensor], quantizer: str) -> PackedSite:
    start = time.perf_counter()
    weights = [values[node].T if site.transposed else values[node] for node in site.weights]
    weight = torch.cat(weights)
    quantized = quantize(weight, site.group_size, quantizer).rounded(torch.bfloat16)
    packed = pack(quantized, site.layout)
    tensors = (packed.qweight, packed.scale_zero)
    if site.has_bias:
        tensors += (_merged_bias(site, values, weight.dtype),)
    sqnr = sqnr_db(weight, quantized.dequantize())
    return PackedSite(site.name, tensors, quantized.shape, site.group_size, sqnr, time.perf_counter() - start)


def _merged_bias(site: LinearSite, values: dict[fx.Node, Tensor], dtype: torch.dtype) -> Tensor:
    parts = [
        torch.zeros(n, dtype=dtype) if node is None else values[node].detach()
        for node, n in zip(site.biases, site.out_features, strict=True)
    ]
    return torch.cat(parts)
