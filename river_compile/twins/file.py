"""Packed weights on disk, saved on request or left in the store: a folder with one file, ``twins.safetensors``.

    <key>.qweight, .scale_zero   as the matrix's layout has them (`river_compile.kernels.quant.layouts`); a stack of
                                 experts has a dimension more in front. key = name/quantizer asked for/group size
    <key>.input_scale            float32 ``[K]``, for a matrix whose inputs are scaled
    metadata                     "format", "version", "matrices" (JSON: the fields of `_Saved`, ratios as text,
                                 since JSON knows no infinity) and "xxh3", the hash of the file with this hash taken
                                 as zeros

What is stored are the bytes that the kernel reads which the twins were packed for, the same on every machine: they are
mapped, and the processes that map them share one copy. For other kernels the matrix is packed again from them. Biases
are taken from the model, whose hash covers them.

Everything is checked before anything is used: an artifact of another version, of other weights, with one byte changed,
or with other tensors than its matrices have is refused with an :class:`ArtifactError`. Not handled: replacing an
artifact in place (folders cannot be swapped atomically), and files that change while they are used.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from river_compile.compile_cache.folder import Entry, evict, is_trusted, warn_not_writable
from river_compile.errors import ArtifactError, RiverWarning
from river_compile.kernels.files import appearing, making
from river_compile.kernels.quant import bf12, bits8
from river_compile.kernels.quant.grid import GROUP_SIZES
from river_compile.kernels.quant.layouts import LAYOUTS, PackedLinear, tensors_of
from river_compile.passes.program import Matmul
from river_compile.twins import tensor_file
from river_compile.twins.weights import LOSSLESS, TwinWeight

log = logging.getLogger("river_compile.twins")
FORMAT = "river-twins"
VERSION = 8
FILE = "twins.safetensors"
_PACKED = "packed"  # the folder of an entry
_MANIFEST_2 = "river.json"  # of version 2, which had a file for it
_KINDS = {name: str for name in ("name", "quantizer", "asked", "statistics", "weights_hash")}
_NEW = "leave artifact= out and save a new one"
_INFINITIES = {torch.float32: 0x7F800000, torch.float16: 0x7C00, torch.bfloat16: 0x7F80}  # all bits of the exponent


@dataclass(kw_only=True)
class _Saved:
    """One matrix of a file: fields of its :class:`TwinWeight`, the layout of its bytes, and the digest as a hash."""

    name: str
    shape: tuple[int, int]
    group_size: int
    experts: int
    quantizer: str
    asked: str
    statistics: str
    layout: str
    weights_hash: str
    sqnr: float
    output_sqnr: float | None = None

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> _Saved:
        """Returns a matrix from its fields; raises a TypeError, KeyError or ValueError for anything else."""
        for name, kind in _KINDS.items():
            if not isinstance(entry[name], kind):
                raise TypeError(f"{name} is {entry[name]!r}")
        ratio = entry["output_sqnr"]
        ratios = {"sqnr": float(entry["sqnr"]), "output_sqnr": None if ratio is None else float(ratio)}
        matrix = cls(**{**entry, "shape": tuple(entry["shape"]), **ratios})
        n, k = matrix.shape
        lossless = matrix.layout in bf12.LAYOUTS and matrix.group_size == 0
        if min(n, k) < 1 or not (lossless or (matrix.group_size in GROUP_SIZES and k % matrix.group_size == 0)):
            raise ValueError(f"{matrix.name} has shape {matrix.shape} in groups of {matrix.group_size}")
        if matrix.experts < 0 or (matrix.experts and n % matrix.experts):
            raise ValueError(f"{matrix.name} has {n} rows of {matrix.experts} experts")
        if matrix.layout not in LAYOUTS and not lossless:
            raise ValueError(f"{matrix.name} has layout {matrix.layout!r}, which is none of {tuple(LAYOUTS)}")
        return matrix

    @property
    def key(self) -> str:
        return f"{self.name}/{self.asked}/{self.group_size}"

    @property
    def rows(self) -> int:
        """Of each matrix of a stack, or of the only one."""
        return self.shape[0] // max(1, self.experts)

    def tensors(self) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
        """Returns shapes and possible dtypes of its tensors, by the end of their names."""
        stack, k = (self.experts,) if self.experts else (), self.shape[1]
        packed = tensors_of(self.layout, self.rows, k, self.group_size)
        found = {part: ((*stack, *shape), dtypes) for part, (shape, dtypes) in packed.items()}
        return {**found, "input_scale": ((k,), (torch.float32,))}


def write(folder: Path, weights: Sequence[TwinWeight]) -> None:
    """Writes weights whose parameters did not change since; the folder appears complete or not at all.

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
    for site in weights:
        entry: dict[str, Any] = {
            "name": site.name,
            "shape": site.shape,
            "group_size": site.group_size,
            "experts": site.matmul.experts,
            "quantizer": site.quantizer,
            "asked": site.asked,
            "statistics": site.statistics,
            "layout": site.matmul.layout,
            "weights_hash": site.digest,
            "sqnr": str(site.sqnr),
            "output_sqnr": None if site.output_sqnr is None else str(site.output_sqnr),
        }
        matrix = _Saved.from_json(entry)
        matrices[matrix.key] = entry
        tensors |= _tensors(matrix.key, site.weight.as_layout(matrix.layout), site.input_scale)
    metadata = {"format": FORMAT, "version": str(VERSION), "matrices": json.dumps(list(matrices.values()))}
    try:
        with appearing(folder) as scratch:
            scratch.mkdir()
            tensor_file.write(scratch / FILE, tensors, metadata)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"cannot save to {folder}: {error}") from error


def write_missing(folder: Path, make: Callable[[], Sequence[TwinWeight]]) -> None:
    """Writes an artifact where there is none; of processes that call this at once one does, and the others wait.

    Args:
        folder: of the artifact.
        make: packs the products that it is to hold.

    Raises:
        ArtifactError: as `write`.
    """
    try:
        if (folder / FILE).exists():
            return
        log.info("%s: there is no artifact; it is made here unless another process is making it", folder)
        with making(folder):
            if not (folder / FILE).exists():
                write(folder, make())
    except OSError as error:
        raise ArtifactError(f"cannot save to {folder!s:.200}: {error}") from error


class TwinFile:
    """A file that was read and found whole.

    Raises:
        ArtifactError: the file is missing or damaged, of another version, or holds other tensors than it says.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._file = self.folder / FILE
        try:
            self._matrices = self._read_matrices()
            self._tensors = tensor_file.mapped(self._file)
        except FileNotFoundError as error:
            raise self._refusal("No such file", "artifact= takes a folder that river_compile.save wrote") from error
        except (OSError, SafetensorError) as error:
            raise self._refusal(f"it is damaged or cannot be read ({error})") from error
        self._check_tensors()

    @functools.cached_property
    def names(self) -> set[str]:
        """Of its matrices."""
        return {matrix.name for matrix in self._matrices}

    def check_names(self, names: Iterable[str]) -> None:
        """Refuses an artifact with a matrix of none of these products, merged with others or not."""
        linears = {linear for name in names for linear in name.split("|")}
        for matrix in self._matrices:
            if not linears.issuperset(matrix.name.split("|")):
                raise self._refusal(
                    f"it holds a matrix {matrix.name}, which this model does not have",
                    f"name the artifact of this model, or {_NEW}",
                )

    def find(self, site: Matmul, quantizer: str, digest: str) -> tuple[PackedLinear, dict[str, Any]]:
        """Returns what is saved of a matmul's weight, made in this way from parameters with this digest.

        Returns:
            The matrix, and the fields of :class:`TwinWeight` that tell what was lost.

        Raises:
            ArtifactError: there is none.
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
        if matrix.weights_hash != digest or matrix.shape != site.shape:
            raise self._refusal(
                f"{site.name} was made from other weights than this model's",
                f"name the artifact of this model, or {_NEW}",
            )
        input_scale = self._tensors.get(f"{matrix.key}.input_scale")
        if input_scale is not None and not site.scales_inputs:
            raise self._refusal(f"{site.name} has an input_scale that its twin does not apply")
        q, scale_zero = (self._tensors[f"{matrix.key}.{part}"] for part in ("qweight", "scale_zero"))
        sizes = matrix.group_size, matrix.shape[1], matrix.rows, matrix.experts
        return PackedLinear(matrix.layout, q, scale_zero, *sizes), {
            "quantizer": matrix.quantizer,
            "statistics": matrix.statistics,
            "input_scale": input_scale,
            "sqnr": matrix.sqnr,
            "output_sqnr": matrix.output_sqnr,
        }

    def _read_matrices(self) -> list[_Saved]:
        """Reads the header, and checks format, version and hash in this order."""
        if (self.folder / _MANIFEST_2).exists():
            self._file = self.folder / _MANIFEST_2
            raise self._refusal(_other_version("2"))
        metadata = tensor_file.read_metadata(self._file)
        if metadata.get("format") != FORMAT:
            raise self._refusal("it holds no saved twins", "artifact= takes what river_compile.save wrote")
        if metadata.get("version") != str(VERSION):
            raise self._refusal(_other_version(metadata.get("version")))
        if not tensor_file.is_whole(self._file, metadata):
            raise self._refusal("it is damaged (its hash differs from the one it states)")
        try:
            return [_Saved.from_json(entry) for entry in json.loads(metadata["matrices"])]
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise self._refusal(f"its list of matrices is wrong ({error})") from error

    def _check_tensors(self) -> None:
        """Refuses tensors that are not those of the matrices: a kernel would read beyond them, or in vain."""
        left = dict(self._tensors)
        twice = [key for key, count in Counter(matrix.key for matrix in self._matrices).items() if count > 1]
        if twice:
            raise self._refusal(f"{twice[0]} is in its list of matrices twice")
        for matrix in self._matrices:
            for part, (shape, dtypes) in matrix.tensors().items():
                name = f"{matrix.key}.{part}"
                tensor = left.pop(name, None)
                if tensor is None and part != "input_scale":
                    raise self._refusal(f"{name} is missing")
                if tensor is not None and (tensor.shape != shape or tensor.dtype not in dtypes):
                    raise self._refusal(
                        f"{name} is {tensor.dtype} {tuple(tensor.shape)}, and a matrix of shape {matrix.shape} in "
                        f"layout {matrix.layout!r} has {dtypes[0]} {shape} there"
                    )
                if tensor is not None and part != "qweight" and not _is_finite(tensor):
                    raise self._refusal(f"{name} holds infinite or NaN values")
            side = self._tensors[f"{matrix.key}.scale_zero"]
            if matrix.layout in bf12.LAYOUTS and not bf12.is_sound(side, *matrix.shape):
                raise self._refusal(f"{matrix.key} has patches outside of its matrix")
        if left:
            raise self._refusal(f"{next(iter(left))} belongs to no matrix")

    def _refusal(self, why: str, fix: str = "save the artifact again") -> ArtifactError:
        return ArtifactError(f"{self._file}: {why}; {fix}")


def stored(matmuls: Sequence[Matmul], digests: Mapping[Matmul, str], quantizer: str) -> Entry:
    """Returns the entry of the store for some matmuls' weights, named by all that they are made from.

    That is the digests of the parameters, the quantizer, or `LOSSLESS`, the sizes of groups, and the format's version:
    what is there fits, or nothing is.
    """
    made_from = sorted((x.name, x.group_size, x.scales_inputs, digests[x]) for x in matmuls)
    identity = hashlib.sha256(repr((VERSION, quantizer, made_from)).encode()).hexdigest()
    size = sum(math.prod(x.shape) for x in matmuls) / 1e6
    what, kind = ("a backbone", "backbone") if quantizer == LOSSLESS else (f"twins by {quantizer}", "twins")
    return Entry(f"{kind}-{identity[:40]}", f"{what}, {len(made_from)} matrices of {size:.0f}M weights")


def open_stored(entry: Entry) -> TwinFile | None:
    """Returns the file of an entry, None where there is none; one that is damaged is told and removed."""
    folder = entry.folder / _PACKED
    if not (folder / FILE).exists() or not all(map(is_trusted, (entry.folder, folder, folder / FILE))):
        return None
    try:
        found = TwinFile(folder)
    except ArtifactError as error:
        warnings.warn(f"stored weights cannot be used and are packed anew: {error}", RiverWarning, stacklevel=2)
        shutil.rmtree(entry.folder, ignore_errors=True)
        return None
    entry.touch()
    return found


def write_stored(entry: Entry, weights: Sequence[TwinWeight]) -> None:
    """Writes weights into an entry, unless another process has done so; a place that cannot be written is told.

    Matrices that stayed what they were are not written, nor are those of 8 bits, which take no time to pack.
    """
    weights = [made for made in weights if not made.weight.unpacked and made.weight.layout != bits8.LAYOUT]
    if not weights:
        return
    folder = entry.folder / _PACKED
    try:
        entry.make_folder()
        with making(folder):
            if not (folder / FILE).exists():
                write(folder, weights)
                folder.chmod(0o700)
                (folder / FILE).chmod(0o600)
                entry.describe()
    except (ArtifactError, OSError) as error:
        warn_not_writable(error)
    evict()


def _is_finite(tensor: Tensor) -> bool:
    """Tells whether floats are finite. In one thread: of hundreds of small tensors each would wait for all threads."""
    infinity = _INFINITIES.get(tensor.dtype)
    if infinity is None:
        return True
    bits = tensor.view(torch.int16 if tensor.itemsize == 2 else torch.int32).numpy()
    return not bool(((bits & infinity) == infinity).any())


def _other_version(version: str | None) -> str:
    return f"it has version {version}, this release reads {VERSION}"


def _tensors(key: str, packed: PackedLinear, input_scale: Tensor | None) -> dict[str, Tensor]:
    scale_zero = packed.scale_zero
    if packed.layout == "plain" and torch.equal(scale_zero.bfloat16().float(), scale_zero):
        scale_zero = scale_zero.bfloat16()
    found = {"qweight": packed.qweight, "scale_zero": scale_zero, "input_scale": input_scale}
    return {f"{key}.{part}": tensor.cpu().contiguous() for part, tensor in found.items() if tensor is not None}
