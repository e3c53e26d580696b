"""Weights and moments of their inputs, for calibrated quantizers."""

from __future__ import annotations

import torch


def drawn(
    seed: int, n: int = 8, k: int = 64, tokens: int = 96, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns a weight, correlated inputs of different sizes, and their moments."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=g, dtype=dtype)
    mixing = torch.randn(k, k, generator=g, dtype=dtype) / k**0.5 + torch.eye(k, dtype=dtype)
    sizes = torch.randn(k, generator=g, dtype=dtype).exp()
    x = torch.randn(tokens, k, generator=g, dtype=dtype) @ mixing * sizes
    return weight, x, x.T @ x / tokens


def damped(moments: torch.Tensor, damping: float) -> torch.Tensor:
    """Adds a share of the mean square to each feature's own."""
    return moments + damping * moments.diagonal().mean() * torch.eye(len(moments), dtype=moments.dtype)
