"""Lowerings that no option's own values give: ``options={"kernels": OPERATORS}``. None needs a compiler but Inductor's.

Not handled: the C++ kernels, which tests of these give themselves.
"""

from __future__ import annotations

from river_compile.passes.program import Lowering

OPERATORS = Lowering("eager", "plain", fuse=False)  # operator by operator; 4-bit matmuls in plain torch
FUSED = Lowering("eager", "triton", fuse=True)  # with the generated kernels; on a CPU in Triton's interpreter
UNQUANTIZED = Lowering("eager", None, fuse=False)  # twins read the 16-bit weights: bit-identical to the eager model
INDUCTOR = Lowering("inductor", "plain", fuse=False)
UNQUANTIZED_INDUCTOR = Lowering("inductor", None, fuse=False)
BLOCK_RULES = ("norm + q|k|v", "rope + kv write", "attention", "o + residual", "norm + gate|up", "down + residual")


def operators_on(device: str) -> Lowering:
    """Returns `OPERATORS`, on a GPU with its own 4-bit matmul."""
    return OPERATORS if device == "cpu" else Lowering("eager", "triton", fuse=False)
