"""Recognises what a few nodes compute together: norms, activations, rotary embeddings, attention.

Each function looks at one node of a segment's graph, walks towards its inputs and returns what it found, or None.

Not handled: norms without a weight, rotations whose tables hold each angle once, complex rotations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import fx

from river_compile.passes.nodes import is_parameter, is_tensor, shape, value_of

from .match import VIEWS, WHOLE, argument, before_cast, either_way, name_of, operands, part, plain, same_dtype

_TANH_GELU = (math.sqrt(2 / math.pi), 0.044715)


@dataclass(frozen=True)
class Normed:
    """A norm over the last dimension of `x`; `kind` as in the operators: "rms", "rms_plus_one" or "layer"."""

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    kind: str
    eps: float


def norm(node: object) -> Normed | None:
    """Recognises RMSNorm (Gemma's with 1 + weight too) and LayerNorm, called or written out.

    Their result has the input's dtype, and their parameters have it too.
    """
    node = plain(node)
    inner = before_cast(node)
    found = _called_norm(inner) or _written_rms(inner)
    if found is None or not _fits(found.x, node, found.weight, found.bias):
        return None
    return found


def _fits(x: fx.Node, result: fx.Node, weight: object, bias: object) -> bool:
    features = (value_of(x).shape[-1],)
    parameters = [p for p in (weight, bias) if p is not None]
    return same_dtype(x, result) and all(
        isinstance(p, fx.Node) and is_parameter(p) and shape(p) == features and same_dtype(p, x) for p in parameters
    )


def _called_norm(node: object) -> Normed | None:
    name = name_of(node)
    if name not in ("layer_norm", "rms_norm"):
        return None
    weight = argument(node, 2, "weight")
    bias, eps = (argument(node, 3, "bias"), argument(node, 4, "eps", 1e-5)) if name == "layer_norm" else (None, None)
    eps = argument(node, 3, "eps") if name == "rms_norm" else eps
    x, features = before_cast(node.args[0]), argument(node, 1, "normalized_shape")
    if weight is None or eps is None or len(features) != 1:
        return None
    return Normed(x, weight, bias, "layer" if name == "layer_norm" else "rms", eps)


def _written_rms(node: object) -> Normed | None:
    for scaled, weight in either_way(node, "mul"):
        for x, rstd in either_way(before_cast(scaled), "mul"):
            eps = _reciprocal_root(rstd, before_cast(x))
            if eps is None:
                continue
            weight = before_cast(weight)
            plus_one = next((w for one, w in either_way(weight, "add") if one in (1, 1.0)), None)
            kind = "rms" if plus_one is None else "rms_plus_one"
            return Normed(before_cast(x), weight if plus_one is None else before_cast(plus_one), None, kind, eps)
    return None


def _reciprocal_root(node: object, x: object) -> float | None:
    """Returns eps where a node is ``rsqrt(mean(x ** 2, -1, keepdim=True) + eps)``."""
    if name_of(node) != "rsqrt":
        return None
    for mean, eps in either_way(node.args[0], "add"):
        if name_of(mean) == "mean" and isinstance(eps, float) and argument(mean, 2, "keepdim") is True:
            square = mean.args[0]
            squared = square.args[0] if name_of(square) == "square" else (operands(square, "pow") or (None,))[0]
            power = 2 if name_of(square) == "square" else (operands(square, "pow") or (0, 0))[1]
            dim = argument(mean, 1, "dim")
            if power == 2 and dim in (-1, (-1,), [-1]) and before_cast(squared) is x:
                return eps
    return None


def activation(node: object) -> tuple[fx.Node, str] | None:
    """Returns the input and the operators' name of SiLU, GELU (exact or tanh, called or written out) or ReLU."""
    node = plain(node)
    name = name_of(node)
    if name in ("silu", "relu"):
        return plain(node.args[0]), name
    if name == "gelu":
        approximate = argument(node, 1, "approximate", "none")
        return plain(node.args[0]), {"none": "gelu", "tanh": "gelu_tanh"}[approximate]
    for half, one_plus in either_way(node, "mul"):
        x = next((x for n, x in either_way(half, "mul") if n == 0.5), None)
        inner = next((t for n, t in either_way(one_plus, "add") if n == 1.0), None)
        if x is not None and name_of(inner) == "tanh" and _is_gelu_argument(inner.args[0], x):
            return plain(x), "gelu_tanh"
    return None


def _is_gelu_argument(node: object, x: object) -> bool:
    """True for ``sqrt(2 / pi) * (x + 0.044715 * x ** 3)``."""
    scale, cubic = _TANH_GELU
    for factor, total in either_way(node, "mul"):
        if not isinstance(factor, float) or not math.isclose(factor, scale, rel_tol=1e-6):
            continue
        for first, second in either_way(total, "add"):
            cube = next((c for n, c in either_way(second, "mul") if n == cubic), None)
            if first is x and operands(cube, "pow") == (x, 3.0):
                return True
    return False


@dataclass(frozen=True)
class Rotation:
    """A rotary embedding (Su et al. 2021) of the first `features` of each head of `x`; tables ``[B or 1, 1, 1, R]``."""

    x: fx.Node
    cos: fx.Node
    sin: fx.Node
    features: int
    interleaved: bool


def rotation(node: object) -> Rotation | None:
    """Recognises ``x * cos + turned(x) * sin``, of whole heads or of their first features."""
    node = before_cast(plain(node))
    if name_of(node) == "cat" and argument(node, 1, "dim") == -1 and len(node.args[0]) == 2:
        turned, rest = _whole_rotation(before_cast(plain(node.args[0][0]))), part(node.args[0][1])
        if turned is None or rest is None or rest.start != turned.features:
            return None
        first = part(before_cast(turned.x))
        source = turned.x if first is None else first.source
        if plain(rest.source) is not plain(source) or (first is not None and (first.start, first.step) != (0, 1)):
            return None
        return Rotation(source, turned.cos, turned.sin, turned.features, turned.interleaved)
    return _whole_rotation(node)


def _whole_rotation(node: object) -> Rotation | None:
    for straight, crossed in either_way(node, "add"):
        for x, cos in either_way(straight, "mul"):
            for turned, sin in either_way(crossed, "mul"):
                interleaved = _is_turned(before_cast(plain(turned)), before_cast(plain(x)))
                if interleaved is not None and _is_table(cos, x) and _is_table(sin, x):
                    return Rotation(plain(x), cos, sin, value_of(x).shape[-1], interleaved)
    return None


def _is_table(node: object, x: object) -> bool:
    if not isinstance(node, fx.Node) or not is_tensor(node) or value_of(node).dim() != 4:
        return False
    rows, *middle, features = shape(node)
    return rows in (1, shape(x)[0]) and middle == [1, 1] and features == shape(x)[-1]


def _is_turned(node: object, x: object) -> bool | None:
    """Tells how pairs lie where a node holds them turned by 90 degrees: False half-split, True interleaved."""
    half = shape(x)[-1] // 2 if isinstance(x, fx.Node) and is_tensor(x) else 0
    if name_of(node) == "cat" and argument(node, 1, "dim") == -1 and len(node.args[0]) == 2:
        expected, interleaved = ((half, 1), (0, 1)), False
        pair = node.args[0]
    elif name_of(node) in VIEWS and name_of(node.args[0]) == "stack" and argument(node.args[0], 1, "dim") == -1:
        expected, interleaved = ((1, 2), (0, 2)), True
        pair = node.args[0].args[0]
    else:
        return None
    if name_of(pair[0]) != "neg":
        return None
    found = [part(pair[0].args[0]), part(pair[1])]
    fits = all(
        p is not None and before_cast(plain(p.source)) is x and p.dim == value_of(x).dim() - 1 and p.length == half
        for p in found
    )
    return interleaved if fits and tuple((p.start, p.step) for p in found) == expected else None


@dataclass(frozen=True)
class Attention:
    """``softmax(softcap(scale q k^T) + mask) v`` with grouped queries; `softcap` 0 for none."""

    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    scale: float
    softcap: float


def attention(node: object) -> Attention | None:
    """Recognises `one_query.grouped_attention`, and attention written out as products around a softmax."""
    if name_of(node) == "grouped_attention":
        q, k, v, mask, scale = node.args
        return Attention(q, k, v, mask, value_of(q).shape[-1] ** -0.5 if scale is None else scale, 0.0)
    found = operands(node, "matmul")
    weights = before_cast(plain(found[0])) if found else None
    if name_of(weights) != "softmax" or argument(weights, 1, "dim") != -1:
        return None
    scores, mask = weights.args[0], None
    if name_of(scores) == "add":
        scores, mask = operands(scores, "add") or (None, None)
    if isinstance(mask, fx.Node) and not value_of(mask).is_floating_point():
        return None
    scores, softcap = _capped(scores)
    raw, scale = next(((a, b) for a, b in either_way(scores, "mul") if isinstance(b, float)), (scores, 1.0))
    product = operands(raw, "matmul")
    if product is None or name_of(product[1]) != "transpose" or set(product[1].args[1:]) not in ({2, 3}, {-1, -2}):
        return None
    return Attention(product[0], before_repeat(product[1].args[0]), before_repeat(found[1]), mask, scale, softcap)


def _capped(node: object) -> tuple[object, float]:
    """Returns x and c of ``c tanh(x / c)``, the node itself and 0 where it is none."""
    for turned, cap in either_way(node, "mul"):
        if name_of(turned) == "tanh" and isinstance(cap, float):
            inner = operands(turned.args[0], "truediv", "div")
            if inner and inner[1] == cap:
                return inner[0], cap
    return node, 0.0


def before_repeat(node: fx.Node) -> fx.Node:
    """Returns ``[B, H_kv, S, D]`` behind its repetition ``[B, H, S, D]``, the node itself where it is not repeated."""
    if name_of(node) != "reshape" or name_of(node.args[0]) != "expand":
        return node
    insert = node.args[0].args[0]
    if name_of(insert) != "getitem" or insert.args[1] != (WHOLE, WHOLE, None, WHOLE, WHOLE):
        return node
    return insert.args[0]
