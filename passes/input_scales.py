"""Folds AWQ's division of a twin's linear inputs by a scale into the norm before them, if it can.

what feeds these linears alone                        what becomes of it
a norm whose last step is a product with its weight   the twin's copies of its parameters are divided by the scale
another product (an MLP's gate, Gemma's norm)         it is multiplied by the inverse, in the same kernel

Not handled: anything else (attention, the residual stream, activations without a gate); it stays as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, fx

from river_compile.passes.edits import call
from river_compile.passes.nodes import called, is_parameter, is_reshape, is_tensor, shape, value_of


@dataclass(frozen=True)
class InputScale:
    """What makes the inputs, and the norm's parameters that take the scale up; none if the inputs are multiplied."""

    node: fx.Node
    parameters: tuple[fx.Node, ...]


def find_input_scale(x: fx.Node, readers: Collection[fx.Node], features: int) -> InputScale | None:
    """Returns how the inputs `x` ``[..., features]`` of some linears can be scaled, None if they cannot."""
    if set(x.users) != set(readers):
        return None
    node = x
    while is_reshape(node) or called(node, Tensor.to, Tensor.contiguous):
        node = node.args[0]
        if len(node.users) != 1 or shape(node)[-1] != features:
            return None
    if called(node, F.layer_norm, F.rms_norm):
        parameters = tuple(n for n in node.args[2:4] if isinstance(n, fx.Node))
        foldable = parameters and all(_is_norm_parameter(n, features) for n in parameters)
        return InputScale(node, parameters) if foldable else None
    if called(node, operator.mul) and is_tensor(node):
        return InputScale(node, tuple(n for n in node.args if _is_norm_parameter(n, features))[:1])
    return None


def scale_inputs(x: fx.Node, scale: InputScale, placeholders: Sequence[fx.Node]) -> fx.Node:
    """Puts new placeholders in place of a norm's parameters, or multiplies the inputs by one; returns the inputs."""
    if not scale.parameters:
        with x.graph.inserting_after(x):
            return call(operator.mul, (x, placeholders[0]), value_of(x), x)
    for placeholder, parameter in zip(placeholders, scale.parameters, strict=True):
        placeholder.meta = parameter.meta.copy()
    replacement = dict(zip(scale.parameters, placeholders, strict=True))
    scale.node.args = fx.map_arg(scale.node.args, lambda n: replacement.get(n, n))
    return x


def _is_norm_parameter(node: object, features: int) -> bool:
    return is_parameter(node) and shape(node) == (features,)
