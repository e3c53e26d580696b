"""The tiles of kernels: measured on a device, shipped for an architecture, or those of the nearest shape.

Not handled: tiles for shapes far from all of a table, which need `tools.kernels.search`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
import operator
import os
import re
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TypeAlias

from river_compile.kernels import MAX_EXACT_ROWS
from river_compile.kernels.files import cache_folder
from river_compile.kernels.messages import with_id
from river_compile.kernels.triton.linear import LinearSpec, LinearTile, min_columns
from river_compile.kernels.triton.spec import DEFAULT_DEVICE, next_power_of_two

SHIPPED = Path(__file__).with_name("tiles.json")
ATTENTION_BLOCK = 32  # slots of a step of attention
Shape: TypeAlias = tuple[int, int]  # output and input features; of attention KV heads and slots
# By device and form. `SHIPPED` has architectures, and an unknown one takes the nearest older one's tiles. Devices of
# the tuning file include the version of Triton, since another one compiles the same source to other code. Both are
# JSON, {device: {form: {"NxK": fields of the tile, or splits}}}, written by `python -m tools.kernels.tune`.
Table: TypeAlias = dict[str, dict[str, dict[Shape, tuple[int, ...]]]]


def best_tile(spec: LinearSpec, device: str = DEFAULT_DEVICE) -> LinearSpec:
    """Return `spec` with the tile measured for its shape on this device, else with that of the nearest shape."""
    form, shape = form_key(spec), (spec.out_features, spec.in_features)
    measured = read_table(tuning_file()).get(tuning_key(device), {}).get(form, {})
    shipped = _shipped(device)[form]
    found = measured.get(shape) or shipped[nearest(shipped, shape)]
    return dataclasses.replace(spec, tile=_adapt(LinearTile(*found), spec))


def form_key(spec: LinearSpec) -> str:
    """Names the kind of kernel that a table has tiles for, of any shape."""
    rows = "many rows" if spec.rows is None else f"up to {8 if min_rows(spec) == 8 else MAX_EXACT_ROWS} rows"
    rows = "any rows" if spec.any_width else "one row" if spec.row_by_row else rows
    weights = f"w4/{spec.group_size}" if spec.weights == "w4" else spec.weights
    dtype = "float32" if spec.dtype == "float32" else "16 bits"
    kind = "experts" if spec.experts else "gated" if spec.gated else "single"
    return f"{weights}, {dtype}, {rows}, {kind}{'' if spec.norm == 'none' else ' behind a norm'}"


def min_rows(spec: LinearSpec) -> int:
    """Return the least rows of a tile: a dot has at least 8 columns, for any number of rows."""
    if spec.form == "groups":
        return 8 if spec.row_by_row or (spec.rows or 16) <= 8 else 16
    return 1 if spec.row_by_row else 16


def _adapt(tile: LinearTile, spec: LinearSpec) -> LinearTile:
    """Change another shape's tile for a spec: weights are whole tiles, no split is empty."""
    splits = 1 if spec.matrices and spec.bias else min(tile.split_k, math.ceil(spec.in_features / tile.block_k))
    width = tile.block_n
    if spec.matrices and not spec.gated:
        width = max(math.gcd(width, *spec.matrices), min_columns(spec.weights, spec.form))
    return dataclasses.replace(tile, block_n=width, split_k=splits)


def interpreter_tile(spec: LinearSpec) -> LinearSpec:
    """Return `spec` with a large tile for Triton's interpreter, whose time depends on the number of operations."""
    width = max(16, min_columns(spec.weights, spec.form), min(512, next_power_of_two(spec.out_features)))
    if spec.matrices and not spec.gated:
        width = math.gcd(width, *spec.matrices)
    depth = max(128, min(2048, next_power_of_two(spec.in_features)))
    return dataclasses.replace(spec, tile=LinearTile(width, depth, min_rows(spec)))


def attention_splits(heads: int, slots: int, head_dim: int, device: str = DEFAULT_DEVICE) -> int:
    """Return how many programs share the cache of one of all `heads` KV heads."""
    sizes = {int(form.split()[1]): form for form in _shipped(device) if form.startswith("attention")}
    form = sizes[min(sizes, key=lambda size: (abs(math.log2(size / head_dim)), size))]
    entries = _shipped(device)[form]
    (splits,) = entries[nearest(entries, (heads, slots))]
    return min(splits, 1 << math.ceil(slots / ATTENTION_BLOCK).bit_length() - 1)


def nearest_architecture(name: str, known: Collection[str]) -> str:
    """Return the same architecture, else the newest older one of its vendor, else the oldest, else the default."""
    vendor, number = _numbered(name)
    of_vendor = sorted((other for other in known if _numbered(other)[0] == vendor), key=_numbered)
    older = [other for other in of_vendor if _numbered(other)[1] <= number]
    return (older[-1:] or of_vendor[:1] or [DEFAULT_DEVICE])[0]


def _numbered(architecture: str) -> tuple[str, int]:
    """Parse "sm_90" or "gfx90a" to the vendor's prefix and an increasing number; ("", 0) for anything else."""
    found = re.fullmatch(r"(sm_)(\d+)|(gfx)([0-9a-f]+)", architecture)
    if found is None:
        return "", 0
    vendor, number = filter(None, found.groups())
    return vendor, int(number, 16 if vendor == "gfx" else 10)


def nearest(shapes: Collection[Shape], shape: Shape) -> Shape:
    """Return the nearest shape by the logarithms of both sizes; of equally near ones the least."""

    def distance(other: Shape) -> tuple[float, Shape]:
        return math.log2(other[0] / shape[0]) ** 2 + math.log2(other[1] / shape[1]) ** 2, other

    return min(shapes, key=distance)


@functools.cache
def _shipped(device: str) -> dict[str, dict[Shape, tuple[int, ...]]]:
    table = read_table(SHIPPED)
    return table[nearest_architecture(device, table)]


def tuning_file() -> Path:
    """Return the path of measured tiles: $RIVER_COMPILE_TUNING, or ``tuning.json`` in the cache folder."""
    return Path(os.environ.get("RIVER_COMPILE_TUNING") or cache_folder() / "tuning.json")


@functools.cache
def tuning_key(device: str) -> str:
    """Names the device of measured tiles: "sm_90, triton 3.6" (the installed version), or "sm_90, no triton"."""
    if importlib.util.find_spec("triton") is None:
        return f"{device}, no triton"
    import triton  # not `importlib.metadata`: its packages have several names

    return f"{device}, triton {'.'.join(triton.__version__.split('.')[:2])}"


def read_table(path: Path) -> Table:
    """Read a table; a missing one is empty, a damaged one is empty with a warning."""
    try:
        return _read(path, path.stat().st_mtime_ns)
    except (FileNotFoundError, NotADirectoryError):
        return {}


@functools.cache
def _read(path: Path, _modified: int) -> Table:
    try:
        devices = json.loads(path.read_text(encoding="utf-8"))
        return {
            device: {
                form: {_shape(text): _values(form, found) for text, found in tiles.items()}
                for form, tiles in forms.items()
            }
            for device, forms in devices.items()
        }
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        message = f"Cannot read the tuning file {path}: {error}. Default tiles are used. Delete or repair the file"
        warnings.warn(with_id("RC084", message), stacklevel=3)
        return {}


def _shape(text: str) -> Shape:
    first, second = map(int, text.split("x"))
    return first, second


def _values(form: str, found: Sequence[int]) -> tuple[int, ...]:
    """Return the fields of a tile, or splits; raise a ValueError or TypeError for anything else."""
    if not form.startswith("attention"):
        LinearTile(*found)
    return tuple(map(operator.index, found))
