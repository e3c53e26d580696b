"""Random tensors and packed weights for the operators `torch.ops.river.*`, and one call of each of them."""

from __future__ import annotations

import torch

from river_compile.kernels import mixture_ops  # noqa: F401  (registers river::mixture and river::route)
from river_compile.kernels.quant.data_free import quantize
from river_compile.kernels.quant.layouts import PackedLinear, pack_stack
from tests.kernels.packing import pack_linear

G = torch.Generator().manual_seed(0)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=G).to(dtype)


def packed(n: int, k: int, layout: str, group: int = 32) -> PackedLinear:
    return pack_linear(random(n, k) / k**0.5, group, layout, "rtn")


def stacked(experts: int, n: int, k: int, layout: str, group: int = 32) -> PackedLinear:
    grid = quantize(random(experts * n, k) / k**0.5, group, "rtn").rounded(torch.bfloat16)
    return pack_stack(grid, layout, experts)


def caches(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return random(2, 1, 6, 16, dtype=dtype), random(2, 1, 6, 16, dtype=dtype)


def sample_calls() -> dict[str, tuple]:
    """Returns operator name -> arguments for each operator (and layout), equal in every call."""
    G.manual_seed(0)
    x, w = random(2, 1, 64), {layout: packed(24, 64, layout) for layout in ("triton", "plain")}
    norm, bias = ("rms", random(64), None, 1e-6), random(24)
    calls = {}
    for name, p in w.items():
        weights = (p.qweight, p.scale_zero, bias, 24, 32, name)
        calls[f"linear {name}"] = (x, *weights)
        calls[f"linear with residual {name}"] = (x, *weights, random(2, 1, 24))
        calls[f"linear after a norm {name}"] = (x, *weights, None, *norm)
        calls[f"linear gated {name}"] = (x, *weights, random(2, 1, 12), *norm, "silu", True)
        stack, chosen = stacked(3, 16, 64, name), torch.tensor([2, 0, 2, -1])
        calls[f"experts {name}"] = (random(4, 64), stack.qweight, stack.scale_zero, chosen, 16, 32, name)
    calls["experts 16 bits"] = (random(4, 64), random(3, 16, 64), None, torch.tensor([2, 0, 2, -1]), 16, 0, "dense")
    calls["route"] = (random(3, 5), 2, "all", True)
    calls["route in the logits' dtype"] = (random(3, 5, dtype=torch.bfloat16), 2, "chosen", False)
    index, weight = torch.tensor([[2, 0], [1, -1]]), random(2, 2)
    stacks = (random(3, 32, 64), None, random(3, 32), 0, random(3, 64, 16), None, None, 0)
    calls["mixture"] = (random(2, 64), index, weight, *stacks, 16, "silu", False, "dense dense", random(2, 64))
    for layout in ("dense", "triton"):
        calls[f"linear 16 bits {layout}"] = (x, random(24, 64), None, None, 24, 0, layout, None, *norm)
    pair = [random(32, 64), random(32, 64)]
    calls["merged"] = (x, [*pair, random(16, 64)], [random(32), random(32), random(16)], None, *norm)
    calls["merged gated"] = (x, pair, [], random(2, 1, 32), *norm, "silu", True)
    calls["norm"] = (x, "rms", random(64), None, 1e-6, random(2, 1, 64))
    calls["rescore"] = (random(2, 1, 300), x, random(300, 64), random(300), "rms", random(64), None, 1e-6)
    calls["norm alone"] = (x, "layer", random(64), random(64), 1e-6, None)
    k_cache, v_cache = caches()
    cos, sin = random(1, 1, 16), random(1, 1, 16)
    slot = torch.tensor([3])
    calls["kv_fill"] = (random(2, 1, 64), None, None, cos, sin, slot, k_cache, v_cache, "none", 1e-6, False)
    calls["kv_fill with half tables"] = (*calls["kv_fill"][:3], cos[..., :8], sin[..., :8], *calls["kv_fill"][5:], True)
    counter, step = torch.tensor(3), (random(2, 1, 64), None, None, cos, sin)
    how = ("none", 1e-6, False, random(2, 6), 0.25, 0.0)
    calls["attend"] = (*step, slot, None, k_cache, v_cache, *how)
    calls["attend counting"] = (*step, None, counter, k_cache, v_cache, *how)
    lines = (random(2, 3, 64), None, None, random(1, 3, 16), random(1, 3, 16))
    masked = ("none", 1e-6, False, torch.ones(1, 1, 3, 6, dtype=torch.bool), 0.25, 0.0, True)
    pairs = (*step[:3], cos[..., :8], sin[..., :8])
    sunk = (False, False, random(2), True)
    calls["attend with half tables and sinks"] = (*pairs, slot, None, k_cache, v_cache, *how, *sunk)
    calls["kv_fill of several"] = (*lines, torch.tensor([3, 4, 5]), k_cache, v_cache, "none", 1e-6, False)
    calls["attend from several"] = (*lines, torch.tensor([3, 4, 5]), None, k_cache, v_cache, *masked)
    calls["attend from several counting"] = (*lines, None, counter, k_cache, v_cache, *masked)
    pairs = (*lines[:3], *(table[..., :8] for table in lines[3:]))
    calls["attend from several with half tables and sinks"] = (
        *(*pairs, None, counter, k_cache, v_cache),
        *(*masked, *sunk[1:]),
    )
    calls["decode_attention"] = (random(2, 2, 16), k_cache, v_cache, None, 0.25, 0.0)
    mask = random(2, 6)
    several = torch.ones(1, 1, 3, k_cache.shape[2], dtype=torch.bool)
    calls["attention"] = (random(2, 3, 2, 16), k_cache, v_cache, several, 0.25, 0.0, False)
    calls["attention capped"] = (random(2, 3, 2, 16), k_cache, v_cache, several, 0.25, 2.0, False)
    calls["attention with sinks"] = (random(2, 3, 2, 16), k_cache, v_cache, several, 0.25, 0.0, False, random(2))
    calls["decode_attention with sinks"] = (random(2, 2, 16), k_cache, v_cache, mask, 0.25, 0.0, random(2))
    calls["decode_attention masked"] = (random(2, 2, 16), k_cache, v_cache, mask, 0.25, 0.0)
    calls["exit_score"] = (random(2, 1, 64), random(2, 1, 64))
    calls["residual_score"] = (random(2, 1, 64), random(2, 1, 64), random(2, 1, 64))
    return calls
