"""Packed twins on disk: a folder with one file, ``twins.safetensors``.

    <key>.q             uint8 ``[N, K / 2]``, two nibbles in a byte; key = name/quantizer asked for/group size
    <key>.scale_zero    bfloat16 or float32 ``[N, K / group_size, 2]``
    <key>.input_scale   float32 ``[K]``, for a matrix whose inputs are scaled
    metadata            "format", "version", "matrices" (JSON: the fields of `_SavedMatrix`, ratios as text, since
                        JSON knows no infinity; one that stays in 16 bits has no tensors) and "sha256", the hash of the
                        file with this hash taken as zeros

The grid is stored, not the bytes that a kernel reads: those differ by processor and are made again in a moment, while
the search for the grid takes seconds to hours. Biases are taken from the model, whose hash covers them.

Everything is checked before anything is used: an artifact of another version, of other weights, with one byte changed,
or with other tensors than its matrices have is refused with an :class:`ArtifactError`. Not handled: replacing an
artifact in place (folders cannot be swapped atomically), and files that change while they are read.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from river_compile.errors import ArtifactError
from river_compile.kernels.files import appearing, as_umask_allows
from river_compile.kernels.quant.grid import GROUP_SIZES
from river_compile.kernels.quant.layouts import PackedLinear, pack
from river_compile.passes.program import Product

from .make import Grid, PackedSite, Ratios

FORMAT = "river-twins"
VERSION = 4
FILE = "twins.safetensors"
_MANIFEST_2 = "river.json"  # of version 2, which had a file for it
_LAYOUT = "plain"
_KINDS = {name: str for name in ("name", "quantizer", "asked", "statistics", "weights_sha256")} | {"stored": bool}
_NO_HASH = "0" * 64
_NEW = "leave artifact= out and save a new one"


@dataclass(kw_only=True)
class _SavedMatrix(Ratios):
    """One matrix of an artifact.

    Attributes:
        name, shape, group_size, quantizer, asked, statistics: as in its :class:`PackedSite`.
        weights_sha256: hash of the parameters it was made from, see :func:`digest_of`.
        stored: False where it stays in 16 bits, below the floor of `min_sqnr`.
    """

    name: str
    shape: tuple[int, int]
    group_size: int
    quantizer: str
    asked: str
    statistics: str
    weights_sha256: str
    stored: bool

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> _SavedMatrix:
        """Returns a matrix from its fields; raises a TypeError, KeyError or ValueError for anything else."""
        for name, kind in _KINDS.items():
            if not isinstance(entry[name], kind):
                raise TypeError(f"{name} is {entry[name]!r}")
        ratio = entry["output_sqnr"]
        ratios = {"sqnr": float(entry["sqnr"]), "output_sqnr": None if ratio is None else float(ratio)}
        matrix = cls(**{**entry, "shape": tuple(entry["shape"]), **ratios})
        n, k = matrix.shape
        if min(n, k) < 1 or matrix.group_size not in GROUP_SIZES or k % matrix.group_size:
            raise ValueError(f"{matrix.name} has shape {matrix.shape} in groups of {matrix.group_size}")
        return matrix


def write_artifact(folder: Path, sites: Sequence[PackedSite]) -> None:
    """Writes products whose parameters did not change since; the folder appears complete or not at all.

    Raises:
        ArtifactError: the folder is not empty or cannot be written.
    """
    try:
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"cannot save to {folder!s:.200}: {error}") from error
    if taken:
        raise ArtifactError(f"cannot save to {folder}: it exists and is not an empty folder; name another or remove it")
    matrices: dict[str, dict[str, object]] = {}
    tensors: dict[str, Tensor] = {}
    for site in sorted(sites, key=lambda site: not site.kept):  # with 4-bit weights rather than without
        matrices[_key(site)] = {
            "name": site.name,
            "shape": site.shape,
            "group_size": site.group_size,
            "quantizer": site.quantizer,
            "asked": site.asked,
            "statistics": site.statistics,
            "weights_sha256": site.digest,
            "stored": not site.kept,
            "sqnr": str(site.sqnr),
            "output_sqnr": None if site.output_sqnr is None else str(site.output_sqnr),
        }
        tensors |= _grid_tensors(site)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "matrices": json.dumps(list(matrices.values())),
        "sha256": _NO_HASH,
    }
    try:
        with appearing(folder) as scratch:
            scratch.mkdir()
            save_file(tensors, scratch / FILE, metadata)
            as_umask_allows(scratch / FILE)  # safetensors writes files that only their owner can read
            _state_hash(scratch / FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise ArtifactError(f"cannot save to {folder}: {error}") from error


class Artifact:
    """An artifact that was read and found whole.

    Raises:
        ArtifactError: the file is missing or damaged, of another version, or holds other tensors than it says.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._file = self.folder / FILE
        try:
            self._matrices = self._read_matrices()
            self._tensors = load_file(self._file)
        except FileNotFoundError as error:
            raise self._refusal("No such file", "artifact= takes a folder that river_compile.save wrote") from error
        except (OSError, SafetensorError) as error:
            raise self._refusal(f"it is damaged or cannot be read ({error})") from error
        self._check_tensors()

    def check_names(self, names: Iterable[str]) -> None:
        """Refuses an artifact with a matrix of none of these products, merged with others or not."""
        linears = {linear for name in names for linear in name.split("|")}
        for matrix in self._matrices:
            if not linears.issuperset(matrix.name.split("|")):
                raise self._refusal(
                    f"it holds a matrix {matrix.name}, which this model does not have",
                    f"name the artifact of this model, or {_NEW}",
                )

    def find(self, site: Product, quantizer: str, digest: str, min_sqnr: float | None) -> Grid:
        """Returns what is saved of a product that was made in this way from parameters with this digest.

        Raises:
            ArtifactError: there is none, or it was left in 16 bits and is to have 4-bit weights.
        """
        matrices = [matrix for matrix in self._matrices if matrix.name == site.name]
        if not matrices:
            raise self._refusal(
                f"it holds no matrix {site.name}",
                "it is another model's or was saved with an exit_depth that leaves this one out. Leave artifact= out "
                "and save a new one",
            )
        ways = {(matrix.asked, matrix.group_size): matrix for matrix in matrices}
        matrix = ways.get((quantizer, site.group_size))
        if matrix is None:
            found = ", ".join(f"quantizer={name!r} group_size={size}" for name, size in sorted(ways))
            raise self._refusal(
                f"{site.name} was made with {found}, and quantizer={quantizer!r} group_size={site.group_size} is asked "
                "for",
                f"pass the options it was made with, or {_NEW}",
            )
        if matrix.weights_sha256 != digest or matrix.shape != (sum(site.out_features), site.in_features):
            raise self._refusal(
                f"{site.name} was made from other weights than this model's",
                f"name the artifact of this model, or {_NEW}",
            )
        input_scale = self._tensors.get(f"{_key(matrix)}.input_scale")
        if input_scale is not None and not site.scales_inputs:
            raise self._refusal(f"{site.name} has an input_scale that its twin does not apply")
        if not matrix.stored and not matrix.below(min_sqnr):
            raise self._refusal(
                f"{site.name} was left in 16 bits at {matrix.quality:.2f} dB, below the min_sqnr= of that time",
                f"pass the same min_sqnr=, or {_NEW}",
            )
        weight = None
        if matrix.stored:
            n, k = matrix.shape
            q, scale_zero = (self._tensors[f"{_key(matrix)}.{part}"] for part in ("q", "scale_zero"))
            weight = PackedLinear(_LAYOUT, q, scale_zero, matrix.group_size, k, n)
        return Grid(
            weight=weight,
            quantizer=matrix.quantizer,
            statistics=matrix.statistics,
            input_scale=input_scale,
            sqnr=matrix.sqnr,
            output_sqnr=matrix.output_sqnr,
        )

    def _read_matrices(self) -> list[_SavedMatrix]:
        """Reads the header, and checks format, version and hash in this order."""
        if (self.folder / _MANIFEST_2).exists():
            self._file = self.folder / _MANIFEST_2
            raise self._refusal(_other_version("2"))
        with safe_open(self._file, "pt") as opened:
            metadata = opened.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise self._refusal("it holds no saved twins", "artifact= takes what river_compile.save wrote")
        if metadata.get("version") != str(VERSION):
            raise self._refusal(_other_version(metadata.get("version")))
        if metadata.get("sha256") != _file_hash(self._file, metadata.get("sha256", "")):
            raise self._refusal("it is damaged (its hash differs from the one it states)")
        try:
            return [_SavedMatrix.from_json(entry) for entry in json.loads(metadata["matrices"])]
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise self._refusal(f"its list of matrices is wrong ({error})") from error

    def _check_tensors(self) -> None:
        """Refuses tensors that are not those of the matrices: a kernel would read beyond them, or in vain."""
        left = dict(self._tensors)
        twice = [key for key, count in Counter(map(_key, self._matrices)).items() if count > 1]
        if twice:
            raise self._refusal(f"{twice[0]} is in its list of matrices twice")
        for matrix in self._matrices:
            (n, k), group = matrix.shape, matrix.group_size
            wanted = {
                "q": ((n, k // 2), (torch.uint8,)),
                "scale_zero": ((n, k // group, 2), (torch.bfloat16, torch.float32)),
                "input_scale": ((k,), (torch.float32,)),
            }
            for part, (shape, dtypes) in wanted.items() if matrix.stored else ():
                name = f"{_key(matrix)}.{part}"
                tensor = left.pop(name, None)
                if tensor is None and part != "input_scale":
                    raise self._refusal(f"{name} is missing")
                if tensor is not None and (tensor.shape != shape or tensor.dtype not in dtypes):
                    raise self._refusal(
                        f"{name} is {tensor.dtype} {tuple(tensor.shape)}, and a matrix of shape {matrix.shape} has "
                        f"{dtypes[0]} {shape} there"
                    )
                if tensor is not None and part != "q" and not torch.isfinite(tensor).all():
                    raise self._refusal(f"{name} holds infinite or NaN values")
        if left:
            raise self._refusal(f"{next(iter(left))} belongs to no matrix")

    def _refusal(self, why: str, fix: str = "save the artifact again") -> ArtifactError:
        return ArtifactError(f"{self._file}: {why}; {fix}")


def _other_version(version: str | None) -> str:
    return f"it has version {version}, this release reads {VERSION}"


def _key(matrix: _SavedMatrix | PackedSite) -> str:
    return f"{matrix.name}/{matrix.asked}/{matrix.group_size}"


def _file_hash(file: Path, stated: str) -> str:
    """Returns the SHA-256 of a file's bytes, with the hash that its header states taken as zeros."""
    with file.open("rb") as content:
        length = content.read(8)
        header = content.read(int.from_bytes(length, "little"))
        zeros = header.replace(f'"sha256":"{stated}"'.encode(), f'"sha256":"{_NO_HASH}"'.encode())
        digest = hashlib.sha256(length + zeros)
        while chunk := content.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _state_hash(file: Path) -> None:
    """Puts a file's hash into its header, in the place of zeros."""
    digest = _file_hash(file, _NO_HASH)
    with file.open("r+b") as content:
        header = content.read(int.from_bytes(content.read(8), "little"))
        content.seek(8 + header.index(f'"sha256":"{_NO_HASH}"'.encode()))
        content.write(f'"sha256":"{digest}"'.encode())


def _grid_tensors(site: PackedSite) -> dict[str, Tensor]:
    if site.weight is None:
        return {}
    key = _key(site)
    packed = pack(site.weight.unpack(), _LAYOUT)
    short = packed.scale_zero.to(torch.bfloat16)
    exact = torch.equal(short.float(), packed.scale_zero)
    stored = {f"{key}.q": packed.qweight, f"{key}.scale_zero": short if exact else packed.scale_zero}
    if site.input_scale is not None:
        stored[f"{key}.input_scale"] = site.input_scale
    return {name: tensor.cpu().contiguous() for name, tensor in stored.items()}
