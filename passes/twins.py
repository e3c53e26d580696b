"""Makes river twins: a decoder block's graph with 4-bit matrix products in place of its linears.

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

from river_compile.kernels import ops  # noqa: F401  (registers river::linear)
from river_compile.kernels.quant.grid import GROUP_SIZES, fitting_group_size
from river_compile.passes.attention import simplify_attention, simplify_linears
from river_compile.passes.edits import add_placeholders, call, in_dtype_of
from river_compile.passes.experts import ExpertProduct, as_expert_product, replace_expert_product
from river_compile.passes.input_scales import InputScale, find_input_scale, scale_inputs
from river_compile.passes.moe_router import ROUTER, is_router
from river_compile.passes.nodes import (
    Linear,
    as_linear,
    called,
    input_name,
    is_parameter,
    is_tensor,
    mutated_inputs,
    rank,
    value_of,
)
from river_compile.passes.pipeline import Pass
from river_compile.passes.program import KeptLinear, LinearSite, Refusal, RiverProgram, Segment

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
class _Product:
    """Linears of a segment that share their input, in order, how that can be scaled, and the 4-bit product they become.

    `reason` says why it stays in 16 bits, empty where it can be made.
    """

    linears: tuple[Linear, ...]
    scale: InputScale | None
    site: LinearSite
    reason: str

    def replace(self, graph: fx.Graph, index: int) -> None:
        _replace(graph, self, index)


@dataclass(frozen=True)
class _Stack:
    """A product with stacked experts, and the 4-bit product it becomes."""

    product: ExpertProduct
    site: LinearSite
    reason: str

    def replace(self, graph: fx.Graph, index: int) -> None:
        replace_expert_product(graph, self.product, self.site, index)


def twin_sites(segment: Segment, how: Twinning) -> list[LinearSite]:
    """Returns the 4-bit products that the twin of a segment can have."""
    return [p.site for p in _products(segment, how) if not p.reason]


def without_products(program: RiverProgram) -> Refusal | None:
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
        "that was quantized by bitsandbytes, GPTQ, AWQ or compressed-tensors must be loaded in 16 bits",
        program.plan.blocks[0].path,
    )


def river_twins(how: Twinning | None) -> Pass:
    """Makes the pass that gives every block its river twin; without `how`, every matrix stays in 16 bits."""

    def river_twins(program: RiverProgram) -> RiverProgram:
        """Every block gets a twin with 4-bit matrix products, which a token that left runs."""
        if how is None:
            return replace(program, twins=tuple(block.copy("twin") for block in program.blocks))
        made = [_twin(block, "twin", how) for block in program.blocks]
        kept = tuple(linear for _, left in made for linear in left)
        return replace(program, twins=tuple(twin for twin, _ in made), kept=(*program.kept, *kept))

    return river_twins


def river_head(how: Twinning) -> Pass:
    """Makes the pass that gives the head a twin of 4 bits."""

    def river_head(program: RiverProgram) -> RiverProgram:
        """Tokens that left use a head with a quantized matrix."""
        head, kept = _twin(program.head, "river_head", how)
        return replace(program, river_head=head, kept=(*program.kept, *kept))

    return river_head


def one_row_head(fuse: bool) -> Pass:
    """Makes the pass that gives tokens that left a head of their own in 16 bits.

    Its product becomes the operator for one row here, except where the fusion rules will replace it (`fuse`).
    """

    def one_row_head(program: RiverProgram) -> RiverProgram:
        """Tokens that left use a head whose matrix product is made for one row."""
        head = program.head.copy("river_head")
        return replace(program, river_head=head) if fuse or simplify_linears(head.graph) else program

    return one_row_head


def _twin(block: Segment, kind: str, how: Twinning) -> tuple[Segment, list[KeptLinear]]:
    """Returns a segment's twin, and the matrices of it that stay in 16 bits, each with the reason."""
    twin = block.copy(kind)
    graph, source_of = twin.graph, twin.origins
    simplify_attention(graph)
    sites: list[LinearSite] = []
    kept: dict[fx.Node, KeptLinear] = {}
    for product in _products(twin, how):
        site = product.site
        if product.reason:
            named = zip(site.weights, site.name.split("|"), strict=True)
            kept |= {weight: KeptLinear(name, product.reason) for weight, name in named}
        else:
            product.replace(graph, len(sites))
            sites.append(site)
    written = {source_of.get(mutated) for node in graph.nodes for mutated in mutated_inputs(node)}
    known = {*kept, *written, *(weight for site in sites for weight in site.weights)}
    for node in block.inputs:  # (Dynamo marks KV caches as parameters too; those are written)
        value = value_of(node)
        matrix = is_parameter(node) and value.dim() >= 2 and value.is_floating_point()
        if matrix and node not in known and not _is_table(node):
            reason = f"a weight of shape {tuple(value.shape)} that no plain linear layer reads"
            kept[node] = KeptLinear(input_name(node), reason)
    for node in reversed(list(graph.nodes)):
        if not node.users and (node.op == "placeholder" or node.target is torch.t):
            graph.erase_node(node)
    for node in graph.find_nodes(op="call_function", target=torch.Tensor.view):
        if isinstance(node.args[1], tuple):  # (`view` may refuse a slice of a merged product: its rows have gaps)
            node.target = torch.reshape
    inputs = tuple(source_of[n] for n in graph.nodes if n in source_of)
    return replace(twin, inputs=inputs, packed=tuple(sites)), list(kept.values())


def _is_table(node: fx.Node) -> bool:
    """True for vectors of which some are looked up, such as the biases of experts."""
    return rank(node) == 2 and all(called(user, operator.getitem) and is_tensor(user.args[1]) for user in node.users)


def _products(segment: Segment, how: Twinning) -> list[_Product | _Stack]:
    """Returns a segment's linears, those together that read the same value in the same way, and then its experts.

    Routers are products of their own.
    """
    groups: dict[tuple[fx.Node, bool, bool], list[Linear]] = {}
    for linear in filter(None, map(as_linear, segment.graph.nodes)):
        groups.setdefault((linear.x, linear.transposed, is_router(linear.node)), []).append(linear)
    products: list[_Product | _Stack] = []
    for (*_, routes), linears in groups.items():
        products.append(_product(tuple(linears), segment.origins, how, ROUTER if routes else ""))
    for stack in filter(None, map(as_expert_product, segment.graph.nodes)):
        site = stack.site(segment.origins, how.group_size, how.layout)
        products.append(_Stack(stack, site, _too_narrow(site)))
    return products


def _product(linears: tuple[Linear, ...], source_of: Mapping[fx.Node, fx.Node], how: Twinning, reason: str) -> _Product:
    first = linears[0]
    nodes = [linear.node for linear in linears]
    scale = find_input_scale(first.x, nodes, first.in_features) if how.scale_inputs and not reason else None
    site = LinearSite(
        name="|".join(linear.name for linear in linears),
        weights=tuple(source_of[linear.weight] for linear in linears),
        biases=tuple(source_of[linear.bias] if linear.bias else None for linear in linears),
        in_features=first.in_features,
        out_features=tuple(linear.out_features for linear in linears),
        transposed=first.transposed,
        group_size=fitting_group_size(first.in_features, how.group_size),
        layout=how.layout,
        scales_inputs=scale is not None,
        folds=tuple(source_of[parameter] for parameter in scale.parameters) if scale else (),
    )
    return _Product(linears, scale, site, reason or _too_narrow(site))


def _too_narrow(site: LinearSite) -> str:
    """Returns why a product cannot be made in 4 bits, empty where it can."""
    if site.group_size >= MIN_GROUP_SIZE:
        return ""
    return f"{site.in_features} input features have no group of {MIN_GROUP_SIZE} or more"


def _replace(graph: fx.Graph, product: _Product, index: int) -> None:
    """Puts one ``river::linear`` in place of linears that share an input, and splits what it gives."""
    linears, site, scale = product.linears, product.site, product.scale
    names = ["qweight", "scale_zero", *(["bias"] if site.has_bias else [])]
    scaled = [f"scaled_{i}" for i in range(max(1, len(site.folds)))] if scale else []
    new = add_placeholders(graph, [f"river_{index}_{name}" for name in (*names, *scaled)])
    first, features = linears[0].node, sum(site.out_features)
    current = as_linear(first)
    assert current is not None  # (the input may be another one than when it was listed)
    before = current.x
    x = scale_inputs(before, scale, new[len(names) :]) if scale else before
    bias = next((linear.bias for linear in linears if linear.bias), None)
    with graph.inserting_before(first):
        x = in_dtype_of(first, x)
        if bias is not None:
            new[2].meta["example_value"] = value_of(bias).new_empty((features,))
            bias = in_dtype_of(first, new[2])
        arguments = (x, new[0], new[1], bias, features, site.group_size, site.layout)
        value = value_of(first).new_empty((*value_of(first).shape[:-1], features))
        merged = call(torch.ops.river.linear.default, arguments, value, first)
        results = [merged]
        if len(linears) > 1:
            values = tuple(value_of(linear.node) for linear in linears)
            parts = call(torch.split, (merged, list(site.out_features), -1), values, first)
            results = [call(operator.getitem, (parts, i), value, first) for i, value in enumerate(values)]
    for linear, result in zip(linears, results, strict=True):
        linear.node.replace_all_uses_with(result)
        graph.erase_node(linear.node)
