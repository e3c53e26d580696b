"""Lowerings for tests, whatever the options say: fused twins and unfused ones, without a compiler."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

from river_compile import backend
from river_compile.lowering.choose import Lowering

FUSED = Lowering("eager", "triton", fuse=True)
UNFUSED = Lowering("eager", "plain", fuse=False)  # as on a CPU, with float32 products of the same 4-bit grids
CPU = Lowering("eager", "aten_cpu", fuse=False)
BLOCK_RULES = ("norm + q|k|v", "rope + kv write", "attention", "o + residual", "norm + gate|up", "down + residual")


@contextlib.contextmanager
def lowered(lowering: Lowering) -> Iterator[None]:
    """Makes the backend use a lowering."""
    with mock.patch.object(backend, "choose_lowering", return_value=lowering):
        yield
