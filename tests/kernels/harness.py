"""Buffers between guard zones, poisoned outputs, and one way to run a kernel twice.

Floating guards hold NaN, so a read outside shows in the result; a changed guard shows a write outside. Outputs and
workspaces start as NaN, so an unwritten element shows.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from river_compile.kernels.triton.loader import load

GUARD = 64
#: Relative to the magnitudes that a result was added up from. The interpreter cuts bfloat16 off instead of rounding it.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SQNR_FLOOR = {torch.float32: 90.0, torch.float16: 50.0, torch.bfloat16: 30.0}
INTEGER_GUARD = {torch.uint8: 0x5A, torch.int8: 0x5A, torch.int32: 0x5A5A5A5A, torch.int64: 1 << 40, torch.bool: True}


class Guarded:
    """A copy of a tensor in the middle of a larger storage on `device`."""

    def __init__(self, tensor: torch.Tensor, device: str = "cpu"):
        fill = math.nan if tensor.dtype.is_floating_point else INTEGER_GUARD[tensor.dtype]
        self.storage = torch.full((tensor.numel() + 2 * GUARD,), fill, dtype=tensor.dtype, device=device)
        self.tensor = self.storage[GUARD : GUARD + tensor.numel()].view(tensor.shape)
        self.tensor.copy_(tensor)
        self._expected = self._guards()

    def _guards(self) -> torch.Tensor:
        return torch.cat([self.storage[:GUARD], self.storage[-GUARD:]]).view(torch.uint8).clone()

    def check(self, name: str) -> None:
        assert torch.equal(self._guards(), self._expected), f"{name}: written outside of the buffer"


def poisoned(shape, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """Returns an unwritten tensor: NaN, or the integer guard's value."""
    fill = math.nan if dtype.is_floating_point else INTEGER_GUARD[dtype]
    return torch.full(tuple(shape), fill, dtype=dtype, device=device)


def run_guarded(spec, rows: int = 1, device: str = "cpu", **buffers: torch.Tensor) -> dict[str, torch.Tensor]:
    """Runs a kernel twice from equal buffers, checks guards and equal bits, and returns the buffers."""
    kernel = load(spec, interpret=device == "cpu")
    kept = [name for name, buffer in spec.buffers(rows).items() if buffer.kept_for]
    for name, buffer in spec.buffers(rows).items():
        if buffer.workspace:
            fresh = torch.zeros if buffer.kept_for else poisoned
            buffers[name] = fresh(buffer.shape, dtype=getattr(torch, buffer.dtype), device=device)
    results = []
    for _ in range(2):
        guarded = {name: Guarded(tensor, device) for name, tensor in buffers.items()}
        kernel(rows=rows, **{name: g.tensor for name, g in guarded.items()})
        for name, g in guarded.items():
            g.check(name)
        for name in kept:
            assert not guarded[name].tensor.any(), f"{name}: not left as zeros"
        results.append({name: g.tensor for name, g in guarded.items()})
    for name, tensor in results[0].items():
        again = results[1][name]
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), again.reshape(-1).view(torch.uint8)), (
            f"{name}: two runs differ"
        )
    return results[0]


@contextlib.contextmanager
def in_order(change: Callable[[list], object]) -> Iterator[None]:
    """Makes the interpreter run each launch's programs in the order of `change(programs)`."""
    from triton.runtime.interpreter import interpreter_builder as builder

    set_dim, set_idx, order = builder.set_grid_dim, builder.set_grid_idx, []

    def begin(*sizes: int) -> None:
        set_dim(*sizes)
        order[:] = itertools.product(*map(range, sizes))
        change(order)

    with mock.patch.multiple(builder, set_grid_dim=begin, set_grid_idx=lambda *_: set_idx(*order.pop())):
        yield


@contextlib.contextmanager
def dots_in_order() -> Iterator[None]:
    """Makes the interpreter's dots add in float32 and in order; a BLAS's order differs by rows and machine."""
    from triton.runtime.interpreter import TensorHandle
    from triton.runtime.interpreter import interpreter_builder as builder

    def dot(a, b, acc, *_):
        rows, columns = (factor.data.astype(acc.data.dtype) for factor in (a, b))
        products = (rows[..., k, None] * columns[..., k, None, :] for k in range(rows.shape[-1]))
        return TensorHandle(sum(products, acc.data), acc.dtype.scalar)

    with mock.patch.object(builder, "create_dot", dot):
        yield


def assert_close(
    actual: torch.Tensor,
    expected: torch.Tensor,
    magnitude: torch.Tensor | float = 0.0,
    dtype: torch.dtype | None = None,
) -> None:
    """Compares with float64, by the tolerance of `dtype`, relative to the sum of magnitudes of each result."""
    assert not actual.isnan().any(), f"{int(actual.isnan().sum())} elements are NaN: unwritten, or read from outside"
    error = (actual.double() - expected).abs()
    magnitude = torch.as_tensor(magnitude, dtype=torch.float64, device=expected.device)
    scale = torch.maximum(expected.abs(), magnitude.expand(expected.shape))
    # Below the smallest normal number of the dtype the relative error of a rounding has no bound.
    worst = (error / scale.clamp_min(torch.finfo(actual.dtype).tiny)).max().item()
    limit = TOLERANCE[dtype or actual.dtype]
    assert worst <= limit, f"relative error {worst:.3g} exceeds {limit}"


def assert_rounded(actual: torch.Tensor, expected: torch.Tensor, magnitude: torch.Tensor) -> None:
    """Compares a result computed in float32 and rounded once to its dtype, if that does not overflow."""
    finfo = torch.finfo(actual.dtype)
    rounding = (expected.abs() + finfo.smallest_normal) * finfo.eps / TOLERANCE[torch.float32]
    fits = expected.abs() < 0.9 * finfo.max
    if fits.any():
        assert_close(actual[fits], expected[fits], (magnitude + rounding)[fits], torch.float32)


def assert_sqnr(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Checks the signal-to-noise ratio of a result against the minimum of `dtype`."""
    noise = (actual.double() - expected).square().sum()
    signal = expected.square().sum()
    limit = signal * 10 ** (-SQNR_FLOOR[dtype] / 10)
    assert noise <= limit, f"SQNR {10 * torch.log10(signal / noise):.1f} dB is below {SQNR_FLOOR[dtype]}"
