"""What a token of a known model costs at an exit depth, from shapes alone: launches, bytes, the time of the bytes, and
what the kernels' cost model says (`cost_model.estimate`), which knows instructions too.

Twins, exit check and head are counted as the generated kernels' own reports count them (every buffer of every launch
once). A backbone block counts its 16-bit weights and its KV cache. Its launches are at least its seven products and its
attention, because only Inductor on the GPU at hand knows how many more there are.
"""

from __future__ import annotations

from river_compile.kernels.triton.cache import DecodeAttentionSpec
from river_compile.kernels.triton.linear import untiled
from river_compile.kernels.triton.tiles import best_tile
from tools.kernels.cost_model import LAUNCH_SECONDS
from tools.kernels.devices import known
from tools.kernels.shapes import (
    MODELS,
    ModelShape,
    TokenCost,
    backbone_kernels,
    cost_of,
    estimate_of,
    model_kernels,
    verifying_kernels,
)

BLOCK_LAUNCHES = 8  # q, k, v, attention, o, gate, up, down
_DTYPE_BYTES = 2

#: Decoded tokens per second on an H100, batch 1, 1K context: by model and exit depth (None: never).
TARGETS = {
    ("llama-3.1-8b", None): 150.0,
    ("llama-3.1-8b", 3): 300.0,
    ("llama-3.1-8b", 0): 330.0,
    ("llama-3.2-1b", 0): 1200.0,
}
CHECK_TARGET = 0.02  # share of a token that all its exit checks may take
SPEEDUP_TARGET = 2.16  # of depth 3 over Inductor's 16-bit model on the same card


class Roofline:
    """The costs of one model.

    Args:
        model: a key of ``tools.kernels.shapes.MODELS``.
        context: valid slots of the KV cache.
        group_size: of the 4-bit weights.
        device: whose tiles the kernels get, see ``river_compile.kernels.triton.linear``.
    """

    def __init__(self, model: str, context: int, group_size: int, device: str = "sm_90") -> None:
        self.shape = MODELS[model]
        kernels = model_kernels(self.shape, context=context, group_size=group_size, device=device)
        self.check = cost_of(kernels.pop("exit score"))
        self._device = known(device)
        head = kernels.pop("norm + head")
        self._head, self._head_seconds = cost_of(head), estimate_of(head, self._device).total
        self._twin = cost_of(*kernels.values())
        self._twin_seconds = sum(estimate_of(spec, self._device).total for spec in kernels.values())
        attention = kernels["rope + kv write + attention"]
        assert isinstance(attention, DecodeAttentionSpec), "a twin's launches have one for its attention"
        self._attention, cache = attention, cost_of(attention)
        self._group_size = group_size
        self._block = TokenCost(BLOCK_LAUNCHES, _DTYPE_BYTES * block_weights(self.shape) + cache.bytes)

    def token(self, depth: int | None) -> TokenCost:
        """Return the cost of a token that leaves after `depth` blocks (None: all) without a check on the way."""
        blocks = self.shape.layers if depth is None else depth
        return blocks * self._block + (self.shape.layers - blocks) * self._twin + self._head

    def seconds(self, depth: int | None) -> float:
        """Return how long the cost model takes that token for; backbone blocks are bytes and launches."""
        blocks = self.shape.layers if depth is None else depth
        block = self._block.seconds(self._device.bandwidth) + self._block.launches * LAUNCH_SECONDS
        return blocks * block + (self.shape.layers - blocks) * self._twin_seconds + self._head_seconds

    def verification(self, positions: int, weights: str) -> float:
        """Return the modelled seconds of a pass of the backbone over `positions` new tokens of one sequence.

        Its matmuls are the generated kernels, with "dense" or 12-bit weights ("bf12"). With the latter, one token is
        verified as two: their kernel of one row sums in another order, and a row's bits are to be the same.
        """
        rows = positions if weights == "dense" else max(2, positions)
        kernels = backbone_kernels(self.shape, weights, rows=rows, device=self._device.name)
        head = estimate_of(kernels.pop("norm + head"), self._device, rows=rows).total
        kernels |= verifying_kernels(self._attention)
        return self.shape.layers * sum(estimate_of(k, self._device, rows=rows).total for k in kernels.values()) + head

    def draft(self, head: str) -> float:
        """Return the modelled seconds of a drafted token: all twins, a head in 16 bits ("dense") or 4 ("w4")."""
        packed = untiled(1, self.shape.hidden, self.shape.vocabulary, norm="rms", group_size=self._group_size)
        small = estimate_of(best_tile(packed, self._device.name), self._device).total
        return self.shape.layers * self._twin_seconds + (small if head == "w4" else self._head_seconds)


def block_weights(shape: ModelShape) -> int:
    """Return the number of weights that a token reads of one backbone block."""
    products = shape.hidden * shape.qkv + shape.heads * shape.head_dim * shape.hidden
    products += 3 * shape.hidden * shape.intermediate * max(1, shape.chosen) + shape.hidden * shape.experts
    return products + 2 * shape.hidden + (shape.qkv if shape.qkv_bias else 0)


def depth_name(depth: int | None) -> str:
    """Return an exit depth for people."""
    return "never" if depth is None else f"depth {depth}"
