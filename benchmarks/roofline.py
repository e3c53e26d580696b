"""What a token of a known model costs at an exit depth, from shapes alone: launches, bytes, the time of the bytes, and
what the kernels' cost model says (`heuristic.seconds`), which knows instructions too.

Twins, exit check and head are counted as the generated kernels' own reports count them (every buffer of every launch
once). A backbone block counts its 16-bit weights and its KV cache; its launches are at least its seven products and its
attention, because only Inductor on the GPU at hand knows how many more there are.
"""

from __future__ import annotations

from river_compile.kernels.triton import heuristic
from river_compile.kernels.triton.devices import Device, known
from river_compile.kernels.triton.linear import LinearSpec
from river_compile.kernels.triton.spec import KernelSpec
from tools.kernels.shapes import MODELS, ModelShape, TokenCost, cost_of, model_kernels

BLOCK_LAUNCHES = 8  # q, k, v, attention, o, gate, up, down
LAUNCH_SECONDS = 2e-6  # of a kernel that the cost model does not know, on top of its bytes
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
        device: whose tiles the kernels get, see ``river_compile.kernels.triton.heuristic``.
    """

    def __init__(self, model: str, context: int, group_size: int, device: str = "sm_90") -> None:
        self.shape = MODELS[model]
        kernels = model_kernels(self.shape, context=context, group_size=group_size, device=device)
        self.check = cost_of(kernels.pop("exit score"))
        self._device = known(device)
        head = kernels.pop("norm + head")
        self._head, self._head_seconds = cost_of(head), modelled(head, self._device)
        self._twin = cost_of(*kernels.values())
        self._twin_seconds = sum(modelled(spec, self._device) for spec in kernels.values())
        cache = cost_of(kernels["rope + kv write + attention"])
        self._block = TokenCost(BLOCK_LAUNCHES, _DTYPE_BYTES * block_weights(self.shape) + cache.bytes)

    def token(self, depth: int | None) -> TokenCost:
        """Returns the cost of a token that leaves after `depth` blocks (None: all) without a check on the way."""
        blocks = self.shape.layers if depth is None else depth
        return blocks * self._block + (self.shape.layers - blocks) * self._twin + self._head

    def seconds(self, depth: int | None) -> float:
        """Returns how long the cost model takes that token for; backbone blocks are bytes and launches."""
        blocks = self.shape.layers if depth is None else depth
        block = self._block.seconds(self._device.bandwidth) + self._block.launches * LAUNCH_SECONDS
        return blocks * block + (self.shape.layers - blocks) * self._twin_seconds + self._head_seconds


def modelled(spec: KernelSpec, device: Device) -> float:
    """Returns the estimated seconds of a kernel: by the cost model if it is a product, else by bytes and launches."""
    if isinstance(spec, LinearSpec):
        return heuristic.seconds(spec, device)
    cost = cost_of(spec)
    return cost.seconds(device.bandwidth) + cost.launches * LAUNCH_SECONDS


def block_weights(shape: ModelShape) -> int:
    """Returns the number of weights that a token reads of one backbone block."""
    products = shape.hidden * shape.qkv + shape.heads * shape.head_dim * shape.hidden
    products += 3 * shape.hidden * shape.intermediate * max(1, shape.chosen) + shape.hidden * shape.experts
    return products + 2 * shape.hidden + (shape.qkv if shape.qkv_bias else 0)


def depth_name(depth: int | None) -> str:
    """Returns an exit depth for people."""
    return "never" if depth is None else f"depth {depth}"
