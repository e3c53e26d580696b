"""The decode step of known models as kernel specs, and its launches and bytes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from river_compile.kernels.triton.cache import DecodeAttentionSpec, ExitScoreSpec, KvFillSpec
from river_compile.kernels.triton.linear import LinearSpec, untiled
from river_compile.kernels.triton.spec import DEFAULT_DEVICE, KernelSpec
from river_compile.kernels.triton.tiles import attention_splits, best_tile


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a decoder (from its published config); all of these use RMSNorm, SiLU and half-split rotation.

    Where there are `experts`, a token meets `chosen` of them in each block, and `intermediate` is the size of one.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: int = 0
    chosen: int = 0

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim


MODELS = {
    shape.name: shape
    for shape in (
        ModelShape("smollm2-135m", 30, 576, 9, 3, 64, 1536, 49152),
        ModelShape("llama-3.2-1b", 16, 2048, 32, 8, 64, 8192, 128256),
        ModelShape("qwen2.5-1.5b", 28, 1536, 12, 2, 128, 8960, 151936, qkv_bias=True),
        ModelShape("llama-3.2-3b", 28, 3072, 24, 8, 128, 8192, 128256),
        ModelShape("llama-3.1-8b", 32, 4096, 32, 8, 128, 14336, 128256),
        # One rank of eight: its heads and its part of each MLP and of the head.
        ModelShape("llama-3.1-70b/8", 80, 8192, 8, 1, 128, 3584, 16032),
        ModelShape("qwen3-30b-a3b", 48, 2048, 32, 4, 128, 768, 151936, qk_norm=True, experts=128, chosen=8),
    )
}


@dataclass(frozen=True)
class TokenCost:
    """What a token costs, or a part of one: kernel launches, and bytes read and written."""

    launches: int
    bytes: int

    def __add__(self, other: TokenCost) -> TokenCost:
        return TokenCost(self.launches + other.launches, self.bytes + other.bytes)

    def __rmul__(self, times: int) -> TokenCost:
        return TokenCost(times * self.launches, times * self.bytes)


def cost_of(*specs: KernelSpec, rows: int = 1) -> TokenCost:
    """Add up kernels, every buffer of every launch once; `rows` is for those that leave their number open."""
    return TokenCost(sum(len(spec.stages()) for spec in specs), sum(spec.cost(rows).bytes for spec in specs))


def token_cost(shape: ModelShape, kernels: dict[str, KernelSpec], rows: int = 1) -> tuple[TokenCost, TokenCost]:
    """Return the costs of one block, and of a token of so many sequences that runs all blocks so and then the head."""
    block = TokenCost(0, 0)
    for label, spec in kernels.items():
        if label not in ("exit score", "norm + head"):
            block += cost_of(spec, rows=rows if isinstance(spec, LinearSpec) else 1)
    return block, shape.layers * block + cost_of(kernels["norm + head"], rows=rows)


def model_kernels(
    shape: ModelShape,
    *,
    rows: int = 1,
    context: int = 1024,
    group_size: int = 64,
    device: str = DEFAULT_DEVICE,
) -> dict[str, KernelSpec]:
    """Return the kernels of a decode step: those of one river twin, the exit score, and the 16-bit head with the norm.

    The twin's come first, in launch order, as the fusion rules put them in. They are for `rows` sequences and `context`
    valid slots of the cache, with the tiles of `device`. What Inductor writes between the products of experts (the
    choice, activations, the weighted sum) is not among them.
    """

    def linear(k: int, n: int, each: int = 1, **fields: object) -> LinearSpec:
        fields = {"group_size": group_size, "parameter_dtype": "bfloat16", **fields}
        return best_tile(untiled(rows * each, k, n, **fields), device)

    heads = (rows, shape.heads, shape.kv_heads, shape.head_dim, context)
    splits = attention_splits(rows * shape.kv_heads, context, shape.head_dim, device)
    dense: dict[str, Any] = {"weights": "dense", "group_size": 0}
    if shape.experts:
        stack = {"each": shape.chosen, "experts": shape.experts}
        mlp = {
            "router": linear(shape.hidden, shape.experts, norm="rms", **dense),
            "experts' gate|up": linear(shape.hidden, 2 * shape.intermediate, **stack),
            "experts' down": linear(shape.intermediate, shape.hidden, **stack),
        }
    else:
        mlp = {
            "norm + gate|up": linear(shape.hidden, shape.intermediate, norm="rms", gated=True, activation="silu"),
            "down + residual": linear(shape.intermediate, shape.hidden, residual=True),
        }
    norm = "rms" if shape.qk_norm else "none"
    fill = KvFillSpec(*heads, rotary_dim=shape.head_dim, head_norm=norm)
    attention = DecodeAttentionSpec(
        *heads,
        shape.head_dim**-0.5,
        mask=True,
        splits=splits,
        fill=fill,
        advance=True,
    )
    return {
        "norm + q|k|v": linear(shape.hidden, shape.qkv, norm="rms", bias=shape.qkv_bias),
        "rope + kv write + attention": attention,
        "o + residual": linear(shape.heads * shape.head_dim, shape.hidden, residual=True),
        **mlp,
        "exit score": ExitScoreSpec(rows, shape.hidden),
        "norm + head": linear(shape.hidden, shape.vocabulary, norm="rms", **dense),
    }


def verifying_kernels(attention: DecodeAttentionSpec) -> dict[str, KernelSpec]:
    """Return what stands for a twin's attention where the number of positions is open: the write, and attention."""
    assert attention.fill is not None, "a decode step's attention fills its slot"
    fill = dataclasses.replace(attention.fill, positions=None, counts=True)
    return {"rope + kv write": fill, "attention": dataclasses.replace(attention, fill=None, positions=None)}


def backbone_kernels(
    shape: ModelShape, weights: str, *, rows: int = 1, device: str = DEFAULT_DEVICE
) -> dict[str, KernelSpec]:
    """Return the matmuls of a block of the backbone, and the head, with "dense" weights or those in 12 bits ("bf12").

    Not handled: models with experts, whose backbone has matmuls of Inductor's.
    """

    def linear(k: int, n: int, **fields: Any) -> LinearSpec:
        return best_tile(untiled(rows, k, n, weights=weights, group_size=0, **fields), device)

    hidden, intermediate = shape.hidden, shape.intermediate
    return {
        "norm + q|k|v": linear(hidden, shape.qkv, norm="rms", bias=shape.qkv_bias),
        "o + residual": linear(shape.heads * shape.head_dim, hidden, residual=True),
        "norm + gate|up": linear(hidden, intermediate, norm="rms", gated=True, activation="silu"),
        "down + residual": linear(intermediate, hidden, residual=True),
        "norm + head": linear(hidden, shape.vocabulary, norm="rms"),
    }
