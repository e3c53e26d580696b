"""Where a twin's linears may have their inputs divided by a scale, and how the division is made free.

A quantizer such as AWQ multiplies the columns of a matrix by a scale ``[K]`` and asks that the inputs be divided by it.

    a norm whose last step is a product with its weight (RMS norm), or a layer norm, that feeds these linears alone:
        the twin takes copies of the norm's parameters that are divided by the scale
    another product that feeds these linears alone (the gate of an MLP, Gemma's norm): the inputs are multiplied by the
        inverse, in the kernel that makes that product
    anything else (attention, the residual stream): the inputs stay as they are

Not handled: activations between two linears without a gate.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, fx

from .nodes import called, is_parameter, is_reshape, is_tensor, shape


@dataclass(frozen=True)
class InputScale:
    """How inputs can be scaled.

    Attributes:
        node: what makes them: the norm, or the product.
        parameters: the norm's parameters, to be divided by the scale; none where the inputs are multiplied.
    """

    node: fx.Node
    parameters: tuple[fx.Node, ...]


def find_input_scale(x: fx.Node, readers: Collection[fx.Node], features: int) -> InputScale | None:
    """Returns how the inputs of some linears can be scaled, None where they cannot.

    Args:
        x: the inputs.
        readers: the linears that read them.
        features: K.
    """
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


def scale_inputs(graph: fx.Graph, x: fx.Node, scale: InputScale, placeholders: tuple[fx.Node, ...]) -> fx.Node:
    """Puts new placeholders in place of a norm's parameters, or multiplies the inputs by one; returns the inputs."""
    if not scale.parameters:
        with graph.inserting_after(x):
            scaled = graph.call_function(operator.mul, (x, placeholders[0]))
        scaled.meta = x.meta.copy()
        return scaled
    for placeholder, parameter in zip(placeholders, scale.parameters, strict=True):
        placeholder.meta = parameter.meta.copy()
    replacement = dict(zip(scale.parameters, placeholders, strict=True))
    scale.node.args = fx.map_arg(scale.node.args, lambda n: replacement.get(n, n))
    return x


def _is_norm_parameter(node: object, features: int) -> bool:
    return isinstance(node, fx.Node) and is_parameter(node) and shape(node) == (features,)
