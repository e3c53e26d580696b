"""Which tile a kernel gets: what a tuning run measured for its shape, else the nearest shape's in a shipped table.

untiled(rows, K, N, ...)   a spec with a placeholder
best_tile(spec, device)    the same with its tile

A table is JSON, ``{device: {form: {"NxK": fields of the tile}}}``; of attention it holds how many programs share a
cache, by KV heads and slots. The shipped one (`tiles.json`) knows architectures, and an unknown one takes the nearest
older one's. A tuning file knows what was measured on a card, by shapes alone: its devices name the version of Triton
too, since another one compiles the same source to other code. `python -m tools.kernels.tune` writes both.

Not handled: a tile of its own for a shape that is far from all of a table (`tools.kernels.search` finds one).
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
from typing import Any, TypeAlias

from river_compile.kernels.files import cache_folder
from river_compile.kernels.triton.devices import DEFAULT_DEVICE
from river_compile.kernels.triton.linear import MAX_EXACT_ROWS, LinearSpec, LinearTile, form_of, least_columns
from river_compile.kernels.triton.spec import next_power_of_two

SHIPPED = Path(__file__).with_name("tiles.json")
ATTENTION_BLOCK = 32  # slots of a step of attention
Shape: TypeAlias = tuple[int, int]  # output and input features; of attention KV heads and slots
Table: TypeAlias = dict[str, dict[str, dict[Shape, tuple[int, ...]]]]  # by device and form


def untiled(rows: int, in_features: int, out_features: int, **fields: Any) -> LinearSpec:
    """Returns a spec for `rows` rows with a placeholder tile, the input of `best_tile`; many rows stay open."""
    step = max(128, fields.get("group_size", 64))
    fields = {"weights": "w4", "group_size": 64, "dtype": "bfloat16", **fields}
    exact = rows if rows <= {"w4": MAX_EXACT_ROWS, "bf12": 1, "dense": 0}[fields["weights"]] else None
    row_by_row = exact == 1 or bool(exact and fields.get("experts"))
    form = form_of(fields["weights"], fields["group_size"], fields["dtype"], row_by_row)
    tile = LinearTile(least_columns(fields["weights"], form), step, 1 if form == "row" else 16)
    return LinearSpec(exact, in_features, out_features, tile, **fields)


def best_tile(spec: LinearSpec, device: str = DEFAULT_DEVICE) -> LinearSpec:
    """Returns `spec` with the tile that was measured for its shape on this device, else the nearest shape's.

    Its own is ignored.
    """
    form, shape = form_key(spec), (spec.out_features, spec.in_features)
    measured = read_table(tuning_file()).get(tuned_for(device), {}).get(form, {})
    shipped = _shipped(device)[form]
    found = measured.get(shape) or shipped[nearest(shipped, shape)]
    return dataclasses.replace(spec, tile=_fitted(LinearTile(*found), spec))


def form_key(spec: LinearSpec) -> str:
    """Names what has tiles of its own in a table, whatever the shape."""
    rows = "many rows" if spec.rows is None else f"up to {8 if least_rows(spec) == 8 else MAX_EXACT_ROWS} rows"
    rows = "any rows" if spec.any_width else "one row" if spec.row_by_row else rows
    weights = f"w4/{spec.group_size}" if spec.weights == "w4" else spec.weights
    dtype = "float32" if spec.dtype == "float32" else "16 bits"
    kind = "experts" if spec.experts else "gated" if spec.gated else "single"
    return f"{weights}, {dtype}, {rows}, {kind}{'' if spec.norm == 'none' else ' behind a norm'}"


def least_rows(spec: LinearSpec) -> int:
    """Returns the least rows of a tile: columns of a dot, of which at least 8 are made, whatever the rows."""
    if spec.form == "groups":
        return 8 if spec.row_by_row or (spec.rows or 16) <= 8 else 16
    return 1 if spec.row_by_row else 16


def _fitted(tile: LinearTile, spec: LinearSpec) -> LinearTile:
    """Returns another shape's tile as a spec takes it: its matrices are whole tiles, no split is empty."""
    splits = 1 if spec.matrices and spec.bias else min(tile.split_k, math.ceil(spec.in_features / tile.block_k))
    width = tile.block_n
    if spec.matrices and not spec.gated:
        width = max(math.gcd(width, *spec.matrices), least_columns(spec.weights, spec.form))
    return dataclasses.replace(tile, block_n=width, split_k=splits)


def interpreter_tile(spec: LinearSpec) -> LinearSpec:
    """Returns `spec` with a tile for Triton's interpreter, whose time goes by operations and not by their size."""
    width = max(16, least_columns(spec.weights, spec.form), min(512, next_power_of_two(spec.out_features)))
    if spec.matrices and not spec.gated:
        width = math.gcd(width, *spec.matrices)
    depth = max(128, min(2048, next_power_of_two(spec.in_features)))
    return dataclasses.replace(spec, tile=LinearTile(width, depth, least_rows(spec)))


def attention_splits(heads: int, slots: int, head_dim: int, device: str = DEFAULT_DEVICE) -> int:
    """Returns how many programs share the cache of one of all `heads` KV heads."""
    sizes = {int(form.split()[1]): form for form in _shipped(device) if form.startswith("attention")}
    form = sizes[min(sizes, key=lambda size: (abs(math.log2(size / head_dim)), size))]
    entries = _shipped(device)[form]
    (splits,) = entries[nearest(entries, (heads, slots))]
    return min(splits, 1 << math.ceil(slots / ATTENTION_BLOCK).bit_length() - 1)


def nearest_architecture(name: str, known: Collection[str]) -> str:
    """Returns the same architecture, else the newest older one of its vendor, else the vendor's oldest.

    A name that is no architecture counts as the default one.
    """
    vendor, number = _numbered(name)
    of_vendor = sorted((other for other in known if _numbered(other)[0] == vendor), key=_numbered)
    older = [other for other in of_vendor if _numbered(other)[1] <= number]
    return (older[-1:] or of_vendor[:1] or [DEFAULT_DEVICE])[0]


def _numbered(architecture: str) -> tuple[str, int]:
    """Returns the vendor's prefix and a number that grows, of "sm_90" or "gfx90a"; ("", 0) for anything else."""
    found = re.fullmatch(r"(sm_)(\d+)|(gfx)([0-9a-f]+)", architecture)
    if found is None:
        return "", 0
    vendor, number = filter(None, found.groups())
    return vendor, int(number, 16 if vendor == "gfx" else 10)


def nearest(shapes: Collection[Shape], shape: Shape) -> Shape:
    """Returns the nearest of some shapes by the logarithms of both sizes; of equally near ones the least."""

    def distance(other: Shape) -> tuple[float, Shape]:
        return math.log2(other[0] / shape[0]) ** 2 + math.log2(other[1] / shape[1]) ** 2, other

    return min(shapes, key=distance)


@functools.cache
def _shipped(device: str) -> dict[str, dict[Shape, tuple[int, ...]]]:
    table = read_table(SHIPPED)
    return table[nearest_architecture(device, table)]


def tuning_file() -> Path:
    """Returns where measured tiles are: $RIVER_COMPILE_TUNING, or ``tuning.json`` in the cache folder."""
    return Path(os.environ.get("RIVER_COMPILE_TUNING") or cache_folder() / "tuning.json")


@functools.cache
def tuned_for(device: str) -> str:
    """Names whom a measured tile is for: "sm_90, triton 3.6", with the version that is installed, or "no triton"."""
    if importlib.util.find_spec("triton") is None:
        return f"{device}, no triton"
    import triton  # (whose packages have several names)

    return f"{device}, triton {'.'.join(triton.__version__.split('.')[:2])}"


def read_table(path: Path) -> Table:
    """Reads a table; one that is not there is empty, a damaged one is empty with a warning."""
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
                form: {_shape(text): _values(form, found) for text, found in of.items()} for form, of in forms.items()
            }
            for device, forms in devices.items()
        }
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        warnings.warn(f"the tuning file {path} cannot be read and is ignored: {error}", stacklevel=3)
        return {}


def _shape(text: str) -> Shape:
    first, second = map(int, text.split("x"))
    return first, second


def _values(form: str, found: Sequence[int]) -> tuple[int, ...]:
    """Returns the fields of a tile, or splits; raises a ValueError or TypeError for anything else."""
    if not form.startswith("attention"):
        LinearTile(*found)
    return tuple(map(operator.index, found))
