"""The packed weights of a model's twins: made once, shared by all its graphs, freed with the model.

Each matrix product of a twin (a :class:`LinearSite`) is quantized from the parameters it stands for, packed in the
layout of the kernel that will read it, on the parameters' device, and kept under its first parameter, which is held
weakly: when the model goes, so do its twins. Where an artifact is named, the quantized grid is read from there, and
packed as ever.
"""

from __future__ import annotations

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

from river_compile.passes.program import LinearSite

from .make import Maker, PackedSite
from .versions import version_of

if TYPE_CHECKING:
    from .artifact import Artifact
    from .observe import Observation


@dataclass(frozen=True)
class _Entry:
    """A packed site and what it was made from: it holds as long as these parameters live and keep their version."""

    packed: PackedSite
    sources: tuple[TensorWeakRef, ...]
    versions: tuple[int, ...]

    def made_from(self, tensors: Sequence[Tensor]) -> bool:
        same = all(ref() is t for ref, t in zip(self.sources, tensors, strict=True))
        return same and self.versions == tuple(map(version_of, tensors))


class GraphTwins(tuple[PackedSite, ...]):
    """The packed matrices of one traced graph's twins."""


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
        min_sqnr: float | None = None,
        observation: Observation | None = None,
    ) -> dict[LinearSite, PackedSite]:
        """Returns the packed weights of the sites, making those that are missing (with a progress bar when many).

        Args:
            sites: matrix products of twins.
            values: the real tensor of each parameter placeholder.
            quantizer: "hqq", "rtn", "awq" or "gptq".
            artifact: the folder to read grids from instead of quantizing, see :mod:`river_compile.twins.artifact`.
            min_sqnr: dB below which a product stays in 16 bits (`PackedSite.kept`), see there; None for no floor.
            observation: what the matrices read, which "awq" and "gptq" need.

        Raises:
            ArtifactError: (a ``ValueError``) the artifact is damaged or not this model's; nothing of it is used.
            OptionError: (a ``ValueError``) the quantizer needs an observation and has none.
        """
        with self._lock:
            start = time.perf_counter()
            maker = Maker(values, quantizer, min_sqnr, self._open(artifact), observation)
            missing = [site for site in sites if self._find(site, maker) is None]
            maker.check(missing)
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

    def _find(self, site: LinearSite, maker: Maker) -> PackedSite | None:
        entry = self._entries.get(maker.values[site.weights[0]], {}).get(maker.key(site))
        return entry.packed if entry and entry.made_from(maker.sources(site)) else None

    def _make(self, sites: Sequence[LinearSite], maker: Maker) -> None:
        with (
            ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool,
            tqdm(total=len(sites), desc="river: packing 4-bit twins", unit="matrix", leave=False, delay=1) as bar,
        ):
            # An artifact fits as a whole or not at all: every matrix is looked up before the first one is packed.
            saved = list(pool.map(maker.find_saved, sites))
            for site, packed in zip(sites, pool.map(maker.make, sites, saved), strict=True):
                sources = maker.sources(site)
                entry = _Entry(packed, tuple(map(TensorWeakRef, sources)), tuple(map(version_of, sources)))
                self._entries.setdefault(sources[0], {})[maker.key(site)] = entry
                bar.update()
