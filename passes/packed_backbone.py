"""Gives blocks and the head weights that are packed without loss: 12 bits for each of bfloat16, or 8.

The 8-bit ones are torchao's weight-only tensors, and floats that 8 bits represent exactly (`kernels.quant.lossless`).

It comes after the rules of fusion: a ``river::linear`` with weights in 16 bits reads the packed form in place of the
parameters, which then are no inputs of the segment any more. The C++ kernels compute the same to the bit; the generated
ones add in another order.

Not handled: other weights, and what is no ``river::linear``; they stay as they are.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from river_compile.kernels import ops  # noqa: F401  (registers river::linear)
from river_compile.kernels.quant import lossless
from river_compile.passes.backbone import parts_of
from river_compile.passes.edits import add_placeholders, drop_unused
from river_compile.passes.nodes import input_name, is_parameter, value_of
from river_compile.passes.pipeline import Pass
from river_compile.passes.program import Matmul, RiverProgram, Segment


def packed_backbone(weights: str) -> Pass:
    """Makes the pass below; `weights` are read in "12bit", "8bit" or as the "model" has them, torchao's in 8."""

    def packed_backbone(program: RiverProgram) -> RiverProgram:
        """Blocks and the head read their weights packed without loss."""
        blocks = tuple(_packed(block, program, weights) for block in program.blocks)
        return replace(program, blocks=blocks, head=_packed(program.head, program, weights))

    return packed_backbone


def _packed(segment: Segment, program: RiverProgram, how: str) -> Segment:
    made = segment.copy()
    origins = made.origins
    number_of = {placeholder: program.slots[value] for placeholder, value in origins.items()}
    packed: list[Matmul] = []
    read: dict[fx.Node, None] = {}  # parameters, in order
    for node in list(made.graph.find_nodes(op="call_function", target=torch.ops.river.linear.default)):
        x, weight, scale_zero, bias, out_features, _, layout = node.args
        weights, biases = parts_of(weight), parts_of(bias)
        if scale_zero is not None or not all(map(is_parameter, [*weights, *biases])):
            continue
        layout = _layout(layout, [value_of(part) for part in weights], how)
        if layout is None:
            continue
        if layout == lossless.LAYOUT_12BIT_TRITON and node.kwargs.get("gated") and out_features // 2 % lossless.FOUR:
            continue  # (the up projection would begin within a unit)
        linear = Matmul(
            name="|".join(input_name(origins[part]).removesuffix(".weight") for part in weights),
            weights=tuple(number_of[part] for part in weights),
            biases=tuple(number_of[part] for part in biases) or (None,) * len(weights),
            in_features=value_of(weights[0]).shape[1],
            out_features=tuple(value_of(part).shape[0] for part in weights),
            transposed=False,
            group_size=0,
            layout=layout,
        )
        names = ["weight", "scale_zero", *(["bias"] if biases else [])]
        new = add_placeholders(made.graph, [f"packed_{len(packed)}_{name}" for name in names])
        if biases:
            new[2].meta["example_value"] = value_of(biases[0]).new_empty(out_features)
        node.args = (x, new[0], new[1], new[2] if biases else None, out_features, 0, layout)
        for joined in (weight, bias):
            if joined is not None and joined.op != "placeholder":
                drop_unused(joined)
        packed.append(linear)
        read |= dict.fromkeys([*weights, *biases])
    for node in read:  # (others that nobody reads may be sizes, which Inductor looks for)
        if not node.users:
            made.graph.erase_node(node)
    inputs = tuple(origins[node] for node in made.graph.find_nodes(op="placeholder") if node in origins)
    return replace(made, inputs=inputs, packed=(*made.packed, *packed))


def _layout(kernels: str, weights: list[torch.Tensor], how: str) -> str | None:
    """Returns the layout in which matrices of a matmul are packed, None if they are not; `kernels` is its layout."""
    if all(lossless.torchao_parts(weight) is not None for weight in weights):
        return lossless.LAYOUT_8BIT
    dtypes = {weight.dtype for weight in weights}
    if how == "12bit" and dtypes == {torch.bfloat16}:
        return lossless.LAYOUT_12BIT if kernels == "dense" else lossless.LAYOUT_12BIT_TRITON
    return lossless.LAYOUT_8BIT if how == "8bit" and len(dtypes) == 1 else None
