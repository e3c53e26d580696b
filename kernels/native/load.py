"""The C++ kernels of this machine, and the operators ``torch.ops.river_native.*`` that call them.

    linear(x, weight, scale_zero, bias, out_features, group_size, int8_activations) -> y
    linear_out(x, ..., int8_activations, y)      the same into y

x is ``[..., K]`` in float32, bfloat16 or float16, `weight` and `scale_zero` are those of the layout "native" (see
`quant.layouts`), `bias` is ``[N]`` in x's dtype or None, and y is ``[..., N]`` in x's dtype, summed in float32. With
`int8_activations` x is rounded to 8 bits with one scale for each group of each row; without, it is read as it is. A
row's result has the same bits whatever the number of rows and threads, which are ``torch.get_num_threads()``.

Not handled: gradients, other devices than the CPU, products of many rows at the speed of a library.
"""

from __future__ import annotations

import ctypes
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .build import Compiler, build, find_compiler, torch_flags
from .isa import Isa, chosen

_loading = threading.Lock()
_tables: dict[str, int] = {}


def load(isa: Isa | None = None) -> Any:
    """Returns ``torch.ops.river_native``, compiling what is not in the cache folder.

    Args:
        isa: the instruction set that the operators use, None for what `chosen` says. The last call decides for the
            whole process.

    Raises:
        CannotBuild: there is no compiler, or it refuses the sources.
        ValueError: as `chosen`.
    """
    isa = isa or chosen()
    with _loading:
        if isa.name not in _tables:
            registered, compiler = bool(_tables), find_compiler()
            with ThreadPoolExecutor(2) as pool:
                kernels = pool.submit(_build_kernels, compiler, isa)
                operators = pool.submit(build, compiler, "bindings.cpp", "operators", torch_flags())
                paths = kernels.result(), operators.result()
            if not registered:
                torch.ops.load_library(str(paths[1]))
                torch.library.register_fake("river_native::linear", _linear_fake)
            _tables[isa.name] = _table(paths[0])
        torch.ops.river_native.use_kernels(_tables[isa.name])
    return torch.ops.river_native


def _build_kernels(compiler: Compiler, isa: Isa) -> Path:
    defined = (f"-DRIVER_ISA={isa.name}", f"-DRIVER_ISA_{isa.name.upper()}")
    return build(compiler, "kernels.cpp", f"kernels_{isa.name}", [*isa.flags, *defined])


def _table(library: Path) -> int:
    function = ctypes.CDLL(str(library)).river_kernels
    function.restype = ctypes.c_void_p
    return function()


def _linear_fake(
    x: Tensor,
    weight: Tensor,
    scale_zero: Tensor,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    int8_activations: bool,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))
