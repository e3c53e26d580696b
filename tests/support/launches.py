"""Generated kernels that are described and not launched, on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from river_compile.kernels.triton import calls_linear, loader, operators  # noqa: F401  (registers kernels)
from river_compile.kernels.triton.tiles import best_tile
from tools.kernels.shapes import ModelShape

_GROUP = 64
_SLOTS = 64  # of a cache: the host does not care how many


class _NoLauncher:
    """Stands where Triton's compiled function does."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: None


@contextmanager
def no_launches() -> Iterator[None]:
    """Inside, generated kernels are found and given their arguments as on a GPU, and nothing is launched."""
    load, tile = loader.load, calls_linear.interpreter_tile

    def load_without(spec: Any, *, interpret: bool) -> loader.Kernel:
        kernel = load(spec, interpret=False)
        return loader.Kernel(spec, kernel.stages, dict.fromkeys(kernel.functions, _NoLauncher()), interpret)

    loader.load, calls_linear.interpreter_tile = load_without, best_tile
    loader.forget_launches()
    try:
        yield
    finally:
        loader.load, calls_linear.interpreter_tile = load, tile
        loader.forget_launches()


def calls(shape: ModelShape) -> dict[str, Callable[[], object]]:
    """Return a call of each operator of one twin and the exit score, at batch 1."""
    river, bf16, d = torch.ops.river, torch.bfloat16, shape.head_dim

    def random(*size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=bf16)

    def product(n: int, k: int, *rest: object) -> Callable[[], object]:
        qweight = torch.zeros(n, k // 8, dtype=torch.int32)
        pairs, x = torch.zeros(n, k // _GROUP, 2, dtype=bf16), random(1, 1, k)
        return lambda: river.linear(x, qweight, pairs, None, n, _GROUP, "triton", *rest)

    norm = ("rms", random(shape.hidden), None, 1e-6)
    residual = random(1, 1, shape.hidden)
    k_cache, v_cache = (random(1, shape.kv_heads, _SLOTS, d) for _ in "kv")
    cos, counter = random(1, 1, d), torch.tensor(3)
    qkv, mask = random(1, 1, shape.qkv), torch.ones(1, _SLOTS, dtype=torch.bool)
    how = ("none", 1e-6, False, mask, d**-0.5, 0.0)
    none = ("none", None, None, 1e-6)
    return {
        "norm + q|k|v": product(shape.qkv, shape.hidden, None, *norm),
        "rope + kv write + attention": lambda: river.attend(
            qkv, None, None, cos, cos, None, counter, k_cache, v_cache, *how
        ),
        "o + residual": product(shape.hidden, shape.heads * d, residual, *none),
        "norm + gate|up": product(2 * shape.intermediate, shape.hidden, None, *norm, "silu", True),
        "down + residual": product(shape.hidden, shape.intermediate, residual, *none),
        "exit score": lambda: river.residual_score(residual, residual, residual),
    }
