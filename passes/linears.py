"""Linear layers that share an input, and the one ``river::linear`` that takes their place.

Not handled: which of them go together, and with which operands; twins and the backbone say so.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import fx

from river_compile.kernels import ops  # noqa: F401  (registers river::linear)
from river_compile.passes.edits import call
from river_compile.passes.experts import as_expert_product
from river_compile.passes.nodes import Linear, as_linear, input_name, is_parameter, value_of
from river_compile.passes.program import Refusal, RiverProgram


def sharing_input(graph: fx.Graph, alike: Callable[[Linear], Hashable | None]) -> list[list[Linear]]:
    """Groups the linear layers that read one value and for which `alike` is the same; None leaves one out."""
    groups: dict[tuple[fx.Node, Hashable], list[Linear]] = {}
    for linear in filter(None, map(as_linear, graph.nodes)):
        key = alike(linear)
        if key is not None:
            groups.setdefault((linear.x, key), []).append(linear)
    return [*groups.values()]


def input_of(linears: Sequence[Linear]) -> fx.Node:
    """Returns what linear layers that share an input read by now: one that was replaced is another node since."""
    current = as_linear(linears[0].node)
    assert current is not None, "it was one when it was listed"
    return current.x


def replace_linears(linears: Sequence[Linear], x: fx.Node, *operands: object) -> None:
    """Puts one matmul in the place of linear layers that share an input, and splits its result.

    Args:
        linears: in the order of the merged rows.
        x: what it reads: what :func:`input_of` returns, or that in another form.
        operands: of ``river::linear`` after x: weight, scale_zero, bias, group_size, layout.
    """
    first, sizes = linears[0].node, [linear.out_features for linear in linears]
    weight, scale_zero, bias, group_size, layout = operands
    with first.graph.inserting_before(first):
        value = value_of(first).new_empty((*value_of(first).shape[:-1], sum(sizes)))
        arguments = (x, weight, scale_zero, bias, sum(sizes), group_size, layout)
        merged = call(torch.ops.river.linear.default, arguments, value, first)
        results = [merged]
        if len(linears) > 1:
            values = tuple(value_of(linear.node) for linear in linears)
            parts = call(torch.split, (merged, sizes, -1), values, first)
            results = [call(operator.getitem, (parts, i), value, first) for i, value in enumerate(values)]
    for linear, result in zip(linears, results, strict=True):
        linear.node.replace_all_uses_with(result)
        first.graph.erase_node(linear.node)


def matrix_names(program: RiverProgram) -> set[str]:
    """Returns the names of all linear layers and stacks of experts in blocks and head."""
    nodes = [node for segment in (*program.blocks, program.head) for node in segment.graph.nodes]
    stacks = (input_name(stack.weight) for stack in filter(None, map(as_expert_product, nodes)))
    return {*(linear.name for linear in filter(None, map(as_linear, nodes))), *stacks}


def without_matmuls(program: RiverProgram) -> Refusal | None:
    """Returns why no block could have a 4-bit twin: none of them multiplies by weights that can be read."""
    nodes = [node for block in program.blocks for node in block.graph.nodes]
    if any(as_linear(node) or as_expert_product(node) for node in nodes):
        return None
    weights = [node for node in program.blocks[0].inputs if is_parameter(node)]
    largest = max(weights, key=lambda node: value_of(node).nbytes, default=None)
    holds = (
        "" if largest is None else f" ({input_name(largest)} is {value_of(largest).dtype} {[*value_of(largest).shape]})"
    )
    return Refusal(
        f"the blocks have no linear layer with plain weights{holds}, so that no twin could be made of them; a model "
        "that was quantized by bitsandbytes, GPTQ or AWQ must be loaded in 16 bits",
        program.plan.blocks[0].path,
    )
