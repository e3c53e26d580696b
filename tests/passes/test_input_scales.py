"""Where the division of a linear layer's input by a scale can be folded."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from river_compile.passes.normalize import normalized
from river_compile.passes.twins import find_input_scale, scale_inputs
from tests.passes.graphs import GraphBuilder

FEATURES = 8


class Scene:
    """A value `x` ``[2, 3, 8]``, parameters, and linear layers that read functions of it."""

    def __init__(self) -> None:
        self.b = GraphBuilder(0)
        self.x, self.y = (self.b.placeholder(name, self.b.randn(2, 3, FEATURES)) for name in "xy")
        self.gain, self.shift = self.b.parameter("gain", FEATURES), self.b.parameter("shift", FEATURES)
        self.weight = self.b.parameter("weight", 4, FEATURES)

    def layers(self, value: fx.Node, count: int = 2, others: tuple = ()) -> tuple[fx.Graph, list[fx.Node]]:
        """Returns the normal form with layers that read a value, and the layers."""
        layers = [self.b.call(F.linear, value, self.weight) for _ in range(count)]
        self.graph_module = normalized(self.b.finish([*layers, *others]))
        graph = self.graph_module.graph
        return graph, list(graph.output_node().args[0][:count])


def rms(s: Scene) -> fx.Node:
    mean = s.b.call("mean", s.b.call("pow", s.x, 2), -1, keepdim=True)
    return s.b.call(operator.mul, s.gain, s.b.call(operator.mul, s.x, s.b.call(torch.rsqrt, mean)))


@pytest.mark.parametrize(
    ("make", "folds"),
    [
        (lambda s: s.b.call(F.layer_norm, s.x, (FEATURES,), s.gain, s.shift), ["gain", "shift"]),
        (lambda s: s.b.call(F.layer_norm, s.x, (FEATURES,), bias=s.shift, weight=s.gain), ["gain", "shift"]),
        (lambda s: s.b.call(F.rms_norm, s.x, (FEATURES,), s.gain, 1e-6), ["gain"]),
        (rms, ["gain"]),
        (lambda s: s.b.call("view", rms(s), 6, FEATURES), ["gain"]),
        (lambda s: s.b.call("type_as", rms(s), s.y), ["gain"]),
        (lambda s: s.b.call("mul", s.x, s.y), []),
    ],
)
def test_a_scale_is_folded_into_the_norm_or_a_multiplication(make, folds):
    """Dividing the inputs and multiplying the weights by the scale changes nothing."""
    scene = Scene()
    graph, layers = scene.layers(make(scene))
    found = find_input_scale(layers[0].args[0], layers, FEATURES)
    assert [n.name for n in found.parameters] == folds

    expected = scene.graph_module(*scene.b.values)
    scale = torch.rand(FEATURES) + 0.5
    new = []
    for i in range(max(1, len(folds))):
        with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
            new.append(graph.placeholder(f"scaled_{i}"))
    x = scale_inputs(layers[0].args[0], found, tuple(new))
    for layer in layers:
        layer.replace_input_with(layer.args[0], x)
    scene.graph_module.recompile()
    named = dict(zip((n.name for n in graph.find_nodes(op="placeholder")), scene.b.values, strict=False))
    values = {**named, "weight": named["weight"] * scale}
    scaled = [named[name] / scale for name in folds] or [1 / scale]
    for ours, theirs in zip(scene.graph_module(*values.values(), *scaled), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "make",
    [
        lambda s: s.b.call(operator.add, s.x, s.y),
        lambda s: s.b.call(F.layer_norm, s.x, (FEATURES,)),
        lambda s: s.b.call(F.layer_norm, s.x, (FEATURES,), s.b.call("neg", s.gain), s.shift),
        lambda s: s.b.call("view", s.b.call("mul", s.b.placeholder("z", s.b.randn(2, 3, 4, 2)), 2.0), 2, 3, FEATURES),
    ],
)
def test_other_inputs_stay_as_they_are(make):
    scene = Scene()
    _, layers = scene.layers(make(scene))
    assert find_input_scale(layers[0].args[0], layers, FEATURES) is None


def test_a_value_that_others_read_too_stays_as_it_is():
    scene = Scene()
    normed = rms(scene)
    _, layers = scene.layers(normed, others=(scene.b.call("neg", normed),))
    assert find_input_scale(layers[0].args[0], layers, FEATURES) is None
    scene = Scene()
    normed = rms(scene)
    _, layers = scene.layers(scene.b.call("view", normed, 6, FEATURES), others=(normed,))
    assert find_input_scale(layers[0].args[0], layers, FEATURES) is None
