"""Packed twins on disk: ``save(model, folder)`` once, ``options={"artifact": folder}`` at every later start.

An artifact is a folder with two files:

    river.json          what it is: format and version; for each matrix its name, shape, group size, quantizer, the hash
                        of the parameters it was made from; the hash of the other file and of itself
    twins.safetensors   for each matrix ``<key>.q`` uint8 ``[N, K / 2]`` (layout "plain": two nibbles in a byte) and
                        ``<key>.scale_zero`` ``[N, K / group_size, 2]``, key = name/quantizer/group size; for one whose
                        inputs are scaled ``<key>.input_scale`` float32 ``[K]``; nothing for one that stays in 16 bits

The grid is stored, not the bytes that a kernel reads: those differ by processor and are made again in a moment, while
the search for the grid takes seconds to hours. Biases are taken from the model, whose hash covers them.

Everything is checked before anything is used: an artifact of another version, of other weights, or with one byte
changed is refused with an :class:`ArtifactError`. Not handled: replacing an artifact in place (folders
cannot be swapped atomically), and files that change while they are read.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from river_compile.errors import ArtifactError
from river_compile.kernels.quant.grid import QuantizedWeight
from river_compile.kernels.quant.layouts import PackedLinear, pack
from river_compile.state import find_state

from .hashes import content_hash, file_hash, weights_hash
from .make import PackedSite
from .pack import PackedWeights

FORMAT = "river-twins"
VERSION = 2
MANIFEST = "river.json"
TENSORS = "twins.safetensors"
_STORED = "plain"


@dataclass(frozen=True)
class SavedMatrix:
    """One matrix of an artifact.

    Attributes:
        name: module paths of the linears it stands for, joined by "|".
        shape: (out_features, in_features).
        group_size: consecutive input features that share a scale and a zero.
        quantizer: how its grid was found.
        weights_sha256: hash of the parameters it was made from, see :func:`weights_hash`.
        sqnr_db: signal-to-quantization-noise ratio as text, since JSON knows no infinity.
        output_sqnr_db: that of the outputs on the observed text, None where nothing was observed.
        stored: False where it stays in 16 bits, below the floor of `min_sqnr`.
    """

    name: str
    shape: tuple[int, int]
    group_size: int
    quantizer: str
    weights_sha256: str
    sqnr_db: str
    output_sqnr_db: str | None = None
    stored: bool = True

    @property
    def key(self) -> str:
        return _key(self.name, self.quantizer, self.group_size)

    @property
    def quality(self) -> float:
        """The signal-to-noise ratio that a floor is about: of the outputs where they were observed."""
        return float(self.sqnr_db if self.output_sqnr_db is None else self.output_sqnr_db)


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
    made = state.of(PackedWeights).made() if state else []
    if not made:
        raise ArtifactError(
            f"cannot save to {folder}: no twin of this model is packed; generate a token with "
            'model.compile(backend="river") first'
        )
    matrices: dict[str, SavedMatrix] = {}
    tensors: dict[str, Tensor] = {}
    fresh = [(site, sources) for site, sources in made if sources is not None]
    stale = sorted({site.name for site, _ in made} - {site.name for site, _ in fresh})
    if stale:
        raise ArtifactError(
            f"cannot save to {folder}: the weights of {stale[0]} changed after they were packed; "
            "call torch._dynamo.reset() and generate a token first"
        )
    for site, sources in sorted(fresh, key=lambda pair: not pair[0].kept):  # with 4-bit weights rather than without
        matrix = _saved_matrix(site, sources)
        matrices[matrix.key] = matrix
        if matrix.stored:
            tensors |= _grid_tensors(matrix.key, site)
    _write(folder, list(matrices.values()), tensors)
    return folder


class Artifact:
    """An artifact that was read and found whole.

    Args:
        folder: where it lies.

    Raises:
        ArtifactError: a file is missing or damaged, or of another version.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        manifest = _read_manifest(self.folder / MANIFEST)
        self._matrices = {matrix.key: matrix for matrix in _matrices(self.folder / MANIFEST, manifest)}
        self._tensors = _read_tensors(self.folder / TENSORS, manifest.get("tensors_sha256"))

    def find(self, name: str, quantizer: str, group_size: int, sources: Sequence[Tensor]) -> SavedMatrix:
        """Returns the matrix that was made in this way from these very parameters.

        Raises:
            ArtifactError: there is none.
        """
        file = self.folder / MANIFEST
        matrix = self._matrices.get(_key(name, quantizer, group_size))
        if matrix is None:
            raise ArtifactError(f"{file}: {self._why_missing(name, quantizer, group_size)}")
        if matrix.weights_sha256 != weights_hash(sources):
            raise ArtifactError(
                f"{file}: {name} was made from other weights than this model's; name the artifact of this model, or "
                "leave artifact= out and save a new one"
            )
        return matrix

    def grid(self, matrix: SavedMatrix) -> QuantizedWeight:
        """Returns a matrix before packing."""
        n, k = matrix.shape
        qweight, scale_zero = self._tensors[f"{matrix.key}.q"], self._tensors[f"{matrix.key}.scale_zero"]
        return PackedLinear(_STORED, qweight, scale_zero, matrix.group_size, k, n).unpack()

    def input_scale(self, matrix: SavedMatrix) -> Tensor | None:
        """Returns what a matrix's inputs are divided by, float32 ``[K]``, None where they stay as they are."""
        return self._tensors.get(f"{matrix.key}.input_scale")

    def check_stored(self, matrix: SavedMatrix) -> None:
        """Raises an ArtifactError for a matrix that was left in 16 bits and is to have 4-bit weights."""
        if not matrix.stored:
            raise ArtifactError(
                f"{self.folder / MANIFEST}: {matrix.name} was left in 16 bits at {matrix.quality:.2f} dB, below the "
                "min_sqnr= of that time; pass the same min_sqnr=, or leave artifact= out and save a new one"
            )

    def _why_missing(self, name: str, quantizer: str, group_size: int) -> str:
        made = sorted({(m.quantizer, m.group_size) for m in self._matrices.values() if m.name == name})
        if not made:
            return (
                f"it holds no matrix {name}; it is another model's or was saved with an exit_depth that leaves this "
                "one out. Leave artifact= out and save a new one"
            )
        found = ", ".join(f"quantizer={q!r} group_size={g}" for q, g in made)
        return (
            f"{name} was made with {found}, and quantizer={quantizer!r} group_size={group_size} is asked for; "
            "pass the options it was made with, or leave artifact= out and save a new one"
        )


def _key(name: str, quantizer: str, group_size: int) -> str:
    return f"{name}/{quantizer}/{group_size}"


def _saved_matrix(site: PackedSite, sources: Sequence[Tensor]) -> SavedMatrix:
    return SavedMatrix(
        site.name,
        site.shape,
        site.group_size,
        site.quantizer,
        weights_hash(sources),
        str(site.sqnr),
        None if site.output_sqnr is None else str(site.output_sqnr),
        stored=not site.kept,
    )


def _grid_tensors(key: str, site: PackedSite) -> dict[str, Tensor]:
    packed = pack(site.unpack(), _STORED)
    short = packed.scale_zero.to(torch.bfloat16)
    exact = torch.equal(short.float(), packed.scale_zero)
    stored = {f"{key}.q": packed.qweight, f"{key}.scale_zero": short if exact else packed.scale_zero}
    if site.input_scale is not None:
        stored[f"{key}.input_scale"] = site.input_scale
    return {name: tensor.cpu().contiguous() for name, tensor in stored.items()}


def _write(folder: Path, matrices: list[SavedMatrix], tensors: dict[str, Tensor]) -> None:
    """Writes both files to a folder beside `folder` and renames it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtifactError(f"cannot save to {folder}: it exists and is no empty folder; name another or remove it")
    scratch = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        save_file(tensors, scratch / TENSORS)
        content = {
            "format": FORMAT,
            "version": VERSION,
            "layout": _STORED,
            "tensors_sha256": file_hash(scratch / TENSORS),
            "matrices": [asdict(matrix) for matrix in matrices],
        }
        text = json.dumps({**content, "sha256": content_hash(content)}, indent=1)
        (scratch / MANIFEST).write_text(text, encoding="utf-8")
        _as_umask_allows(scratch)
        os.replace(scratch, folder)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"cannot save to {folder}: {error}") from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def _as_umask_allows(folder: Path) -> None:
    """Gives a folder and its files the usual permissions: temporary folders and safetensors' files are private."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~umask)


def _read_manifest(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(
            f"{file}: {error.strerror}; artifact= takes a folder that river_compile.save wrote"
        ) from error
    except ValueError as error:
        raise ArtifactError(f"{file}: it is damaged ({error}); save the artifact again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ArtifactError(f"{file}: it is no manifest of saved twins; artifact= takes what river_compile.save wrote")
    if content.get("version") != VERSION:
        raise ArtifactError(
            f"{file}: it has version {content.get('version')!r}, this release reads {VERSION}; save the artifact again"
        )
    if content.pop("sha256", None) != content_hash(content):
        raise ArtifactError(f"{file}: it is damaged (its hash differs from the one it states); save the artifact again")
    return content


def _matrices(file: Path, manifest: dict) -> list[SavedMatrix]:
    try:
        return [SavedMatrix(**{**entry, "shape": tuple(entry["shape"])}) for entry in manifest["matrices"]]
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{file}: its list of matrices is wrong ({error}); save the artifact again") from error


def _read_tensors(file: Path, expected: str | None) -> dict[str, Tensor]:
    try:
        if file_hash(file) != expected:
            raise ArtifactError(f"{file}: it is damaged (other bytes than were written); save the artifact again")
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{file}: it cannot be read ({error}); save the artifact again") from error
