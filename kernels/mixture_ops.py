"""The operators ``torch.ops.river.*`` of a mixture of experts: what each computes, in plain torch, on any device.

Importing this module registers them. The C++ kernels are separate operators (`torch.ops.river_native`).
Not handled: routers other than a softmax (groups of experts, biases of the choice).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from river_compile.kernels.checks import check_choice
from river_compile.kernels.ops import experts
from river_compile.kernels.portable import ACTIVATIONS, route_like

ROUTINGS = ("all", "all_normalised", "chosen")
CLAMPED_SWISH = "clamped_swish"  # gpt-oss's gate
LIMIT, SLOPE = 7.0, 1.702  # of it


@torch.library.custom_op("river::route", mutates_args=())
def route(logits: Tensor, each: int, routing: str, floats: bool) -> tuple[Tensor, Tensor]:
    """Choose the experts of each row.

    Args:
        logits: ``[M, E]``; the largest are chosen, in descending order, NaN above all.
        each: experts of a row.
        routing: of which softmax the weights are: that of "all" logits, the same divided by the sum of the chosen
            ("all_normalised"), or that of the "chosen" logits.
        floats: whether weights are float32, else in logits.dtype.

    Returns:
        weights ``[M, each]`` and numbers of experts, int64 ``[M, each]``.

    Raises:
        ValueError: an unknown routing.
    """
    check_choice("routing", routing, ROUTINGS)
    largest, index = logits.float().topk(each, dim=-1)
    weight = largest.softmax(-1) if routing != "all" else logits.float().softmax(-1).gather(-1, index)
    return weight if floats else weight.to(logits.dtype), index


@route.register_fake
def _(logits: Tensor, each: int, _routing: str, floats: bool) -> tuple[Tensor, Tensor]:
    return route_like(logits, each, floats)


@torch.library.custom_op("river::mixture", mutates_args=())
def mixture(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    up: Tensor,
    up_side: Tensor | None,
    up_bias: Tensor | None,
    up_group: int,
    down: Tensor,
    down_side: Tensor | None,
    down_bias: Tensor | None,
    down_group: int,
    features: int,
    activation: str,
    pairs: bool,
    layouts: str,
    residual: Tensor | None = None,
) -> Tensor:
    """Return the weighted sum of each row's experts, ``down(activation(gate) * up)``, and a residual.

    Args:
        x: ``[M, K]``.
        index, weight: numbers of experts int64 ``[M, J]`` and their weights, in x.dtype or float32. A number outside of
            0 to E - 1 adds nothing.
        up, up_side, up_group: stacked gates and up projections, as `experts` takes them, 2 F rows each.
        up_bias: ``[E, 2 F]`` in x.dtype or None.
        down, down_side, down_group: stacked down projections, K rows each; down_bias: ``[E, K]`` or None.
        features: F, a multiple of 16.
        activation: of the gate: "silu", "gelu", "gelu_tanh", "relu", or "clamped_swish", which also clamps the up
            projection and adds one to it (gpt-oss).
        pairs: whether rows of gate and up projection alternate, else all gates come first.
        layouts: of both stacks, separated by a blank.
        residual: ``[M, K]`` in x.dtype or None.

    Returns:
        ``[M, K]`` in x.dtype. Products and the weighted sum are accumulated in float32; the gated activations and each
        expert's result are rounded to x.dtype.

    Raises:
        ValueError: as `experts`; an unknown activation.
    """
    check_choice("activation", activation, (*ACTIVATIONS, CLAMPED_SWISH))
    (rows, each), chosen = index.shape, index.reshape(-1)
    up_layout, down_layout = layouts.split()
    found = chosen.clamp(0, len(up) - 1)
    there = ((chosen >= 0) & (chosen < len(up)))[:, None]
    both = experts(x.repeat_interleave(each, 0), up, up_side, chosen, 2 * features, up_group, up_layout).float()
    if up_bias is not None:
        both = both + up_bias[found].float()
    gate, straight = (both[:, 0::2], both[:, 1::2]) if pairs else both.chunk(2, -1)
    hidden = _gated(gate, straight, activation).to(x.dtype)
    made = experts(hidden, down, down_side, chosen, x.shape[1], down_group, down_layout).float()
    if down_bias is not None:
        made = (made + down_bias[found].float()).to(x.dtype).float()
    made = torch.where(there, made, 0.0).view(rows, each, -1)
    total = (made * weight.float()[..., None]).sum(1)
    return (total if residual is None else total + residual.float()).to(x.dtype)


def _gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if activation != CLAMPED_SWISH:
        return ACTIVATIONS[activation](gate) * up
    gate = gate.clamp(max=LIMIT)
    return gate * torch.sigmoid(SLOPE * gate) * (1 + up.clamp(-LIMIT, LIMIT))


@mixture.register_fake
def _(x: Tensor, *_others: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
