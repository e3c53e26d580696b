"""Stamps a decoder: from a trace of a few of its blocks, the graph of all of them.

Not handled (a Refusal): blocks of one kind whose traces differ, and blocks that share more than one hidden state.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import filterfalse

import torch
from torch import fx

from river_compile.passes.decoder import find_decoder
from river_compile.passes.nodes import external_inputs, value_of
from river_compile.passes.program import DecoderPlan, Refusal, Source
from river_compile.passes.segments import describe, target_name


@dataclass(frozen=True)
class Template:
    """A trace of some of a model's blocks, in their order."""

    graph_module: fx.GraphModule  # in the normal form
    sources: Mapping[fx.Node, Source]  # of its inputs, in the whole model
    path: str  # of the model's module list
    traced: tuple[int, ...]  # by block of the trace: its index in the model
    kinds: tuple[int, ...]  # by block of the model: the block of the trace that is like it


@dataclass(frozen=True)
class Stamped:
    graph_module: fx.GraphModule
    sources: tuple[Source, ...]  # of its inputs, in order


def stamp(template: Template) -> Stamped | Refusal:
    """Return the graph of all blocks; it computes what a trace of the whole model does."""
    plan = find_decoder(template.graph_module)
    if isinstance(plan, Refusal):
        return plan
    if [block.path for block in plan.blocks] != [f"{template.path}.{i}" for i in range(len(template.traced))]:
        return Refusal("the decoder is another module list", plan.blocks[0].path)
    stamper = _Stamper(template, plan)
    return stamper.obstacle() or stamper.stamped()


class _Stamper:
    def __init__(self, template: Template, plan: DecoderPlan) -> None:
        self._template, self._plan = template, plan
        self._numbers = {traced: number for number, traced in enumerate(template.traced)}
        nodes = [node for node in plan.graph.nodes if node.op not in ("placeholder", "output")]
        self._parts = [[n for n in nodes if plan.part_of[n] == part] for part in range(plan.num_blocks + 2)]
        # Dynamo computes a number of sizes once, in the first block that uses it.
        crossing = (n for part in self._parts[1:-1] for n in part if len({*map(plan.part_of.get, n.users)}) > 1)
        self._shared = {n for n in crossing if isinstance(value_of(n), (int, torch.SymInt))}

    def obstacle(self) -> Refusal | None:
        """Return why blocks cannot be stamped, None if they can."""
        plan, template = self._plan, self._template
        for block in plan.blocks:
            part = block.index + 1
            for node in filterfalse(self._shared.__contains__, self._parts[part]):
                inside = {part, part + 1} if node is block.hidden_out else {part}
                if not all(plan.part_of.get(user) in inside for user in node.users):  # the output is of no part
                    return Refusal("a layer passes on more than its hidden state", node.name)
            if any(self._block_of(node) not in (None, block.index) for node in external_inputs(self._parts[part])):
                return Refusal("a layer reads another one's parameters or cache", block.path)
        # Blocks at two places show whether the model's code depends on the place.
        lines = [list(self._lines(number)) for number in range(plan.num_blocks)]
        for index, number in self._numbers.items():
            like = template.kinds[index]
            if lines[number] != lines[like]:
                return Refusal(f"its trace is not that of layer {template.traced[like]}", plan.blocks[number].path)
        return None

    def stamped(self) -> Stamped:
        plan, template = self._plan, self._template
        graph = fx.Graph()
        sources: list[Source] = []
        shared: dict[fx.Node, fx.Node] = {}  # by node of the trace
        own: list[dict[fx.Node, fx.Node]] = []  # by block of the model

        def placeholder(node: fx.Node, source: Source, suffix: str = "") -> fx.Node:
            sources.append(source)
            made = graph.placeholder(node.name + suffix)
            made.meta = {name: value for name, value in node.meta.items() if name != "grapharg"}
            return made

        inputs = plan.graph.find_nodes(op="placeholder")
        outside = {*external_inputs([*self._parts[0], *self._parts[-1]])}  # a mask may read the first cache's length
        for node in inputs:
            if self._block_of(node) is None or node in outside:
                shared[node] = placeholder(node, template.sources[node])
        for index, like in enumerate(template.kinds):
            own.append({})
            for node in (node for node in inputs if self._block_of(node) == like):
                if node not in shared or index != template.traced[like]:
                    source = self._moved(template.sources[node], like, index)
                    own[-1][node] = placeholder(node, source, f"_of_{index}")
        for node in self._parts[0]:
            shared[node] = graph.node_copy(node, shared.__getitem__)
        hidden = shared[plan.blocks[0].hidden_in]
        for index, like in enumerate(template.kinds):
            block, new = plan.blocks[like], {**shared, **own[index], plan.blocks[like].hidden_in: hidden}
            for node in self._parts[like + 1]:
                if node in shared:
                    continue
                new[node] = graph.node_copy(node, new.__getitem__)
                new[node].meta["nn_module_stack"] = self._moved_stack(node, like, index)
                if node in self._shared:
                    shared[node] = new[node]
            hidden = new[block.hidden_out]
        shared[plan.blocks[-1].hidden_out] = hidden
        for node in (*self._parts[-1], plan.graph.output_node()):
            shared[node] = graph.node_copy(node, shared.__getitem__)
        return Stamped(fx.GraphModule(template.graph_module, graph), tuple(sources))

    def _block_of(self, node: fx.Node) -> int | None:
        """Return the block of the trace that an input belongs to, None for other nodes."""
        source = self._template.sources.get(node)
        if source is None or source.kind not in ("model", "cache"):
            return None
        if source.kind == "cache":
            return self._numbers.get(source.layer)
        rest = source.name.removeprefix(f"{self._template.path}.")
        return None if rest == source.name else self._numbers[int(rest.partition(".")[0])]

    def _moved(self, source: Source, like: int, index: int) -> Source:
        """Return an input's source in another block."""
        if source.kind == "cache":
            return replace(source, layer=index)
        path, traced = self._template.path, self._template.traced[like]
        return replace(source, name=f"{path}.{index}.{source.name.removeprefix(f'{path}.{traced}.')}")

    def _moved_stack(self, node: fx.Node, like: int, index: int) -> dict[str, tuple[str, object]]:
        """Return a node's module stack with the paths of another block."""
        last = re.escape(self._template.path.rpartition(".")[2])
        # `...layers.5`, `...layers[5]` and `getattr(...layers, '5')`; the first such list is the decoder's.
        number = re.compile(rf"({last}(?:\.|\[|, '|'\]\._modules\[')){like}(?!\d)")
        stack = node.meta.get("nn_module_stack") or {}
        return {key: (number.sub(rf"\g<1>{index}", path, count=1), kind) for key, (path, kind) in stack.items()}

    def _lines(self, number: int) -> Iterator[str]:
        """Yield a line for each node of a block, in which nothing names the block."""
        plan, block = self._plan, self._plan.blocks[number]
        names: dict[fx.Node, str] = {}

        def name(node: fx.Node) -> str:
            if node is block.hidden_in:
                return "hidden"
            if node not in names and self._block_of(node) == number:
                return str(self._moved(self._template.sources[node], number, 0))
            return names.get(node, node.name)

        for place, node in enumerate(filterfalse(self._shared.__contains__, self._parts[number + 1])):
            args, kwargs = fx.map_arg((node.args, node.kwargs), name)
            names[node] = f"%{place}"
            yield f"{node.op} {target_name(node)} {args!r} {kwargs!r} {describe(value_of(node))}"
        inputs = (node for node in plan.graph.find_nodes(op="placeholder") if self._block_of(node) == number)
        yield from sorted(f"{name(node)} {describe(value_of(node))}" for node in inputs)
