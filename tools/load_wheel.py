"""Checks an installed wheel's compiled kernels under the torch at hand: ``python tools/load_wheel.py``.

It loads the libraries that the wheel carries, and compares a matmul of each instruction set of this machine with plain
torch. Nothing is compiled: without the wheel's libraries it fails. Run it by path, so that no checkout is imported.
"""

from __future__ import annotations

import sys

import torch

from river_compile.kernels.native import build, load
from river_compile.kernels.quant.data_free import quantize
from river_compile.kernels.quant.layouts import pack

_LARGEST_ERROR = 0.03  # of the largest output: activations are rounded to 8 bits


def main() -> int:
    """Return 0 if the wheel's kernels load and compute; raise otherwise."""
    if not build.has_prebuilt():
        raise SystemExit(f"error: {build.BUILT} has no libraries of these sources; install the wheel first")
    torch.manual_seed(0)
    packed = pack(quantize(torch.randn(96, 256), group_size=64, quantizer="rtn"), "native")
    x = torch.randn(3, 256, dtype=torch.bfloat16)
    expected = x.float() @ packed.dequantize().T
    for isa in build.supported_isas():
        y = load.load(isa).linear(x, packed.qweight, packed.scale_zero, None, 96, 64)
        error = float((y.float() - expected).abs().max() / expected.abs().max())
        if not error < _LARGEST_ERROR:
            raise SystemExit(f"error: {isa.name} differs by {error:.1%} under torch {torch.__version__}")
        print(f"torch {torch.__version__}, {isa.name}: differs by {error:.2%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
