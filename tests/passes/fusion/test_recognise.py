"""Norms, activations, rotations and attention in every spelling; test_rules.py tests the rules on whole decoders."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from river_compile.passes.fusion.match import Part, part
from river_compile.passes.fusion.recognise import activation, attention, norm, rotation, skip_repeat
from river_compile.passes.normalize import normalized
from tests.passes.decoders import turned_by_halves, weights_with_sinks
from tests.passes.graphs import GraphBuilder

WIDTH = 8
EVERY = slice(None)


class Scene:
    """A value `x` ``[2, 3, 8]`` with norm parameters, and heads `q` ``[2, 4, 1, 8]`` with tables of angles."""

    def __init__(self) -> None:
        self.b = GraphBuilder(0)
        self.x = self.b.placeholder("x", self.b.randn(2, 3, WIDTH))
        self.gain, self.shift = self.b.parameter("gain", WIDTH), self.b.parameter("shift", WIDTH)
        self.q = self.b.placeholder("q", self.b.randn(2, 4, 1, WIDTH))
        self.keys, self.values = (self.b.placeholder(n, self.b.randn(2, 2, 5, WIDTH)) for n in ("keys", "values"))
        self.mask = self.b.placeholder("mask", self.b.randn(2, 1, 1, 5))
        self.tables = {n: [self.b.placeholder(f"{t}_{n}", self.b.randn(2, 1, 1, n)) for t in "cs"] for n in (4, 8)}

    def normal(self, node: fx.Node) -> fx.Node:
        return normalized(self.b.finish([node])).graph.output_node().args[0][0]


def rms(s: Scene, weight: fx.Node | None = None, power: float = 2, dim: object = -1, squared: str = "pow") -> fx.Node:
    square = s.b.call("pow", s.x, power) if squared == "pow" else s.b.call(squared, s.x)
    mean = s.b.call("mean", square, dim, keepdim=True)
    y = s.b.call("mul", s.x, s.b.call(torch.rsqrt, s.b.call(operator.add, mean, 1e-6)))
    return s.b.call(operator.mul, s.gain if weight is None else weight, y)


def cast_rms(s: Scene) -> fx.Node:
    """Computes the norm in a wider dtype."""
    x = s.x
    s.x = s.b.call("to", x, torch.float64)
    y = rms(s, s.b.call("to", s.gain, torch.float64))
    s.x = x
    return s.b.call("to", y, dtype=torch.float32)


@pytest.mark.parametrize(
    ("make", "kind", "eps"),
    [
        (rms, "rms", 1e-6),
        (lambda s: rms(s, dim=(-1,), squared="square"), "rms", 1e-6),
        (lambda s: rms(s, s.b.call(operator.add, 1.0, s.gain)), "rms_plus_one", 1e-6),
        (cast_rms, "rms", 1e-6),
        (lambda s: s.b.call(F.rms_norm, s.x, (WIDTH,), eps=1e-6, weight=s.gain), "rms", 1e-6),
        (lambda s: s.b.call(F.layer_norm, s.x, (WIDTH,), s.gain, s.shift), "layer", 1e-5),
        (lambda s: s.b.call(F.dropout, rms(s), 0.1, training=False), "rms", 1e-6),
    ],
)
def test_norms(make, kind, eps):
    scene = Scene()
    found = norm(scene.normal(make(scene)))
    assert (found.x.name, found.weight.name, found.kind, found.eps) == ("x", "gain", kind, eps)
    assert (found.bias.name if found.bias else None) == ("shift" if kind == "layer" else None)


@pytest.mark.parametrize(
    "make",
    [
        lambda s: rms(s, power=3),
        lambda s: rms(s, dim=1),
        lambda s: rms(s, s.b.call("neg", s.gain)),
        lambda s: s.b.call(F.layer_norm, s.x, (WIDTH,)),
        lambda s: s.b.call(F.layer_norm, s.x, (3, WIDTH), s.b.parameter("both", 3, WIDTH)),
        lambda s: s.b.call("to", rms(s), torch.float64),
    ],
)
def test_no_norm_that_the_kernels_know(make):
    scene = Scene()
    assert norm(scene.normal(make(scene))) is None


def written_gelu(s: Scene, scale: float = 0.7978845608) -> fx.Node:
    cubic = s.b.call(operator.add, s.x, s.b.call(operator.mul, 0.044715, s.b.call(torch.pow, s.x, 3.0)))
    turned = s.b.call("tanh", s.b.call(operator.mul, scale, cubic))
    return s.b.call(operator.mul, s.b.call(operator.mul, 0.5, s.x), s.b.call(operator.add, 1.0, turned))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda s: s.b.call(F.silu, s.x), "silu"),
        (lambda s: s.b.call("relu", s.x), "relu"),
        (lambda s: s.b.call(F.gelu, s.x), "gelu"),
        (lambda s: s.b.call(F.gelu, s.x, approximate="tanh"), "gelu_tanh"),
        (written_gelu, "gelu_tanh"),
        (lambda s: written_gelu(s, scale=0.8), None),
        (lambda s: s.b.call("tanh", s.x), None),
    ],
)
def test_activations(make, name):
    scene = Scene()
    found = activation(scene.normal(make(scene)))
    assert (found and (found[0].name, found[1])) == (("x", name) if name else None)


def turn(s: Scene, x: fx.Node, features: int, interleaved: bool = False, sign: int = 0) -> fx.Node:
    """Returns ``x * cos + rotate_half(x) * sin``; `sign` tells which half is negated."""
    ranges = [slice(0, features // 2), slice(features // 2, None)]
    if interleaved:
        ranges = [slice(0, None, 2), slice(1, None, 2)]
    first, second = (s.b.call(operator.getitem, x, (Ellipsis, r)) for r in ranges)
    pair = [second, first]
    pair[sign] = s.b.call(operator.neg, pair[sign])
    turned = s.b.call(torch.stack if interleaved else torch.cat, tuple(pair), dim=-1)
    turned = s.b.call("flatten", turned, -2) if interleaved else turned
    cos, sin = s.tables[features]
    return s.b.call(operator.add, s.b.call("mul", x, cos), s.b.call(operator.mul, sin, turned))


@pytest.mark.parametrize(
    "make",
    [
        lambda s: turn(s, s.q, 8, sign=1),
        lambda s: turn(s, s.q, 8, interleaved=True, sign=1),
        lambda s: turned_by_halves(s.b, s.q, *s.tables[4], order=(1, 0)),
        lambda s: s.b.call(operator.add, s.b.call("mul", s.q, 2.0), s.b.call("mul", s.q, 3.0)),
    ],
)
def test_turns_the_other_way_are_no_rotation(make):
    scene = Scene()
    assert rotation(scene.normal(make(scene))) is None


@pytest.mark.parametrize("features", [8, 4])
def test_a_rotation_by_halves_has_half_tables(features):
    """Of whole heads, and of their first features."""
    s = Scene()
    cos, sin = (s.b.placeholder(name, s.b.randn(2, 1, 1, features // 2)) for name in ("cos", "sin"))
    ranges = (slice(None, features), slice(features, None))
    first, rest = (s.b.call(operator.getitem, s.q, (Ellipsis, r)) for r in ranges)
    y = turned_by_halves(s.b, s.q if features == WIDTH else first, cos, sin)
    found = rotation(s.normal(y if features == WIDTH else s.b.call(torch.cat, (y, rest), dim=-1)))
    assert (found.x.name, found.cos.name, found.sin.name) == ("q", "cos", "sin")
    assert (found.features, found.interleaved, found.half_tables) == (features, False, True)


def with_sinks(s: Scene, sinks: fx.Node, **how: object) -> fx.Node:
    """Returns attention of `q` over `keys` and `values`, repeated for its four heads; `how`: of the weights."""

    def repeated(x: fx.Node) -> fx.Node:
        x = s.b.call(operator.getitem, x, (EVERY, EVERY, None, EVERY, EVERY))
        return s.b.call("reshape", s.b.call("expand", x, 2, 2, 2, 5, WIDTH), 2, 4, 5, WIDTH)

    scores = s.b.call(operator.mul, s.b.call(torch.matmul, s.q, s.b.call("transpose", repeated(s.keys), 2, 3)), 0.5)
    scores = s.b.call(operator.add, scores, s.mask)
    dropped = s.b.call(F.dropout, weights_with_sinks(s.b, scores, sinks, **how), 0.0, False)
    return s.b.call(torch.matmul, dropped, repeated(s.values))


@pytest.mark.parametrize("shifted", [True, False])
def test_attention_with_sinks(shifted):
    s = Scene()
    found = attention(s.normal(with_sinks(s, s.b.parameter("sinks", 4), shifted=shifted)))
    names = [n.name for n in (found.q, found.k, found.v, found.mask, found.sinks)]
    assert names == ["q", "keys", "values", "mask", "sinks"]
    assert (found.scale, found.softcap, found.causal) == (0.5, 0.0, False)


@pytest.mark.parametrize(
    "make",
    [
        lambda s: with_sinks(s, s.b.call("mul", s.b.parameter("sinks", 4), 2.0)),
        lambda s: with_sinks(s, s.b.placeholder("sinks", s.b.randn(4))),
        lambda s: with_sinks(s, s.b.parameter("sinks", 4), taken=slice(1, None)),
    ],
)
def test_sinks_that_the_kernels_do_not_know(make):
    """Sinks that are computed, or no parameter, or kept in place of the first slot."""
    s = Scene()
    assert attention(s.normal(make(s))) is None


def test_a_repetition_along_another_dimension_stays():
    scene = Scene()
    x = scene.b.call(operator.getitem, scene.keys, (EVERY, None, EVERY, EVERY, EVERY))
    node = scene.normal(scene.b.call("reshape", scene.b.call("expand", x, 2, 2, 2, 5, WIDTH), 2, 4, 5, WIDTH))
    assert skip_repeat(node) is node


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda s: s.b.call(operator.getitem, s.x, (Ellipsis, slice(2, 6, 2))), (2, 2, 2, 2)),
        (lambda s: s.b.call(operator.getitem, s.x, (EVERY, [-1])), (1, 2, 1, 1)),
        (lambda s: s.b.call(operator.getitem, s.b.call("split", s.x, [3, 5], dim=-1), 1), (2, 3, 5, 1)),
        (lambda s: s.b.call(operator.getitem, s.b.call("chunk", s.x, 2, -1), 1), (2, 4, 4, 1)),
        (lambda s: s.b.call(operator.getitem, s.x, (slice(1, 2), EVERY, slice(0, 4))), None),
        (lambda s: s.b.call(operator.getitem, s.x, 0), None),
    ],
)
def test_parts(make, expected):
    scene = Scene()
    found = part(scene.normal(make(scene)))
    if expected is None:
        assert found is None
    else:
        assert isinstance(found, Part)
        assert (found.dim, found.start, found.length, found.step) == expected
