"""Recognizes norms, activations, rotary embeddings and attention by the nodes that compute them.

Not handled: norms without a weight, complex rotations, and interleaved ones whose tables hold each angle once.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.node import Argument

from river_compile.kernels.portable import grouped_attention
from river_compile.passes.fusion.match import WHOLE, Part, part
from river_compile.passes.nodes import (
    called,
    either_way,
    inference_sdpa,
    is_parameter,
    is_reshape,
    is_tensor,
    operands,
    other_operand,
    same_dtype,
    shape,
    skip_casts,
    skip_noops,
    value_of,
)


@dataclass(frozen=True)
class Normed:
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    kind: str  # "rms", "rms_plus_one" or "layer"
    eps: float


def norm(node: Argument) -> Normed | None:
    """Recognize RMSNorm (with 1 + weight too) and LayerNorm, called or written out, of one dtype."""
    node = skip_noops(node)
    found = _called_norm(skip_casts(node)) or _written_rms(skip_casts(node))
    if found is None or not same_dtype(found.x, node):
        return None
    parameters = [found.weight] if found.bias is None else [found.weight, found.bias]
    fit = (is_parameter(p) and shape(p) == shape(found.x)[-1:] and same_dtype(p, node) for p in parameters)
    return found if all(fit) else None


def _called_norm(node: Argument) -> Normed | None:
    if not called(node, F.layer_norm, F.rms_norm):
        return None
    x, features, weight, *biases, eps = node.args
    if weight is None or eps is None or len(features) != 1:
        return None
    bias, kind = (biases[0], "layer") if biases else (None, "rms")
    return Normed(skip_casts(x), weight, bias, kind, eps)


def _written_rms(node: Argument) -> Normed | None:
    for scaled, weight in either_way(node, operator.mul):
        for x, rstd in either_way(skip_casts(scaled), operator.mul):
            x, weight = skip_casts(x), skip_casts(weight)
            eps = _reciprocal_root(rstd, x)
            if eps is not None:
                plus_one = other_operand(weight, operator.add, 1)
                kind = "rms" if plus_one is None else "rms_plus_one"
                return Normed(x, weight if plus_one is None else skip_casts(plus_one), None, kind, eps)
    return None


def _reciprocal_root(node: Argument, x: Argument) -> float | None:
    """Return eps of ``rsqrt(mean(x ** 2, -1, keepdim=True) + eps)``."""
    if not called(node, torch.rsqrt):
        return None
    for mean, eps in either_way(node.args[0], operator.add):
        if called(mean, torch.mean) and isinstance(eps, float):
            square, dim, keepdim = mean.args
            squared, power = operands(square, operator.pow) or (None, None)
            if power == 2 and dim in (-1, (-1,), [-1]) and keepdim and skip_casts(squared) is x:
                return eps
    return None


def activation(node: Argument) -> tuple[fx.Node, str] | None:
    """Return input and kernel name of SiLU, ReLU or GELU (exact or tanh, called or written out)."""
    node = skip_noops(node)
    if called(node, F.silu, F.relu):
        return skip_noops(node.args[0]), node.target.__name__
    if called(node, F.gelu):
        return skip_noops(node.args[0]), {"none": "gelu", "tanh": "gelu_tanh"}[node.kwargs["approximate"]]
    for half, one_plus in either_way(node, operator.mul):
        x, tanh = other_operand(half, operator.mul, 0.5), other_operand(one_plus, operator.add, 1.0)
        if x is not None and called(tanh, torch.tanh) and _is_gelu_argument(tanh.args[0], x):
            return skip_noops(x), "gelu_tanh"
    return None


def _is_gelu_argument(node: Argument, x: Argument) -> bool:
    """Whether a node is ``sqrt(2 / pi) * (x + 0.044715 * x ** 3)``."""
    for factor, total in either_way(node, operator.mul):
        if isinstance(factor, float) and math.isclose(factor, math.sqrt(2 / math.pi), rel_tol=1e-6):
            cubes = [other_operand(b, operator.mul, 0.044715) for a, b in either_way(total, operator.add) if a is x]
            return any(operands(cube, operator.pow) == (x, 3.0) for cube in cubes)
    return False


@dataclass(frozen=True)
class Rotation:
    """A rotary embedding (Su et al. 2021) of the first `features` of each head; tables ``[B or 1, 1, T, R]``.

    With `half_tables` they are ``[..., R / 2]``, with one angle for each pair.
    """

    x: fx.Node
    cos: fx.Node
    sin: fx.Node
    features: int
    interleaved: bool
    half_tables: bool = False


def rotation(node: Argument) -> Rotation | None:
    """Recognize ``x * cos + rotate_half(x) * sin``, or by halves, of whole heads or their first features."""
    node = skip_casts(skip_noops(node))
    whole, joined = _whole_rotation(node), _pair(node, torch.cat)
    if whole is not None or joined is None:
        return whole
    rotated, rest = _whole_rotation(skip_casts(skip_noops(joined[0]))), part(joined[1])
    if rotated is None or rest is None or rest.start != rotated.features:
        return None
    first = part(skip_casts(rotated.x))
    if first is not None and (first.start, first.step) != (0, 1):
        return None
    source = rotated.x if first is None else first.source
    return replace(rotated, x=source) if skip_noops(rest.source) is skip_noops(source) else None


def _pair(node: Argument, function: Callable) -> tuple[fx.Node, fx.Node] | None:
    return tuple(node.args[0]) if called(node, function) and node.args[1] == -1 and len(node.args[0]) == 2 else None


def _whole_rotation(node: Argument) -> Rotation | None:
    if called(node, torch.cat):
        return _rotation_of_halves(node)
    for straight, crossed in either_way(node, operator.add):
        for x, cos in either_way(straight, operator.mul):
            for rotated, sin in either_way(crossed, operator.mul):
                interleaved = _rotates_half(skip_casts(skip_noops(rotated)), skip_casts(skip_noops(x)))
                if interleaved is not None and _is_table(cos, x) and _is_table(sin, x):
                    return Rotation(skip_noops(x), cos, sin, value_of(x).shape[-1], interleaved)
    return None


def _rotation_of_halves(node: Argument) -> Rotation | None:
    """Recognize ``cat((a cos - b sin, b cos + a sin), -1)`` of x's halves a and b (gpt-oss)."""
    first, second = (skip_casts(skip_noops(n)) for n in _pair(node, torch.cat) or (None, None))
    cosines, sines = operands(first, operator.sub) or (None, None)
    for a, cos in either_way(cosines, operator.mul):
        for b, sin in either_way(sines, operator.mul):
            low, high = part(a), part(b)
            if low is None or not (_is_table(cos, a) and _is_table(sin, a)):
                continue
            source, last, features = low.source, value_of(low.source).dim() - 1, 2 * low.length
            halves = [Part(source, last, start, low.length) for start in (0, low.length)]
            if [low, high] != halves or shape(source)[-1] != features:
                continue
            for straight, crossed in either_way(second, operator.add):
                if _is_product(straight, b, cos) and _is_product(crossed, a, sin):
                    return Rotation(skip_noops(source), cos, sin, features, False, half_tables=True)
    return None


def _is_product(node: Argument, x: Argument, y: Argument) -> bool:
    return any(found == (x, y) for found in either_way(node, operator.mul))


def _is_table(node: Argument, x: fx.Node) -> bool:
    if not is_tensor(node):
        return False
    batch, *places, features = shape(x)
    positions = [(1, places[1]), (places[0], 1)] if len(places) == 2 else []
    return shape(node) in [(rows, *place, features) for rows in (1, batch) for place in positions]


def _rotates_half(node: Argument, x: Argument) -> bool | None:
    """Return whether pairs are interleaved if a node is x with each pair rotated by 90 degrees, else None."""
    if not is_tensor(x):
        return None
    *others, features = shape(x)
    if not isinstance(features, int):
        return None
    dim, half = len(others), features // 2
    joined, interleaved = _pair(node, torch.cat), False
    if joined is None and is_reshape(node):
        joined, interleaved = _pair(node.args[0], torch.stack), True
    if joined is None or not called(joined[0], operator.neg):
        return None
    expected = [Part(x, dim, 1, half, 2), Part(x, dim, 0, half, 2)]
    if not interleaved:
        expected = [Part(x, dim, half, half), Part(x, dim, 0, half)]
    found = [part(joined[0].args[0]), part(joined[1])]
    return (
        interleaved if [p and replace(p, source=skip_casts(skip_noops(p.source))) for p in found] == expected else None
    )


@dataclass(frozen=True)
class Attention:
    """``softmax(softcap(scale q k^T) + mask) v`` with grouped queries; a sink is one more score, of a value 0."""

    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    scale: float
    softcap: float  # 0: none
    causal: bool = False  # position t reads slots 0 to t
    sinks: fx.Node | None = None  # [H]


def attention(node: Argument) -> Attention | None:
    """Recognize `portable.grouped_attention`, torch's, and attention written out as matmuls and softmax."""
    found = inference_sdpa(node)
    if found is not None:
        k, v = skip_repeat(found.k), skip_repeat(found.v)
        if found.causal:  # reads no other slots
            k, v = (_before_first_slots(cache, shape(found.q)[2]) for cache in (k, v))
        return _scaled(found.q, k, v, found.mask, found.scale, found.causal)
    if called(node, grouped_attention):
        return _scaled(*node.args)
    weights, values = operands(node, operator.matmul) or (None, None)
    weights = skip_casts(skip_noops(weights))
    found_scores, sinks = _weighed_with_sinks(weights) or (_weighed(weights), None)
    scores, mask = operands(found_scores, operator.add) or (found_scores, None)
    if mask is not None and not (is_tensor(mask) and value_of(mask).is_floating_point()):
        return None
    scores, softcap = _capped(scores)
    raw, scale = next(((a, b) for a, b in either_way(scores, operator.mul) if isinstance(b, float)), (scores, 1.0))
    q, keys = operands(raw, operator.matmul) or (None, None)
    if not called(keys, torch.transpose) or set(keys.args[1:]) not in ({2, 3}, {-1, -2}):
        return None
    return Attention(q, skip_repeat(keys.args[0]), skip_repeat(values), mask, scale, softcap, sinks=sinks)


def _weighed(weights: Argument) -> Argument:
    """Return the scores that a softmax over slots turns into weights, None for other nodes."""
    return weights.args[0] if called(weights, torch.softmax) and weights.args[1] == -1 else None


def _weighed_with_sinks(weights: Argument) -> tuple[Argument, fx.Node] | None:
    """Return scores and sinks of ``softmax(cat((scores, sinks), -1))[..., :-1]``, whose largest may be subtracted."""
    taken, index = operands(weights, operator.getitem) or (None, None)
    if index != (Ellipsis, slice(None, -1, None)):
        return None
    together = _weighed(skip_casts(taken))
    shifted, largest = operands(together, operator.sub) or (together, None)
    if largest is not None and not _is_largest(largest, shifted):
        return None
    scores, sinks = _pair(skip_casts(shifted), torch.cat) or (None, None)
    spread = skip_casts(sinks)
    before = spread.args[0] if called(spread, Tensor.expand) else None
    sinks = skip_casts(before.args[0]) if is_reshape(before) else None
    heads = shape(scores)[1:2] if sinks is not None else ()
    fit = is_parameter(sinks, dims=1) and shape(sinks) == heads and shape(before) == (1, *heads, 1, 1)
    return (scores, sinks) if fit else None


def _is_largest(node: Argument, x: Argument) -> bool:
    """Whether a node is ``x.max(-1, keepdim=True).values``."""
    found, place = operands(node, operator.getitem) or (None, None)
    if place != 0 or not called(found, torch.max, Tensor.max):
        return False
    given = {**dict(zip(("input", "dim", "keepdim"), found.args, strict=False)), **found.kwargs}
    return given == {"input": x, "dim": -1, "keepdim": True}


def _scaled(
    q: fx.Node, k: fx.Node, v: fx.Node, mask: fx.Node | None, scale: float | None, causal: bool = False
) -> Attention:
    return Attention(q, k, v, mask, value_of(q).shape[-1] ** -0.5 if scale is None else scale, 0.0, causal)


def _capped(node: Argument) -> tuple[Argument, float]:
    """Return x and c of ``c tanh(x / c)``, else the node and 0."""
    for tanh, cap in either_way(node, operator.mul):
        if called(tanh, torch.tanh) and isinstance(cap, float):
            x, divisor = operands(tanh.args[0], operator.truediv) or (None, None)
            if divisor == cap:
                return x, cap
    return node, 0.0


def _before_first_slots(node: fx.Node, slots: int | str) -> fx.Node:
    """Return the cache of ``cache[:, :, :slots]``, else the node."""
    cache, index = operands(node, operator.getitem) or (node, None)
    if not isinstance(index, tuple) or len(index) != 4 or not isinstance(index[2], slice) or shape(node)[2] != slots:
        return node
    from_start = index[2].start in (None, 0) and index[2].step in (None, 1)
    return cache if from_start and all(i == WHOLE for i in (*index[:2], index[3])) else node


def skip_repeat(node: fx.Node) -> fx.Node:
    """Return ``[B, H_kv, S, D]`` before its repetition to ``[B, H, S, D]``, else the node."""
    if not called(node, torch.reshape) or not called(node.args[0], Tensor.expand):
        return node
    cache, index = operands(node.args[0].args[0], operator.getitem) or (node, None)
    return cache if index == (WHOLE, WHOLE, None, WHOLE, WHOLE) else node
