"""Tiles that a tuning run has measured and saved.

A tuning file is JSON, ``{device and Triton version: {key: tile fields}}`` (see `tuned_for`), written by
`python -m tools.kernels.tune` to $RIVER_COMPILE_TUNING or ``tuning.json`` in the cache directory, where
it is looked up first. What was measured with another version of Triton counts for nothing, since that compiles the same
source to other code.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import warnings
from pathlib import Path

from river_compile.kernels.files import cache_folder
from river_compile.kernels.triton.linear import LinearSpec, LinearTile


def tuning_file() -> Path:
    """Returns where tuned tiles are saved."""
    return Path(os.environ.get("RIVER_COMPILE_TUNING") or cache_folder() / "tuning.json")


@functools.cache
def tuned_for(device: str) -> str:
    """Names whom a measured tile is for: "sm_90, triton 3.6", with the version that is installed, or "no triton"."""
    if importlib.util.find_spec("triton") is None:
        return f"{device}, no triton"
    import triton  # (whose packages have several names)

    return f"{device}, triton {'.'.join(triton.__version__.split('.')[:2])}"


def tuning_key(spec: LinearSpec) -> str:
    """Names what a tuned tile is for: the fields of the spec that move bytes or instructions."""
    parts = [spec.weights, spec.group_size, spec.dtype, spec.rows, spec.in_features, spec.out_features, spec.norm]
    stack = [f"of{spec.experts}"] if spec.experts else []
    several = [f"parts{'_'.join(map(str, spec.matrices))}"] if spec.matrices else []
    return "-".join(map(str, [*parts, "gated" if spec.gated else "single", *stack, *several]))


def saved_tiles(path: Path) -> dict[str, dict[str, LinearTile]]:
    """Reads a tuning file; one that is not there is empty, a damaged one is empty with a warning."""
    try:
        return _read_tiles(path, path.stat().st_mtime_ns)
    except (FileNotFoundError, NotADirectoryError):
        return {}


@functools.cache
def _read_tiles(path: Path, _modified: int) -> dict[str, dict[str, LinearTile]]:
    try:
        devices = json.loads(path.read_text())
        return {d: {key: LinearTile(**tile) for key, tile in tiles.items()} for d, tiles in devices.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        warnings.warn(f"the tuning file {path} cannot be read and is ignored: {error}", stacklevel=3)
        return {}
