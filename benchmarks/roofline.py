"""What a token of a known model costs at an exit depth, from shapes alone: launches, bytes, the time of the bytes.

Twins, exit check and head are counted as the generated kernels' own reports count them (every buffer of every launch
once). A backbone block counts its 16-bit weights and its KV cache; its launches are at least its seven products and its
attention, because only Inductor on the GPU at hand knows how many more there are.
"""

from __future__ import annotations

from river_compile.kernels.tools.shapes import MODELS, ModelShape, TokenCost, cost_of, model_kernels

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
        model: a key of ``river_compile.kernels.tools.shapes.MODELS``.
        context: valid slots of the KV cache.
        group_size: of the 4-bit weights.
        device: whose tiles the kernels get, see ``river_compile.kernels.triton.heuristic``.
    """

    def __init__(self, model: str, context: int, group_size: int, device: str = "sm_90") -> None:
        self.shape = MODELS[model]
        kernels = model_kernels(self.shape, context=context, group_size=group_size, device=device)
        self.check = cost_of(kernels.pop("exit score"))
        self._head = cost_of(kernels.pop("norm + head"))
        self._twin = cost_of(*kernels.values())
        cache = cost_of(kernels["attention"], kernels["rope + kv write"])
        self._block = TokenCost(BLOCK_LAUNCHES, _DTYPE_BYTES * block_weights(self.shape) + cache.bytes)

    def token(self, depth: int | None) -> TokenCost:
        """Returns the cost of a token that leaves after `depth` blocks (None: all) without a check on the way."""
        blocks = self.shape.layers if depth is None else depth
        return blocks * self._block + (self.shape.layers - blocks) * self._twin + self._head


def block_weights(shape: ModelShape) -> int:
    """Returns the number of weights that a token reads of one backbone block."""
    products = shape.hidden * shape.qkv + shape.heads * shape.head_dim * shape.hidden
    products += 3 * shape.hidden * shape.intermediate * max(1, shape.chosen) + shape.hidden * shape.experts
    return products + 2 * shape.hidden + (shape.qkv if shape.qkv_bias else 0)


def depth_name(depth: int | None) -> str:
    """Returns an exit depth for people."""
    return "never" if depth is None else f"depth {depth}"
