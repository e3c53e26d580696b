"""Packed weights that one process leaves for the next ones without being asked: artifacts in the store.

Those of twins, and those of a backbone in 12 bits, each in an entry of its own.

An artifact there is named by the hash of everything that its matrices are made from: the digests of their weights, the
quantizer, the sizes of groups, and the format's version. So it fits, or there is none.

Not handled: twins made with statistics of a user's own text, and those of ranks that share a model.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from river_compile.errors import ArtifactError, RiverWarning
from river_compile.kernels.files import making
from river_compile.kernels.quant import bits8
from river_compile.passes.program import Matmul
from river_compile.store.folder import Entry, cannot_write, keep_bound
from river_compile.twins.artifact import FILE, VERSION, Artifact, write_artifact
from river_compile.twins.packed import LOSSLESS, PackedMatmul
from river_compile.twins.parameter_stamp import Sources
from river_compile.twins.twin_kl import TwinLoss

_LOSS = "loss.json"


class StoredTwins:
    """The packed weights of some matmuls as the store has them.

    Args:
        linears: the matmuls.
        sources: what each of them is made from.
        quantizer: says how, or `LOSSLESS`.
    """

    def __init__(self, linears: Sequence[Matmul], sources: Mapping[Matmul, Sources], quantizer: str) -> None:
        made_from = sorted((x.name, x.group_size, x.scales_inputs, sources[x].digest) for x in linears)
        identity = hashlib.sha256(repr((VERSION, quantizer, made_from)).encode()).hexdigest()
        size = sum(math.prod(x.shape) for x in linears) / 1e6
        what, kind = ("a backbone", "backbone") if quantizer == LOSSLESS else (f"twins by {quantizer}", "twins")
        about = f"{what}, {len(made_from)} matrices of {size:.0f}M weights"
        self._entry = Entry(f"{kind}-{identity[:40]}", about)

    @property
    def _folder(self) -> Path:
        return self._entry.folder / "packed"

    def open(self) -> Artifact | None:
        """Returns the artifact, None where there is none; one that is damaged is told and removed."""
        if not (self._folder / FILE).exists():
            return None
        try:
            found = Artifact(self._folder)
        except ArtifactError as error:
            warnings.warn(f"stored weights cannot be used and are packed anew: {error}", RiverWarning, stacklevel=2)
            shutil.rmtree(self._entry.folder, ignore_errors=True)
            return None
        self._entry.used()
        return found

    def write(self, twins: Sequence[PackedMatmul]) -> None:
        """Writes them, unless another process has done so; a place that cannot be written is told.

        Matrices that stayed what they were are not written, nor are those of 8 bits, which take no time to pack.
        """
        twins = [twin for twin in twins if not twin.weight.unpacked and twin.weight.layout != bits8.LAYOUT]
        if not twins:
            return
        try:
            with making(self._folder):
                if not (self._folder / FILE).exists():
                    write_artifact(self._folder, twins)
                    self._entry.describe()
        except (ArtifactError, OSError) as error:
            cannot_write(error)
        keep_bound()

    @property
    def loss(self) -> TwinLoss | None:
        """What they lose together, None where that is not known."""
        known = self._entry.read(_LOSS)
        return None if known is None else TwinLoss(**json.loads(known))

    def write_loss(self, loss: TwinLoss | None) -> None:
        """Writes what they lose."""
        if loss is not None and (self._folder / FILE).exists():
            self._entry.write(_LOSS, json.dumps(asdict(loss)).encode())
