"""Makes the 16-bit layers multiply by the package's kernels, and packs their weights without loss.

Not handled: weights or results of another dtype than the input, transposed weights of linear layers (GPT-2's Conv1D).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import fx

from river_compile.kernels import mixture_ops, ops  # noqa: F401  (registers river::linear and river::mixture)
from river_compile.kernels.quant import lossless
from river_compile.kernels.quant.mxfp4 import LAYOUT_MXFP4
from river_compile.passes.edits import Pass, add_placeholders, call, drop_unused
from river_compile.passes.experts import (
    ExpertMatmul,
    as_expert_matmul,
    experts_per_token,
    is_mxfp4,
    read_mxfp4,
    replace_expert_matmul,
    stack_parameter,
)
from river_compile.passes.nodes import (
    Linear,
    as_linear,
    called,
    input_name,
    is_ordinary,
    is_parameter,
    same_dtype,
    value_of,
)
from river_compile.passes.program import Matmul, RiverProgram, Segment
from river_compile.passes.twins import current_input, group_by_input, replace_linears, simplify_attention

MOST_MERGED = 4  # weights of one matmul
_MERGED_ROWS = 16  # a generated kernel merges weights whose rows are a multiple of this


def own_matmuls(layout: str) -> Pass:
    """Make the pass below; `layout` is that of 16-bit weights: "dense" (C++) or "triton" (decode steps)."""

    def own_matmuls(program: RiverProgram) -> RiverProgram:
        """Linear layers of blocks and head are operators of the package."""
        blocks = tuple(_with_river_linears(block, layout) for block in program.blocks)
        return replace(program, blocks=blocks, head=_with_river_linears(program.head, layout))

    return own_matmuls


Shape: TypeAlias = tuple[int, int]  # of a matmul's weight [N, K]


def packed_backbone(weights: str, worth: Callable[[Mapping[Shape, int]], Collection[Shape]] = tuple) -> Pass:
    """Make the pass below; `weights`: "12bit", "8bit", or "model" (only torchao's 8-bit weights are packed)."""
    # worth: which of a program's shapes, with how often each occurs, are to have 12 bits.

    def packed_backbone(program: RiverProgram) -> RiverProgram:
        """Blocks and head read weights packed without loss, twins MXFP4 experts."""
        segments = (*program.blocks, program.head)
        shapes = Counter(_shape(weights) for segment in segments for _, weights, _ in _plain_matmuls(segment))
        for stack in (stack for segment in segments for stack in _plain_stacks(segment)):
            shapes[stack.shape] += stack.each
        in_12_bits = worth(shapes) if weights == "12bit" else ()
        *blocks, head = (_packed(segment, program, weights, in_12_bits) for segment in segments)
        twins = tuple(_packed(twin, program, "model", ()) if _plain_stacks(twin) else twin for twin in program.twins)
        return replace(program, blocks=tuple(blocks), twins=twins, head=head)

    return packed_backbone


def parts_of(parameter: fx.Node | None) -> list[fx.Node]:
    """Return the parameters that a matmul's weight or bias is concatenated from; of None, none."""
    if parameter is None:
        return []
    return list(parameter.args[0]) if called(parameter, torch.cat) else [parameter]


def model_matmuls(program: RiverProgram) -> Iterator[str]:
    """Yield the names of weights of blocks and head that the model's operators multiply."""
    for segment in (*program.blocks, program.head):
        for node in segment.graph.nodes:
            matmul = as_linear(node) or as_expert_matmul(node)
            if matmul is not None:
                yield input_name(segment.origins.get(matmul.weight, matmul.weight))


def _with_river_linears(segment: Segment, layout: str) -> Segment:
    made = segment.copy()
    simplify_attention(made.graph)
    groups = group_by_input(made.graph, lambda linear: _kind(linear, layout))
    for linears in groups:
        aligned = layout == "dense" or all(linear.out_features % _MERGED_ROWS == 0 for linear in linears)
        together = MOST_MERGED if aligned else 1
        for start in range(0, len(linears), together):
            _merge(made.graph, linears[start : start + together], layout)
    if layout == "dense":
        read_mxfp4(made.graph)
        for stack in filter(None, map(as_expert_matmul, list(made.graph.nodes))):
            _read_in_place(made.graph, stack)
    return made


def _read_in_place(graph: fx.Graph, stack: ExpertMatmul) -> None:
    """Have the C++ kernels read a stack of experts as the model has it, if they can."""
    weight, value = stack.weight, value_of(stack.weight)
    alike = same_dtype(weight, stack.x) and same_dtype(weight, stack.node)
    if not alike or not is_ordinary(value) or not value.is_contiguous():
        return
    if stack.transposed:
        with graph.inserting_before(stack.node):
            weight = call(torch.transpose, (weight, 1, 2), value.mT, stack.node)
    replace_expert_matmul(graph, stack, weight, None, 0, "dense")


def _kind(linear: Linear, layout: str) -> tuple[object, ...] | None:
    """Return a key, equal for linear layers that can be merged; None for one that stays as it is."""
    parameters = [linear.weight] if linear.bias is None else [linear.weight, linear.bias]
    if linear.transposed or not all(is_parameter(p) and same_dtype(p, linear.x) for p in parameters):
        return None
    if not same_dtype(linear.node, linear.x):
        return None
    values = [value_of(p) for p in parameters]
    held = lossless.torchao_parts(values[0]) if layout == "dense" else None
    plain = values if held is None else values[1:]
    if not all(is_ordinary(value) and value.is_contiguous() for value in plain):
        return None
    return linear.bias is None, held and held[0].dtype


def _merge(graph: fx.Graph, linears: Sequence[Linear], layout: str) -> None:
    """Replace linear layers by one matmul; its weight is a ``torch.cat``, which the lowering splits again."""
    first = linears[0]
    with graph.inserting_before(first.node):
        weight = _joined([linear.weight for linear in linears], first.node)
        bias = first.bias and _joined([linear.bias for linear in linears if linear.bias], first.node)
    replace_linears(linears, current_input(linears), weight, None, bias, 0, layout)


def _joined(parameters: list[fx.Node], like: fx.Node) -> fx.Node:
    if len(parameters) == 1:
        return parameters[0]
    value, like_of = value_of(parameters[0]), value_of(like)
    rows = sum(value_of(p).shape[0] for p in parameters)
    return call(torch.cat, (parameters, 0), like_of.new_empty((rows, *value.shape[1:])), like)


def _plain_matmuls(segment: Segment) -> Iterator[tuple[fx.Node, list[fx.Node], list[fx.Node]]]:
    """Yield matmuls whose weights are as the model has them, with their weights and biases."""
    for node in segment.graph.find_nodes(op="call_function", target=torch.ops.river.linear.default):
        _, weight, scale_zero, bias, *_ = node.args
        weights, biases = parts_of(weight), parts_of(bias)
        if scale_zero is None and all(map(is_parameter, [*weights, *biases])):
            yield node, weights, biases


def _shape(weights: Sequence[fx.Node]) -> Shape:
    return sum(len(value_of(part)) for part in weights), value_of(weights[0]).shape[1]


def _packed(segment: Segment, program: RiverProgram, how: str, in_12_bits: Collection[Shape]) -> Segment:
    made = segment.copy()
    origins = made.origins
    number_of = {placeholder: program.slots[value] for placeholder, value in origins.items()}
    packed: list[Matmul] = []
    read: dict[fx.Node, None] = {}  # parameters, in order
    for node, weights, biases in list(_plain_matmuls(made)):
        x, weight, _, bias, out_features, _, layout = node.args
        layout = _layout(layout, [value_of(part) for part in weights], how, _shape(weights) in in_12_bits)
        if layout is None:
            continue
        if layout == lossless.LAYOUT_12BIT_TRITON and node.kwargs.get("gated") and out_features // 2 % lossless.FOUR:
            continue  # the up projection would start within a packed unit
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
    for stack in _plain_stacks(made):
        parameter, (n, k) = stack.parameter, stack.shape
        is_worth = stack.shape in in_12_bits and value_of(parameter).dtype == torch.bfloat16
        layout = LAYOUT_MXFP4 if is_mxfp4(parameter) else lossless.LAYOUT_12BIT if is_worth else None
        if layout is None:
            continue
        new = add_placeholders(made.graph, [f"packed_{len(packed)}_{name}" for name in ("weight", "scale_zero")])
        experts = len(value_of(parameter))
        packed.append(
            Matmul(
                name=input_name(origins[parameter]),
                weights=(number_of[parameter],),
                biases=(None,),
                in_features=k,
                out_features=(experts * n,),
                transposed=stack.transposed,
                group_size=0,
                layout=layout,
                experts=experts,
            )
        )
        stack.put(new[0], new[1], layout)
        read[parameter] = None
    for node in read:  # keep other unused placeholders: Inductor looks for sizes among them
        if not node.users:
            made.graph.erase_node(node)
    inputs = tuple(origins[node] for node in made.graph.find_nodes(op="placeholder") if node in origins)
    return replace(made, inputs=inputs, packed=(*made.packed, *packed))


@dataclass(frozen=True)
class _PlainStack:
    """A stack of experts as the model has it: an operand of ``river::experts`` or ``river::mixture``."""

    node: fx.Node
    place: int  # of its weight among the arguments
    each: int  # experts of a token

    @property
    def parameter(self) -> fx.Node:
        parameter = stack_parameter(self.node.args[self.place])
        assert parameter is not None, "it was one when it was found"
        return parameter

    @property
    def transposed(self) -> bool:
        return self.parameter is not self.node.args[self.place] or is_mxfp4(self.parameter)

    @property
    def shape(self) -> Shape:
        _, n, k = value_of(self.parameter).shape
        return (k, n) if self.transposed else (n, k)

    def put(self, weight: fx.Node, scale_zero: fx.Node, layout: str) -> None:
        before, arguments = self.node.args[self.place], list(self.node.args)
        arguments[self.place : self.place + 2] = weight, scale_zero
        if called(self.node, torch.ops.river.experts.default):
            arguments[6] = layout
        else:
            layouts = arguments[14].split()
            layouts[self.place == _DOWN] = layout
            arguments[14] = " ".join(layouts)
        self.node.args = tuple(arguments)
        if before.op != "placeholder":
            drop_unused(before)


_UP, _DOWN = 3, 7  # places of a mixture's stacks


def _plain_stacks(segment: Segment) -> list[_PlainStack]:
    """Return the stacks that the C++ kernels read as the model has them."""
    experts, mixture = torch.ops.river.experts.default, torch.ops.river.mixture.default
    found = [(n, 1) for n in segment.graph.find_nodes(op="call_function", target=experts)]
    found += [(n, i) for n in segment.graph.find_nodes(op="call_function", target=mixture) for i in (_UP, _DOWN)]
    plain = [(n, i, stack_parameter(n.args[i])) for n, i in found if n.args[i + 1] is None]
    chosen = experts_per_token(segment) if plain else {}
    return [_PlainStack(n, i, chosen.get(parameter, 1)) for n, i, parameter in plain if parameter is not None]


def _layout(kernels: str, weights: list[torch.Tensor], how: str, in_12_bits: bool) -> str | None:
    """Return the packed layout of a matmul's weights, None if they stay; `kernels` is the 16-bit layout."""
    if all(lossless.torchao_parts(weight) is not None for weight in weights):
        return lossless.LAYOUT_8BIT
    dtypes = {weight.dtype for weight in weights}
    if in_12_bits and dtypes == {torch.bfloat16}:
        return lossless.LAYOUT_12BIT if kernels == "dense" else lossless.LAYOUT_12BIT_TRITON
    return lossless.LAYOUT_8BIT if how == "8bit" and len(dtypes) == 1 else None
