"""Makes twins: copies of a decoder block's graph with 4-bit matmuls in place of its linears and stacked experts.

Linears that share an input (q|k|v, gate|up) become one matmul whose result is split; all other nodes stay.
A twin reads the layer's own MXFP4 experts. Not handled: parameters that other operations read; they stay in 16 bits
and are reported.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from river_compile.kernels import ops  # noqa: F401  (registers river::linear)
from river_compile.kernels.portable import grouped_attention, one_row_linear
from river_compile.kernels.quant.grid import GROUP_SIZES, fitting_group_size
from river_compile.passes.edits import Pass, add_placeholders, call, cast_like, drop_unused
from river_compile.passes.experts import (
    ROUTER,
    ExpertMatmul,
    as_expert_matmul,
    is_router,
    read_mxfp4,
    replace_expert_matmul,
)
from river_compile.passes.fusion.recognise import skip_repeat
from river_compile.passes.nodes import (
    Linear,
    as_linear,
    called,
    inference_sdpa,
    input_name,
    is_ordinary,
    is_parameter,
    is_reshape,
    is_tensor,
    mutated_inputs,
    rank,
    shape,
    value_of,
)
from river_compile.passes.program import KeptLinear, Matmul, RiverProgram, Segment

MIN_GROUP_SIZE = min(GROUP_SIZES)


@dataclass(frozen=True)
class TwinSpec:
    group_size: int  # at most; each matmul uses the largest power of two that divides its input features
    layout: str  # of packed weights
    scale_inputs: bool = False  # AWQ's scales, if they cost no operation


def twin_layers(how: TwinSpec | None) -> Pass:
    """Make the pass that adds twins; without `how`, all weights stay in 16 bits."""

    def twin_layers(program: RiverProgram) -> RiverProgram:
        """Every layer has a twin with 4-bit matmuls, for tokens that exited early."""
        if how is None:
            return replace(program, twins=tuple(block.copy("twin") for block in program.blocks))
        made = [_twin(block, "twin", how, program.slots) for block in program.blocks]
        kept = tuple(linear for _, left in made for linear in left)
        return replace(program, twins=tuple(twin for twin, _ in made), kept=(*program.kept, *kept))

    return twin_layers


def twin_head(how: TwinSpec) -> Pass:
    """Make the pass that adds a 4-bit head."""

    def twin_head(program: RiverProgram) -> RiverProgram:
        """Tokens that exited early use a head with a quantized weight."""
        head, kept = _twin(program.head, "twin_head", how, program.slots)
        return replace(program, twin_head=head, kept=(*program.kept, *kept))

    return twin_head


def one_row_head(fuse: bool) -> Pass:
    """Make the pass that adds a 16-bit head; with `fuse`, fusion rules replace its matmul later."""

    def one_row_head(program: RiverProgram) -> RiverProgram:
        """Tokens that exited early use a head whose matmul is made for one row."""
        head = program.head.copy("twin_head")
        return replace(program, twin_head=head) if fuse or simplify_linears(head.graph) else program

    return one_row_head


def linear_names(program: RiverProgram) -> set[str]:
    nodes = [node for segment in (*program.blocks, program.head) for node in segment.graph.nodes]
    stacks = (input_name(stack.weight) for stack in filter(None, map(as_expert_matmul, nodes)))
    return {*(linear.name for linear in filter(None, map(as_linear, nodes))), *stacks}


def _twin(block: Segment, kind: str, how: TwinSpec, slots: Mapping[fx.Node, int]) -> tuple[Segment, list[KeptLinear]]:
    """Return a segment's twin, and its weights that stay in 16 bits."""
    twin = block.copy(kind)
    graph, source_of = twin.graph, twin.origins
    number_of = {placeholder: slots[value] for placeholder, value in source_of.items()}
    simplify_attention(graph)
    in_4_bits = {number_of[parameter] for parameter in read_mxfp4(graph)}
    made: list[Matmul] = []
    kept: dict[int, KeptLinear] = {}
    for found in _matmuls(graph, number_of, how):
        matmul = found.matmul
        if found.reason:
            named = zip(matmul.weights, matmul.name.split("|"), strict=True)
            kept |= {weight: KeptLinear(name, found.reason) for weight, name in named}
        else:
            found.replace(graph, len(made))
            made.append(matmul)
    written = {source_of.get(mutated) for node in graph.nodes for mutated in mutated_inputs(node)}
    known = {*kept, *in_4_bits, *(weight for matmul in made for weight in matmul.weights)}
    for node in block.inputs:  # transformers marks KV caches like parameters, but these are written
        value = value_of(node)
        weight = is_parameter(node) and value.dim() >= 2 and value.is_floating_point()
        if weight and slots[node] not in known and node not in written and not _is_table(node):
            reason = f"a weight of shape {tuple(value.shape)} that no plain linear layer reads"
            kept[slots[node]] = KeptLinear(input_name(node), reason)
    for node in reversed(list(graph.nodes)):
        if not node.users and (node.op == "placeholder" or node.target is torch.t):
            graph.erase_node(node)
    for node in graph.find_nodes(op="call_function", target=torch.Tensor.view):
        if isinstance(node.args[1], tuple):  # `view` may fail on a slice of a merged matmul, whose rows have gaps
            node.target = torch.reshape
    inputs = tuple(source_of[n] for n in graph.nodes if n in source_of)
    return replace(twin, inputs=inputs, packed=tuple(made)), list(kept.values())


def _is_table(node: fx.Node) -> bool:
    """Whether rows of a parameter are only looked up, such as biases of experts."""
    return rank(node) == 2 and all(called(user, operator.getitem) and is_tensor(user.args[1]) for user in node.users)


def _matmuls(graph: fx.Graph, number_of: Mapping[fx.Node, int], how: TwinSpec) -> list[_Linears | _Experts]:
    found: list[_Linears | _Experts] = []
    for linears in group_by_input(graph, lambda linear: (linear.transposed, is_router(linear.node))):
        reason = ROUTER if is_router(linears[0].node) else ""  # routers are a separate group
        found.append(_merged(tuple(linears), number_of, how, reason))
    for stack in filter(None, map(as_expert_matmul, graph.nodes)):
        matmul = stack.matmul(number_of, how.group_size, how.layout)
        found.append(_Experts(stack, matmul, _too_narrow(matmul)))
    return found


@dataclass(frozen=True)
class _Linears:
    """Linears that share their input, and the 4-bit matmul that replaces them."""

    linears: tuple[Linear, ...]
    scale: InputScale | None
    matmul: Matmul
    reason: str  # why they stay in 16 bits; "" if they do not

    def replace(self, graph: fx.Graph, index: int) -> None:
        """Replace them by one ``river::linear``, the `index`-th matmul of its twin."""
        matmul, scale, first = self.matmul, self.scale, self.linears[0].node
        names = ["qweight", "scale_zero", *(["bias"] if matmul.has_bias else [])]
        scaled = [f"scaled_{i}" for i in range(max(1, len(matmul.folds)))] if scale else []
        new = add_placeholders(graph, [f"river_{index}_{name}" for name in (*names, *scaled)])
        x = current_input(self.linears)
        x = scale_inputs(x, scale, new[len(names) :]) if scale else x
        bias = next((each.bias for each in self.linears if each.bias), None)
        with graph.inserting_before(first):
            x = cast_like(first, x)
            if bias is not None:
                new[2].meta["example_value"] = value_of(bias).new_empty(matmul.shape[:1])
                bias = cast_like(first, new[2])
        replace_linears(self.linears, x, new[0], new[1], bias, matmul.group_size, matmul.layout)


@dataclass(frozen=True)
class _Experts:
    found: ExpertMatmul
    matmul: Matmul
    reason: str

    def replace(self, graph: fx.Graph, index: int) -> None:
        new = add_placeholders(graph, [f"river_{index}_{name}" for name in ("qweight", "scale_zero")])
        replace_expert_matmul(graph, self.found, new[0], new[1], self.matmul.group_size, self.matmul.layout)


def _merged(linears: tuple[Linear, ...], number_of: Mapping[fx.Node, int], how: TwinSpec, reason: str) -> _Linears:
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


def _too_narrow(matmul: Matmul) -> str:
    """Return why a matmul cannot be quantized, "" if it can."""
    if matmul.group_size >= MIN_GROUP_SIZE:
        return ""
    return f"{matmul.in_features} input features have no group of {MIN_GROUP_SIZE} or more"


def group_by_input(graph: fx.Graph, alike: Callable[[Linear], Hashable | None]) -> list[list[Linear]]:
    """Group linear layers of one input for which `alike` is equal; None leaves one out."""
    groups: dict[tuple[fx.Node, Hashable], list[Linear]] = {}
    for linear in filter(None, map(as_linear, graph.nodes)):
        key = alike(linear)
        if key is not None:
            groups.setdefault((linear.x, key), []).append(linear)
    return [*groups.values()]


def current_input(linears: Sequence[Linear]) -> fx.Node:
    """Return the input of linear layers by now, since a rewrite may have replaced the node."""
    current = as_linear(linears[0].node)
    assert current is not None, "it was one when it was listed"
    return current.x


def replace_linears(linears: Sequence[Linear], x: fx.Node, *operands: object) -> None:
    """Replace linear layers that share an input by one ``river::linear`` and split its result.

    `linears` are in the order of the merged rows; `operands` are weight, scale_zero, bias, group_size, layout.
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


@dataclass(frozen=True)
class InputScale:
    """Where AWQ's division of a matmul's inputs by a scale can be folded."""

    node: fx.Node  # the norm or multiplication that returns the inputs
    parameters: tuple[fx.Node, ...]  # of the norm, to be divided by the scale; none: multiply by its inverse


def find_input_scale(x: fx.Node, readers: Collection[fx.Node], features: int) -> InputScale | None:
    """Return how inputs `x` ``[..., features]`` of the `readers` can be scaled, None if that costs an operation."""
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
    """Replace the norm's parameters by placeholders, or multiplies the inputs by one; return the inputs."""
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


def simplify_attention(graph: fx.Graph) -> None:
    """Replace attention of one query position, unless it is causal, by one without repeated KV heads."""
    for node in list(graph.nodes):
        found = inference_sdpa(node)
        if found is not None and not found.causal and shape(found.q)[2] == 1:
            node.target = grouped_attention
            with graph.inserting_before(node):
                q = cast_like(node, found.q)
            node.args = (q, skip_repeat(found.k), skip_repeat(found.v), found.mask, found.scale)
            node.kwargs = {}
            for repeated in (found.k, found.v):
                drop_unused(repeated)


def simplify_linears(graph: fx.Graph) -> int:
    """Replace 16-bit linear layers of one input row by `one_row_linear`; return their number."""
    linears = graph.find_nodes(op="call_function", target=torch.nn.functional.linear)
    known = [n for n in linears if value_of(n.args[0]) is not None and is_ordinary(value_of(n.args[1]))]
    one_row = [n for n in known if set(shape(n.args[0])[:-1]) == {1}]
    for node in one_row:
        with graph.inserting_before(node):
            node.args = (cast_like(node, node.args[0]), *node.args[1:])
        node.target = one_row_linear
    return len(one_row)
