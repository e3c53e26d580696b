"""Buffers between guard zones, poisoned outputs, and one way to run a kernel twice.

A kernel under test sees tensors that lie in the middle of larger ones. The floating guards hold NaN, so a read outside
shows in the result; after the run every guard must be what it was, so a write outside shows too. Outputs and workspaces
start as NaN, so an element that was never written shows.
"""

import math

import torch
from river_compile.kernels.loader import load

GUARD = 64
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SQNR_FLOOR = {torch.float32: 90.0, torch.float16: 55.0, torch.bfloat16: 40.0}
INTEGER_GUARD = {torch.int32: 0x5A5A5A5A, torch.int64: 1 << 40, torch.bool: True}


class Guarded:
    """A tensor with the values of `tensor` in the middle of a larger storage."""

    def __init__(self, tensor: torch.Tensor):
        fill = math.nan if tensor.dtype.is_floating_point else INTEGER_GUARD[tensor.dtype]
        self.storage = torch.full((tensor.numel() + 2 * GUARD,), fill, dtype=tensor.dtype)
        self.tensor = self.storage[GUARD : GUARD + tensor.numel()].view(tensor.shape)
        self.tensor.copy_(tensor)
        self._expected = self._guards().clone()

    def _guards(self) -> torch.Tensor:
        guards = torch.cat([self.storage[:GUARD], self.storage[-GUARD:]])
        return guards.view(torch.uint8) if guards.dtype != torch.bool else guards

    def check(self, name: str) -> None:
        assert torch.equal(self._guards(), self._expected), f"{name}: written outside of the buffer"


def poisoned(shape, dtype: torch.dtype) -> torch.Tensor:
    """A tensor that nobody has written yet: NaN, or the integer guard's value."""
    fill = math.nan if dtype.is_floating_point else INTEGER_GUARD[dtype]
    return torch.full(tuple(shape), fill, dtype=dtype)


def run_guarded(spec, rows: int = 1, **buffers: torch.Tensor) -> dict[str, torch.Tensor]:
    """Runs the kernel of `spec` in the interpreter twice, from equal buffers; returns them as the first run left them.

    Checks every guard and that both runs are bit-identical.
    """
    kernel = load(spec, interpret=True)
    for workspace in spec.workspaces():
        buffers[workspace.name] = poisoned(workspace.shape(rows), getattr(torch, workspace.dtype))
    results = []
    for _ in range(2):
        guarded = {name: Guarded(tensor) for name, tensor in buffers.items()}
        kernel(rows=rows, **{name: g.tensor for name, g in guarded.items()})
        for name, g in guarded.items():
            g.check(name)
        results.append({name: g.tensor for name, g in guarded.items()})
    for name, first in results[0].items():
        bits = [r[name].contiguous().view(torch.uint8) for r in results]
        assert torch.equal(*bits), f"{name}: two runs differ"
        del first
    return results[0]


def assert_close(actual: torch.Tensor, expected: torch.Tensor, magnitude: torch.Tensor | float = 1.0) -> None:
    """Compares a kernel's result with the float64 reference.

    The tolerance is relative to the sum of magnitudes that the result was added up from (`magnitude`, at least the
    result's own), the only honest scale where terms cancel. The signal-to-noise ratio has a floor besides.
    """
    assert not actual.isnan().any(), f"{int(actual.isnan().sum())} elements are NaN: unwritten, or read from outside"
    error = (actual.double() - expected).abs()
    scale = torch.maximum(expected.abs(), torch.as_tensor(magnitude, dtype=torch.float64).expand(expected.shape))
    worst = (error / scale.clamp_min(1e-30)).max().item()
    assert worst <= TOLERANCE[actual.dtype], f"relative error {worst:.3g} exceeds {TOLERANCE[actual.dtype]}"


def assert_sqnr(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Checks the signal-to-noise ratio of a result as a whole against its dtype's floor."""
    noise = (actual.double() - expected).square().sum()
    signal = expected.square().sum()
    assert noise <= signal * 10 ** (-SQNR_FLOOR[actual.dtype] / 10), f"SQNR {10 * torch.log10(signal / noise):.1f} dB"
