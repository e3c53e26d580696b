"""What a token of a known model costs at an exit depth, from shapes alone: launches, bytes, the time of the bytes.

Twins, exit check and head are counted as the generated kernels' own reports count them (every buffer of every launch
once). A backbone block counts its 16-bit weights and its KV cache; its launches are at least its seven products and its
attention, because only Inductor on the GPU at hand knows how many more there are.
"""

from __future__ import annotations

from dataclasses import dataclass

from river_compile.kernels.tools.shapes import MODELS, ModelShape, model_kernels

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


@dataclass(frozen=True)
class TokenCost:
    """What one token costs.

    Attributes:
        depth: backbone blocks executed, None for all of them and no twin.
        launches: kernels, at least.
        bytes: read and written.
    """

    depth: int | None
    launches: int
    bytes: int

    def seconds(self, bandwidth: float) -> float:
        """Returns the time that the bytes take at `bandwidth` bytes per second."""
        return self.bytes / bandwidth


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
        costs = {name: (len(spec.stages()), spec.cost().bytes) for name, spec in kernels.items()}
        self.check = costs.pop("exit score")
        self._head = costs.pop("norm + head")
        self._twin = tuple(map(sum, zip(*costs.values(), strict=True)))
        cache = costs["attention"][1] + costs["rope + kv write"][1]
        self._block = (BLOCK_LAUNCHES, _DTYPE_BYTES * block_weights(self.shape) + cache)

    def token(self, depth: int | None) -> TokenCost:
        """Returns the cost of a token that leaves after `depth` blocks without a check on the way."""
        blocks = self.shape.layers if depth is None else depth
        twins = self.shape.layers - blocks
        launches, size = (
            blocks * block + twins * twin + head
            for block, twin, head in zip(self._block, self._twin, self._head, strict=True)
        )
        return TokenCost(depth, launches, size)


def block_weights(shape: ModelShape) -> int:
    """Returns the number of weights of one backbone block."""
    products = shape.hidden * shape.qkv + shape.heads * shape.head_dim * shape.hidden
    products += 3 * shape.hidden * shape.intermediate
    return products + 2 * shape.hidden + (shape.qkv if shape.qkv_bias else 0)


def depth_name(depth: int | None) -> str:
    """Returns an exit depth for people."""
    return "never" if depth is None else f"depth {depth}"
