"""Lowerings for tests, whatever the options say: fused twins and unfused ones, without a compiler."""

from __future__ import annotations

import functools
from collections.abc import Callable

from river_compile.backend import river
from river_compile.lowering.inductor import Lowering

FUSED = Lowering("eager", "triton", fuse=True)
UNFUSED = Lowering("eager", "plain", fuse=False)  # with products in plain torch of the same 4-bit grids
BLOCK_RULES = ("norm + q|k|v", "rope + kv write", "attention", "o + residual", "norm + gate|up", "down + residual")


def lowered(lowering: Lowering) -> Callable:
    """Returns the backend with a lowering."""
    return functools.partial(river, lowering=lowering)
