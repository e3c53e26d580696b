"""What takes longest of packing, in C++: 4-bit grids several times as fast as in PyTorch, and weights in 12 bits.

Of grids these are `fit_grid` and `_round_block` of `river_compile.kernels.quant.calibrated`, for float32 on a CPU.
One thread runs each call, without Python's lock: whoever packs several matrices calls from several threads.

Not handled: other dtypes and devices, groups whose size is no multiple of 16, and machines without a compiler.
`usable` says whether a matrix is one of these.
"""

from __future__ import annotations

import ctypes
import functools
import logging

import torch
from torch import Tensor

from river_compile.kernels.native.build import CannotBuild
from river_compile.kernels.native.isa import Isa, chosen
from river_compile.kernels.native.libraries import packing_for

log = logging.getLogger("river_compile.kernels.native.packing")

_STORED_AS = (torch.float32, torch.bfloat16)
_LANES = 16


def available() -> bool:
    """Says whether there is a library of these functions, which a machine without a compiler may lack."""
    return _library(chosen()) is not None


def usable(weight: Tensor, group_size: int = _LANES, dtype: torch.dtype = torch.float32) -> bool:
    """Says whether the functions here take a matrix, with scales and zeros stored in `dtype`."""
    fits = weight.dtype == torch.float32 and weight.device.type == "cpu" and not group_size % _LANES
    return fits and dtype in _STORED_AS and available()


def fit_grid(weight: Tensor, group_size: int, importance: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns scale and zero, float32 ``[N, K / group_size]`` and rounded to `dtype`, of weights float32 ``[N, K]``.

    `importance` is float32 ``[K]`` and sums to one in each group.
    """
    rows, groups = weight.shape[0], weight.shape[1] // group_size
    weight, importance = weight.contiguous(), importance.contiguous()
    scale, zero = torch.empty(rows, groups), torch.empty(rows, groups)
    sizes = map(ctypes.c_int64, (rows, groups, group_size))
    _call("river_fit_grid", weight, importance, *sizes, ctypes.c_bool(dtype == torch.bfloat16), scale, zero)
    return scale, zero


def round_block(
    left_KN: Tensor,
    scale_GN: Tensor,
    zero_GN: Tensor,
    group_of: Tensor,
    factor: Tensor,
    errors_KN: Tensor,
    q_KN: Tensor,
) -> None:
    """Rounds consecutive columns of a matrix; the arguments are those of PyTorch's, contiguous but `factor`."""
    sizes = map(ctypes.c_int64, (factor.stride(0), *left_KN.shape))
    _call("river_round_block", left_KN, scale_GN, zero_GN, group_of, factor, *sizes, errors_KN, q_KN)


def count_upper(weight: Tensor) -> Tensor:
    """Returns how many elements of a contiguous bfloat16 tensor have each upper byte, int64 ``[256]``."""
    counts = torch.zeros(256, dtype=torch.int64)
    _call("river_count_upper", weight, ctypes.c_int64(weight.numel()), counts)
    return counts


def pack_bf12(weight: Tensor, palette: Tensor, units: Tensor, first: Tensor, patches: Tensor) -> None:
    """Packs a contiguous bfloat16 matrix ``[N, K]`` in 12 bits a weight, into what `kernels.quant.bf12` has made."""
    rows, features = map(ctypes.c_int64, weight.shape)
    _call("river_pack_bf12", weight, rows, features, palette, units, ctypes.c_int64(len(first) - 1), first, patches)


def _call(name: str, *arguments: Tensor | ctypes._SimpleCData) -> None:
    library = _library(chosen())
    assert library is not None, "`usable` was not asked"
    pointers = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments]
    getattr(library, name)(*pointers)


@functools.cache
def _library(isa: Isa) -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(packing_for(isa)))
    except CannotBuild as error:
        log.info("matrices are packed in PyTorch: %s", error)
        return None
    for name in ("fit_grid", "round_block", "count_upper", "pack_bf12"):
        getattr(library, f"river_{name}").restype = None
    return library
