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

import torch
from torch import fx

from .nodes import is_parameter, is_tensor, value_of

_NORMS = (torch.nn.functional.layer_norm, torch.nn.functional.rms_norm)
_SAME_VALUES = (torch.Tensor.view, torch.reshape, torch.Tensor.contiguous, torch.Tensor.to)


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
    while node.target in _SAME_VALUES:
        node = node.args[0]
        if len(node.users) != 1 or value_of(node).shape[-1] != features:
            return None
    if node.target in _NORMS:
        parameters = tuple(p for p in node.args[2:4] if isinstance(p, fx.Node) and is_tensor(p))
        foldable = parameters and all(_is_norm_parameter(p, features) for p in parameters)
        return InputScale(node, parameters) if foldable else None
    if node.target is operator.mul:
        factors = [n for n in node.args if isinstance(n, fx.Node) and _is_norm_parameter(n, features)]
        return InputScale(node, tuple(factors[:1])) if is_tensor(node) else None
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


def _is_norm_parameter(node: fx.Node, features: int) -> bool:
    return is_parameter(node) and value_of(node).dim() == 1 and value_of(node).shape[0] == features
