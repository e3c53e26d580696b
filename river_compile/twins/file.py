"""Saved twins: a folder with one file, ``twins.safetensors``, saved on request or in the compile cache.

Not handled: replacing a folder in place (folders cannot be swapped atomically); files that change while they are used.
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

from river_compile.agreement import PARTS
from river_compile.compile_cache.folder import Entry, evict, is_trusted, warn_not_writable
from river_compile.compile_cache.tensor_file import is_whole, map_tensors, read_metadata, write_tensors
from river_compile.errors import RiverWarning, TwinsError
from river_compile.kernels.files import atomic_write, locked
from river_compile.kernels.messages import with_id
from river_compile.kernels.quant import lossless
from river_compile.kernels.quant.grid import GROUP_SIZES
from river_compile.kernels.quant.layouts import LAYOUTS, PackedLinear, tensors_of
from river_compile.kernels.quant.mxfp4 import GROUP, LAYOUT_MXFP4
from river_compile.passes.program import Matmul
from river_compile.twins.weights import LOSSLESS, TwinWeight

log = logging.getLogger("river_compile.twins")
# The file has for each weight, its key being name/quantizer in the options/group size:
#     <key>.qweight, .scale_zero   as the layout has them (kernels/quant/layouts.py); a stack of experts has a leading
#                                  dimension more
#     <key>.input_scale            float32 [K], if its inputs are scaled
#
# Its metadata are "format", "version", "matrices" and "xxh3", the hash of the file with this hash as zeros. "matrices"
# is JSON with the fields of `_Saved`, ratios as text, since JSON has no infinity. Tensors are the bytes that the kernel
# reads, the same on every machine, so the processes that map them share one copy; other kernels pack them again. Biases
# come from the model, whose hash covers them.
FORMAT = "river-twins"
VERSION = 8
FILE = "twins.safetensors"
_PACKED = "packed"  # the folder in a cache entry
_MANIFEST_2 = "river.json"  # the manifest of version 2
_KINDS = {name: str for name in ("name", "quantizer", "asked", "statistics", "weights_hash")}
_NEW = "remove twins= and save the twins to a new folder"
_WHICH = "Set twins= to a folder that river_compile.save_twins wrote"
_INFINITIES = {torch.float32: 0x7F800000, torch.float16: 0x7C00, torch.bfloat16: 0x7F80}  # all bits of the exponent


@dataclass(kw_only=True)
class _Saved:
    """One weight in a file: fields of its :class:`TwinWeight`, its layout, and its digest as a hash."""

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
        """Return a weight from its fields; raise a TypeError, KeyError or ValueError for anything else."""
        for name, kind in _KINDS.items():
            if not isinstance(entry[name], kind):
                raise TypeError(f"{name} is {entry[name]!r}")
        ratio = entry["output_sqnr"]
        ratios = {"sqnr": float(entry["sqnr"]), "output_sqnr": None if ratio is None else float(ratio)}
        matrix = cls(**{**entry, "shape": tuple(entry["shape"]), **ratios})
        n, k = matrix.shape
        in_mxfp4 = matrix.layout == LAYOUT_MXFP4 and matrix.experts > 0 and k % GROUP == 0
        is_lossless = (in_mxfp4 or matrix.layout in lossless.LAYOUTS_12BIT) and matrix.group_size == 0
        if min(n, k) < 1 or not (is_lossless or (matrix.group_size in GROUP_SIZES and k % matrix.group_size == 0)):
            raise ValueError(f"{matrix.name} has shape {matrix.shape} in groups of {matrix.group_size}")
        if matrix.experts < 0 or (matrix.experts and n % matrix.experts):
            raise ValueError(f"{matrix.name} has {n} rows of {matrix.experts} experts")
        if matrix.layout not in LAYOUTS and not is_lossless:
            raise ValueError(f"{matrix.name} has layout {matrix.layout!r}, not one of {tuple(LAYOUTS)}")
        return matrix

    @property
    def key(self) -> str:
        return f"{self.name}/{self.asked}/{self.group_size}"

    @property
    def rows(self) -> int:
        """Rows of the weight; of a stack, of each expert's."""
        return self.shape[0] // max(1, self.experts)

    def tensors(self) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
        """Return shapes and possible dtypes of its tensors, by the suffix of their names."""
        stack, k = (self.experts,) if self.experts else (), self.shape[1]
        packed = tensors_of(self.layout, self.rows, k, self.group_size)
        found = {part: ((*stack, *shape), dtypes) for part, (shape, dtypes) in packed.items()}
        return {**found, "input_scale": ((k,), (torch.float32,))}


def write(folder: Path, weights: Sequence[TwinWeight]) -> None:
    """Write current weights to a new folder, completely or not at all; raise a TwinsError if it fails."""
    try:
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except (OSError, ValueError) as error:
        raise _not_written(folder, error) from error
    if taken:
        raise _not_written(folder, "it exists and is not an empty folder")
    matrices: dict[str, dict[str, object]] = {}
    tensors: dict[str, Tensor] = {}
    for twin in weights:
        entry: dict[str, Any] = {
            "name": twin.name,
            "shape": twin.shape,
            "group_size": twin.group_size,
            "experts": twin.matmul.experts,
            "quantizer": twin.quantizer,
            "asked": twin.asked,
            "statistics": twin.statistics,
            "layout": LAYOUT_MXFP4 if twin.weight.layout == LAYOUT_MXFP4 else twin.matmul.layout,
            "weights_hash": twin.digest,
            "sqnr": str(twin.sqnr),
            "output_sqnr": None if twin.output_sqnr is None else str(twin.output_sqnr),
        }
        matrix = _Saved.from_json(entry)
        matrices[matrix.key] = entry
        tensors |= _tensors(matrix.key, twin.weight.as_layout(matrix.layout), twin.input_scale)
    metadata = {"format": FORMAT, "version": str(VERSION), "matrices": json.dumps(list(matrices.values()))}
    try:
        with atomic_write(folder) as scratch:
            scratch.mkdir()
            write_tensors(scratch / FILE, tensors, metadata)
    except (OSError, ValueError) as error:
        raise _not_written(folder, error) from error


def write_missing(folder: Path, make: Callable[[], Sequence[TwinWeight]]) -> None:
    """Write a folder if it is missing; one of concurrent processes does, the others wait."""
    try:
        if (folder / FILE).exists():
            return
        log.info("%s: no saved twins; this process makes them unless another one is", folder)
        with locked(folder):
            if not (folder / FILE).exists():
                write(folder, make())
    except OSError as error:
        raise _not_written(folder, error) from error


def _not_written(folder: Path, why: object) -> TwinsError:
    return TwinsError(f"Cannot save to {folder!s:.200}: {why}. Name a new or empty folder that is writable", id="RC044")


class TwinFile:
    """A checked file of saved twins; its tensors are memory-mapped. Raises a TwinsError."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._file = self.folder / FILE
        try:
            self._matrices = self._read_matrices()
            self._tensors = map_tensors(self._file)
        except FileNotFoundError as error:
            parts = sorted(path.name for path in self.folder.glob(PARTS))
            if parts:
                why = f"the folder has {' and '.join(parts[:2])}, the parts of a model that several processes share"
                raise self._refusal("RC047", why, "Start as many processes, or name another folder") from error
            raise self._refusal("RC040", "no such file", _WHICH) from error
        except (OSError, SafetensorError) as error:
            raise self._refusal("RC041", f"it is damaged or cannot be read ({error})") from error
        self._check_tensors()

    @functools.cached_property
    def names(self) -> set[str]:
        """The names of its weights."""
        return {matrix.name for matrix in self._matrices}

    def check_names(self, names: Iterable[str]) -> None:
        """Raise a TwinsError for a weight of none of these linears, merged or not."""
        linears = {linear for name in names for linear in name.split("|")}
        for matrix in self._matrices:
            if not linears.issuperset(matrix.name.split("|")):
                raise self._refusal(
                    "RC042",
                    f"it holds a matrix {matrix.name}, which this model does not have",
                    f"Name the saved twins of this model, or {_NEW}",
                )

    def find(self, matmul: Matmul, quantizer: str, digest: str) -> tuple[PackedLinear, dict[str, Any]]:
        """Return a matmul's saved weight and its `TwinWeight` fields; raise a TwinsError without one."""
        matrices = [matrix for matrix in self._matrices if matrix.name == matmul.name]
        if not matrices:
            raise self._refusal(
                "RC042",
                f"it holds no matrix {matmul.name}",
                "It belongs to another model or was saved with an exit_depth that leaves this matrix out. Remove "
                "twins= and save the twins to a new folder",
            )
        ways = {(matrix.asked, matrix.group_size): matrix for matrix in matrices}
        matrix = ways.get((quantizer, matmul.group_size))
        if matrix is None:
            found = ", ".join(f"quantizer={name!r} group_size={size}" for name, size in sorted(ways))
            raise self._refusal(
                "RC042",
                f"{matmul.name} was made with {found}, and the options are quantizer={quantizer!r} "
                f"group_size={matmul.group_size}",
                f"Pass the options that it was made with, or {_NEW}",
            )
        if matrix.weights_hash != digest or matrix.shape != matmul.shape:
            raise self._refusal(
                "RC042",
                f"{matmul.name} was made from other weights than this model's",
                f"Name the saved twins of this model, or {_NEW}",
            )
        input_scale = self._tensors.get(f"{matrix.key}.input_scale")
        if input_scale is not None and not matmul.scales_inputs:
            raise self._refusal("RC041", f"{matmul.name} has an input_scale that its twin does not apply")
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
        """Read the header; check format, version and hash in this order."""
        if (self.folder / _MANIFEST_2).exists():
            self._file = self.folder / _MANIFEST_2
            raise self._refusal("RC043", _other_version("2"))
        metadata = read_metadata(self._file)
        if metadata.get("format") != FORMAT:
            raise self._refusal("RC040", "it holds no saved twins", _WHICH)
        if metadata.get("version") != str(VERSION):
            raise self._refusal("RC043", _other_version(metadata.get("version")))
        if not is_whole(self._file, metadata):
            raise self._refusal("RC041", "it is damaged (its hash differs from the one it states)")
        try:
            return [_Saved.from_json(entry) for entry in json.loads(metadata["matrices"])]
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise self._refusal("RC041", f"its list of matrices is wrong ({error})") from error

    def _check_tensors(self) -> None:
        """Raise for tensors that do not fit their weights: a kernel would read out of bounds."""
        left = dict(self._tensors)
        twice = [key for key, count in Counter(matrix.key for matrix in self._matrices).items() if count > 1]
        if twice:
            raise self._refusal("RC041", f"{twice[0]} is in its list of matrices twice")
        for matrix in self._matrices:
            for part, (shape, dtypes) in matrix.tensors().items():
                name = f"{matrix.key}.{part}"
                tensor = left.pop(name, None)
                if tensor is None and part != "input_scale":
                    raise self._refusal("RC041", f"{name} is missing")
                if tensor is not None and (tensor.shape != shape or tensor.dtype not in dtypes):
                    raise self._refusal(
                        "RC041",
                        f"{name} is {tensor.dtype} {tuple(tensor.shape)}, and a matrix of shape {matrix.shape} in "
                        f"layout {matrix.layout!r} has {dtypes[0]} {shape} there",
                    )
                if tensor is not None and part != "qweight" and not _is_finite(tensor):
                    raise self._refusal("RC041", f"{name} holds infinite or NaN values")
            side = self._tensors[f"{matrix.key}.scale_zero"]
            sides = side if matrix.experts else [side]
            sizes = matrix.rows, matrix.shape[1]
            in_12_bits = matrix.layout in lossless.LAYOUTS_12BIT
            if in_12_bits and not all(lossless.has_valid_patches(each, *sizes) for each in sides):
                raise self._refusal("RC041", f"{matrix.key} has patches outside of its matrix or out of order")
        if left:
            raise self._refusal("RC041", f"{next(iter(left))} belongs to no matrix")

    def _refusal(self, id: str, why: str, fix: str = "Save the twins again") -> TwinsError:
        return TwinsError(f"Cannot use {self._file}: {why}. {fix}", id=id)


def entry_for(matmuls: Sequence[Matmul], digests: Mapping[Matmul, str], quantizer: str) -> Entry:
    """Return the cache entry of some matmuls' weights, named by everything that they are made from."""
    layouts = {x: x.layout + (f" or {LAYOUT_MXFP4}" if x.experts else "") if x.lossless else "" for x in matmuls}
    made_from = sorted((x.name, x.group_size, x.scales_inputs, layouts[x], digests[x]) for x in matmuls)
    identity = hashlib.sha256(repr((VERSION, quantizer, made_from)).encode()).hexdigest()
    size = sum(math.prod(x.shape) for x in matmuls) / 1e6
    what, kind = ("a backbone", "backbone") if quantizer == LOSSLESS else (f"twins by {quantizer}", "twins")
    return Entry(f"{kind}-{identity[:40]}", f"{what}, {len(made_from)} matrices of {size:.0f}M weights")


def is_stored(entry: Entry) -> bool:
    """Whether an entry has weights; they are not read."""
    return (entry.folder / _PACKED / FILE).exists()


def open_stored(entry: Entry) -> TwinFile | None:
    """Return an entry's file, None without one; a damaged one is reported and removed."""
    folder = entry.folder / _PACKED
    if not (folder / FILE).exists() or not all(map(is_trusted, (entry.folder, folder, folder / FILE))):
        return None
    try:
        found = TwinFile(folder)
    except TwinsError as error:
        remove_damaged(entry, error)
        return None
    entry.touch()
    return found


def remove_damaged(entry: Entry, error: TwinsError) -> None:
    """Remove an entry whose file cannot be used, with a warning."""
    message = f"Cached weights cannot be used and are quantized again. {error.text}"
    warnings.warn(with_id("RC103", message), RiverWarning, stacklevel=3)
    shutil.rmtree(entry.folder, ignore_errors=True)


def write_stored(entry: Entry, weights: Sequence[TwinWeight]) -> None:
    """Write weights to an entry, unless another process has; report a folder that cannot be written."""
    # Weights that keep their values, or have 8 bits, take little time to pack.
    weights = [made for made in weights if not made.weight.unpacked and made.weight.layout != lossless.LAYOUT_8BIT]
    if not weights:
        return
    folder = entry.folder / _PACKED
    try:
        entry.make_folder()
        with locked(folder):
            if not (folder / FILE).exists():
                write(folder, weights)
                folder.chmod(0o700)
                (folder / FILE).chmod(0o600)
                entry.describe()
    except (TwinsError, OSError) as error:
        warn_not_writable(error.text if isinstance(error, TwinsError) else error)
    evict()


def _is_finite(tensor: Tensor) -> bool:
    """Whether all floats are finite."""
    # One thread: with hundreds of small tensors, torch's threads would wait for each other at every one.
    infinity = _INFINITIES.get(tensor.dtype)
    if infinity is None:
        return True
    bits = tensor.view(torch.int16 if tensor.itemsize == 2 else torch.int32).numpy()
    return not bool(((bits & infinity) == infinity).any())


def _other_version(version: str | None) -> str:
    return f"it has version {version}, and this release reads {VERSION}"


def _tensors(key: str, packed: PackedLinear, input_scale: Tensor | None) -> dict[str, Tensor]:
    scale_zero = packed.scale_zero
    if packed.layout == "plain" and torch.equal(scale_zero.bfloat16().float(), scale_zero):
        scale_zero = scale_zero.bfloat16()
    found = {"qweight": packed.qweight, "scale_zero": scale_zero, "input_scale": input_scale}
    return {f"{key}.{part}": tensor.cpu().contiguous() for part, tensor in found.items() if tensor is not None}
