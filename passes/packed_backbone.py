"""Gives blocks and the head weights that are packed without loss: 12 bits for each of bfloat16.

It comes after the rules of fusion: a ``river::linear`` with weights in 16 bits reads the packed form in place of the
parameters, which then are no inputs of the segment any more. The C++ kernels compute the same to the bit; the generated
ones add in another order.

Not handled: weights of other dtypes, and what is no ``river::linear``; they stay as they are.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from river_compile.kernels import ops  # noqa: F401  (registers river::linear)
from river_compile.kernels.quant import bf12
from river_compile.passes.backbone import parts_of
from river_compile.passes.edits import add_placeholders, drop_unused
from river_compile.passes.nodes import input_name, is_parameter, value_of
from river_compile.passes.program import RiverProgram, Segment, TwinLinear


def packed_backbone(program: RiverProgram) -> RiverProgram:
    """Blocks and the head read their weights in 12 bits, without loss."""
    blocks = tuple(_packed(block, program) for block in program.blocks)
    return replace(program, blocks=blocks, head=_packed(program.head, program))


def _packed(segment: Segment, program: RiverProgram) -> Segment:
    made = segment.copy()
    origins = made.origins
    number_of = {placeholder: program.slots[value] for placeholder, value in origins.items()}
    packed: list[TwinLinear] = []
    read: dict[fx.Node, None] = {}  # parameters, in order
    for node in list(made.graph.find_nodes(op="call_function", target=torch.ops.river.linear.default)):
        x, weight, scale_zero, bias, out_features, _, layout = node.args
        weights, biases = parts_of(weight), parts_of(bias)
        if scale_zero is not None or not all(map(_fits, weights)) or not all(map(is_parameter, biases)):
            continue
        if layout != "dense" and node.kwargs.get("gated") and out_features // 2 % bf12.FOUR:
            continue  # (the up projection would begin within a unit)
        layout = bf12.LAYOUT if layout == "dense" else bf12.GENERATED
        linear = TwinLinear(
            name="|".join(input_name(origins[part]).removesuffix(".weight") for part in weights),
            weights=tuple(number_of[part] for part in weights),
            biases=tuple(number_of[part] for part in biases) or (None,) * len(weights),
            in_features=value_of(weights[0]).shape[1],
            out_features=tuple(value_of(part).shape[0] for part in weights),
            transposed=False,
            group_size=0,
            layout=layout,
        )
        names = ["units", "side", *(["bias"] if biases else [])]
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


def _fits(parameter: fx.Node) -> bool:
    return is_parameter(parameter) and value_of(parameter).dtype == torch.bfloat16
