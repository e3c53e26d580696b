"""Where the division of a linear layer's input by a scale cannot be folded; test_quantizers.py has where it can."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from river_compile.passes.normalize import normalized
from river_compile.passes.twins import find_input_scale
from tests.passes.graphs import GraphBuilder

FEATURES = 8


class Scene:
    """A value `x` ``[2, 3, 8]``, parameters, and linear layers that read functions of it."""

    def __init__(self) -> None:
        self.b = GraphBuilder(0)
        self.x, self.y = (self.b.placeholder(name, self.b.randn(2, 3, FEATURES)) for name in "xy")
        self.gain, self.shift = self.b.parameter("gain", FEATURES), self.b.parameter("shift", FEATURES)
        self.weight = self.b.parameter("weight", 4, FEATURES)

    def layers(self, value: fx.Node, others: tuple = ()) -> list[fx.Node]:
        """Returns two layers that read a value, in the normal form."""
        layers = [self.b.call(F.linear, value, self.weight) for _ in range(2)]
        return list(normalized(self.b.finish([*layers, *others])).graph.output_node().args[0][:2])


def rms(s: Scene) -> fx.Node:
    mean = s.b.call("mean", s.b.call("pow", s.x, 2), -1, keepdim=True)
    return s.b.call(operator.mul, s.gain, s.b.call(operator.mul, s.x, s.b.call(torch.rsqrt, mean)))


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
    layers = scene.layers(make(scene))
    assert find_input_scale(layers[0].args[0], layers, FEATURES) is None


def test_a_value_that_others_read_too_stays_as_it_is():
    scene = Scene()
    normed = rms(scene)
    layers = scene.layers(normed, others=(scene.b.call("neg", normed),))
    assert find_input_scale(layers[0].args[0], layers, FEATURES) is None
    scene = Scene()
    normed = rms(scene)
    layers = scene.layers(scene.b.call("view", normed, 6, FEATURES), others=(normed,))
    assert find_input_scale(layers[0].args[0], layers, FEATURES) is None
