"""The shipped table of tiles: what the cost model chooses for a grid of shapes and for those of known models.

An entry that the nearest of the others gives as well is left out. `python -m tools.kernels.tune --shipped` writes it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from typing import Any

from river_compile.kernels.triton.linear import untiled
from river_compile.kernels.triton.tiles import Shape, Table, form_key, nearest

from .devices import DEVICES, Device
from .search import cheapest, cheapest_splits
from .shapes import MODELS, ModelShape

_WIDTHS = (128, 512, 2048, 8192, 32768, 131072)  # output features
_DEPTHS = (128, 512, 2048, 8192, 32768)  # input features
_HEAD_DIMS, _GROUP = (64, 128, 256), 4  # of attention; query heads of a KV head
_ROWS = (1, 4, 16, 64)  # of which a table's forms tell one, up to 8, up to 16 and more apart


def forms() -> Iterator[dict[str, Any]]:
    """Yield arguments of `untiled`, but the sizes, that have separate tiles; of equal forms the first counts."""
    kinds = [{"gated": gated, "norm": norm} for gated in (False, True) for norm in ("none", "rms")]
    for group, dtype, rows in itertools.product((32, 64, 128), ("bfloat16", "float32"), _ROWS):
        fields = {"rows": rows, "group_size": group, "dtype": dtype}
        yield from (fields | kind for kind in kinds)
        if rows != 1:  # (that many experts of a token)
            yield fields | {"experts": 128}
    for kind in kinds:
        for dtype in ("bfloat16", "float32"):
            yield {"rows": 4, "weights": "dense", "group_size": 0, "dtype": dtype, **kind}
        for rows in (1, 4):
            yield {"rows": rows, "weights": "bf12", "group_size": 0, **kind}


def shipped_table() -> Table:
    """Return the table of all devices."""
    return {device.name: dict(sorted(_table_of(device))) for device in DEVICES.values()}


def _table_of(device: Device) -> Iterator[tuple[str, dict[Shape, tuple[int, ...]]]]:
    seen = set()
    for fields in forms():
        form = form_of(fields)
        if form not in seen:
            seen.add(form)
            yield form, tiles_of(fields, device)
    for head_dim in _HEAD_DIMS:
        grid = itertools.product((2**power for power in range(8)), (2**power for power in range(5, 18)))
        splits = {(h, s): (cheapest_splits(h, s, device, _GROUP, head_dim),) for h, s in grid}
        yield f"attention {head_dim}", needed(splits)


def form_of(fields: dict[str, Any]) -> str:
    """Return the name of a form."""
    return form_key(untiled(in_features=64, out_features=64, **fields))


def tiles_of(fields: dict[str, Any], device: Device) -> dict[Shape, tuple[int, ...]]:
    """Return the tiles of a form on a device, by shape."""
    shapes = {*itertools.product(_WIDTHS, _DEPTHS), *itertools.chain(*map(_shapes_of, MODELS.values()))}
    found = {}
    for n, k in sorted(shapes):
        spec = cheapest(untiled(in_features=k, out_features=n, **fields), device, fields["rows"])
        found[n, k] = dataclasses.astuple(spec.tile)
    return needed(found)


def _shapes_of(model: ModelShape) -> Iterator[Shape]:
    hidden, mlp = model.hidden, model.intermediate
    yield from ((model.qkv, hidden), (hidden, model.heads * model.head_dim), (model.vocabulary, hidden))
    yield from ((mlp, hidden), (2 * mlp, hidden), (hidden, mlp))  # (a gated pair's, and that of experts)


def needed(entries: dict[Shape, tuple[int, ...]]) -> dict[Shape, tuple[int, ...]]:
    """Return the entries without those that the others' nearest one gives too, for all of the shapes."""
    kept, whose = dict(entries), {shape: shape for shape in entries}
    for shape in entries:
        less = {other: found for other, found in kept.items() if other != shape}
        moved = {other: nearest(less, other) for other, owner in whose.items() if owner == shape} if less else {}
        if less and all(less[to] == entries[other] for other, to in moved.items()):
            kept, whose = less, whose | moved
    return kept


def text_of(table: Table) -> str:
    """Return a table as JSON, sorted, with a line for each shape."""
    devices = []
    for device, forms in sorted(table.items()):
        lines = []
        for form, tiles in sorted(forms.items()):
            entries = (f'   "{a}x{b}": {json.dumps(values)}' for (a, b), values in sorted(tiles.items()))
            lines.append(f"  {json.dumps(form)}: {{\n" + ",\n".join(entries) + "\n  }")
        devices.append(f" {json.dumps(device)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(devices) + "\n}\n"
