"""What torch for ROCm lacks is refused by name."""

import torch

from river_compile.capture.cuda import CudaGraphs


def test_hip_graphs_leave_decisions_to_the_host(monkeypatch):
    """torch for ROCm calls the device "cuda" and has no CUDA; its newest releases have no IF nodes either."""
    monkeypatch.setattr(torch.version, "hip", "7.2.0", raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert CudaGraphs.why_undecided(None) == "HIP graphs hold no decisions"
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    assert CudaGraphs.why_undecided(None) is None
