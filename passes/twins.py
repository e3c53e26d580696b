"""Makes river twins: a decoder block's graph with 4-bit matmuls in place of its linears.

Everything else of the block is kept, node for node, so that a twin reads and writes exactly what its block does.
Linears that share an input become one product whose result is split (q|k|v, gate|up, the MLP too where it is parallel
to attention). Products with stacked experts become one each (:mod:`river_compile.passes.experts`).

Not handled: parameters that are read in another way; they stay in 16 bits and are reported.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from river_compile.kernels.quant.grid import GROUP_SIZES, fitting_group_size
from river_compile.passes.attention import simplify_attention, simplify_linears
from river_compile.passes.edits import add_placeholders, in_dtype_of
from river_compile.passes.experts import ExpertProduct, as_expert_product, replace_expert_product
from river_compile.passes.input_scales import InputScale, find_input_scale, scale_inputs
from river_compile.passes.linears import input_of, replace_linears, sharing_input
from river_compile.passes.moe_router import ROUTER, is_router
from river_compile.passes.nodes import (
    Linear,
    called,
    input_name,
    is_parameter,
    is_tensor,
    mutated_inputs,
    rank,
    value_of,
)
from river_compile.passes.pipeline import Pass
from river_compile.passes.program import KeptLinear, Matmul, RiverProgram, Segment

MIN_GROUP_SIZE = min(GROUP_SIZES)


@dataclass(frozen=True)
class Twinning:
    """How twins are made: the packing's name, and whether inputs are scaled where that costs nothing.

    Each matrix takes the largest power of two up to `group_size` that divides its input features.
    """

    group_size: int
    layout: str
    scale_inputs: bool = False


@dataclass(frozen=True)
class _Linears:
    """Linears of a twin that share their input, in order, how that can be scaled, and the 4-bit matmul they become.

    `reason` says why it stays in 16 bits, empty where it can be made.
    """

    linears: tuple[Linear, ...]
    scale: InputScale | None
    linear: Matmul
    reason: str

    def replace(self, graph: fx.Graph, index: int) -> None:
        """Puts one ``river::linear`` in their place, the `index`-th matmul of its twin."""
        linear, scale, first = self.linear, self.scale, self.linears[0].node
        names = ["qweight", "scale_zero", *(["bias"] if linear.has_bias else [])]
        scaled = [f"scaled_{i}" for i in range(max(1, len(linear.folds)))] if scale else []
        new = add_placeholders(graph, [f"river_{index}_{name}" for name in (*names, *scaled)])
        x = input_of(self.linears)
        x = scale_inputs(x, scale, new[len(names) :]) if scale else x
        bias = next((each.bias for each in self.linears if each.bias), None)
        with graph.inserting_before(first):
            x = in_dtype_of(first, x)
            if bias is not None:
                new[2].meta["example_value"] = value_of(bias).new_empty(linear.shape[:1])
                bias = in_dtype_of(first, new[2])
        replace_linears(self.linears, x, new[0], new[1], bias, linear.group_size, linear.layout)


@dataclass(frozen=True)
class _Experts:
    """A matmul with stacked experts, and the 4-bit one it becomes."""

    product: ExpertProduct
    linear: Matmul
    reason: str

    def replace(self, graph: fx.Graph, index: int) -> None:
        replace_expert_product(graph, self.product, self.linear, index)


def river_twins(how: Twinning | None) -> Pass:
    """Makes the pass that gives every block its river twin; without `how`, every matrix stays in 16 bits."""

    def river_twins(program: RiverProgram) -> RiverProgram:
        """Every block gets a twin with 4-bit matmuls, which a token that left runs."""
        if how is None:
            return replace(program, twins=tuple(block.copy("twin") for block in program.blocks))
        made = [_twin(block, "twin", how, program.slots) for block in program.blocks]
        kept = tuple(linear for _, left in made for linear in left)
        return replace(program, twins=tuple(twin for twin, _ in made), kept=(*program.kept, *kept))

    return river_twins


def river_head(how: Twinning) -> Pass:
    """Makes the pass that gives the head a twin of 4 bits."""

    def river_head(program: RiverProgram) -> RiverProgram:
        """Tokens that left use a head with a quantized matrix."""
        head, kept = _twin(program.head, "river_head", how, program.slots)
        return replace(program, river_head=head, kept=(*program.kept, *kept))

    return river_head


def one_row_head(fuse: bool) -> Pass:
    """Makes the pass that gives tokens that left a head of their own in 16 bits.

    Its product becomes the operator for one row here, except where the fusion rules will replace it (`fuse`).
    """

    def one_row_head(program: RiverProgram) -> RiverProgram:
        """Tokens that left use a head whose matmul is made for one row."""
        head = program.head.copy("river_head")
        return replace(program, river_head=head) if fuse or simplify_linears(head.graph) else program

    return one_row_head


def _twin(block: Segment, kind: str, how: Twinning, slots: Mapping[fx.Node, int]) -> tuple[Segment, list[KeptLinear]]:
    """Returns a segment's twin, and the matrices of it that stay in 16 bits, each with the reason."""
    twin = block.copy(kind)
    graph, source_of = twin.graph, twin.origins
    number_of = {placeholder: slots[value] for placeholder, value in source_of.items()}
    simplify_attention(graph)
    made: list[Matmul] = []
    kept: dict[int, KeptLinear] = {}
    for matmul in _matmuls(graph, number_of, how):
        linear = matmul.linear
        if matmul.reason:
            named = zip(linear.weights, linear.name.split("|"), strict=True)
            kept |= {weight: KeptLinear(name, matmul.reason) for weight, name in named}
        else:
            matmul.replace(graph, len(made))
            made.append(linear)
    written = {source_of.get(mutated) for node in graph.nodes for mutated in mutated_inputs(node)}
    known = {*kept, *(weight for linear in made for weight in linear.weights)}
    for node in block.inputs:  # (Dynamo marks KV caches as parameters too; those are written)
        value = value_of(node)
        matrix = is_parameter(node) and value.dim() >= 2 and value.is_floating_point()
        if matrix and slots[node] not in known and node not in written and not _is_table(node):
            reason = f"a weight of shape {tuple(value.shape)} that no plain linear layer reads"
            kept[slots[node]] = KeptLinear(input_name(node), reason)
    for node in reversed(list(graph.nodes)):
        if not node.users and (node.op == "placeholder" or node.target is torch.t):
            graph.erase_node(node)
    for node in graph.find_nodes(op="call_function", target=torch.Tensor.view):
        if isinstance(node.args[1], tuple):  # (`view` may refuse a slice of a merged product: its rows have gaps)
            node.target = torch.reshape
    inputs = tuple(source_of[n] for n in graph.nodes if n in source_of)
    return replace(twin, inputs=inputs, packed=tuple(made)), list(kept.values())


def _is_table(node: fx.Node) -> bool:
    """True for vectors of which some are looked up, such as the biases of experts."""
    return rank(node) == 2 and all(called(user, operator.getitem) and is_tensor(user.args[1]) for user in node.users)


def _matmuls(graph: fx.Graph, number_of: Mapping[fx.Node, int], how: Twinning) -> list[_Linears | _Experts]:
    """Returns a graph's linears, those together that read the same value in the same way, and then its experts.

    Routers are matmuls of their own.
    """
    found: list[_Linears | _Experts] = []
    for linears in sharing_input(graph, lambda linear: (linear.transposed, is_router(linear.node))):
        reason = ROUTER if is_router(linears[0].node) else ""
        found.append(_merged(tuple(linears), number_of, how, reason))
    for stack in filter(None, map(as_expert_product, graph.nodes)):
        linear = stack.matmul(number_of, how.group_size, how.layout)
        found.append(_Experts(stack, linear, _too_narrow(linear)))
    return found


def _merged(linears: tuple[Linear, ...], number_of: Mapping[fx.Node, int], how: Twinning, reason: str) -> _Linears:
    first = linears[0]
    nodes = [linear.node for linear in linears]
    scale = find_input_scale(first.x, nodes, first.in_features) if how.scale_inputs and not reason else None
    merged = Matmul(
        name="|".join(linear.name for linear in linears),
        weights=tuple(number_of[linear.weight] for linear in linears),
        biases=tuple(number_of[linear.bias] if linear.bias else None for linear in linears),
        in_features=first.in_features,
        out_features=tuple(linear.out_features for linear in linears),
        transposed=first.transposed,
        group_size=fitting_group_size(first.in_features, how.group_size),
        layout=how.layout,
        scales_inputs=scale is not None,
        folds=tuple(number_of[parameter] for parameter in scale.parameters) if scale else (),
    )
    return _Linears(linears, scale, merged, reason or _too_narrow(merged))


def _too_narrow(linear: Matmul) -> str:
    """Returns why a matmul cannot be made in 4 bits, empty if it can."""
    if linear.group_size >= MIN_GROUP_SIZE:
        return ""
    return f"{linear.in_features} input features have no group of {MIN_GROUP_SIZE} or more"
