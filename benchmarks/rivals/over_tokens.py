"""Runs a decode block for several consecutive tokens at once: the block's graph, vectorized over tokens.

A decode block is traced for one token, and sizes of one are written into its graph. So it is not widened but mapped
(``torch.vmap``), with the mask that each token had in its own step. Weights are read once for all tokens.

    hidden, cosines, mask ... [m, ...]       m tokens, the newest last
      -> for each token: norm, projections, rotary embedding
      -> KV write: the m slots that end at the counter, which advances by one
      -> for each token: attention, MLP
      -> hidden [m, ...], exit score of the newest token

Not handled (a Refusal): caches that are not written by ``index_copy_`` at counted positions (dynamic caches, full
sliding windows), blocks that hand on more than a hidden state, sizes that are symbols.
"""

from __future__ import annotations

import hashlib
import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from river_compile.passes.attention import simplify_attention
from river_compile.passes.nodes import (
    ENTER_AUTOCAST,
    ancestors,
    called,
    is_parameter,
    is_tensor,
    mutated_inputs,
    rank,
    read_by,
    value_of,
)
from river_compile.passes.pipeline import Pass, each_block
from river_compile.passes.program import Block, Refusal, RiverProgram, Segment
from river_compile.passes.segments import graph_lines, subgraph

_EXAMPLE = 5  # tokens of the example inputs; their number is a symbol


class OverTokens:
    """The graph of one token as a function of tensors that have one dimension more in front, where `mapped` says so."""

    __name__ = __qualname__ = "over_tokens"

    def __init__(self, graph_module: fx.GraphModule, mapped: Sequence[bool]) -> None:
        self._function = torch.vmap(graph_module, tuple(0 if m else None for m in mapped))
        lines = [repr(mapped), *graph_lines(graph_module.graph)]
        # Equal for graphs that compute the same, so that they are compiled once.
        self._digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self._function(*inputs)

    def __repr__(self) -> str:
        return f"over_tokens({self._digest})"


def token_counts(counter: Tensor, hidden: Tensor) -> Tensor:
    """Returns what the counter of filled slots was for each token ``[m]``, from its value for the newest."""
    tokens = hidden.shape[0]
    return counter + torch.arange(1 - tokens, 1, device=counter.device)


def write_entries(cache: Tensor, axis: int, positions: Tensor, entries: Tensor) -> None:
    """Writes the entries ``[m, ...]``, each of length one along the cache's axis, to positions ``[m, 1]``."""
    cache.index_copy_(axis, positions.reshape(-1), entries.squeeze(axis + 1).movedim(0, axis))


def joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Does what ``torch.cat`` does, whose rule for ``vmap`` would take the number of tokens for a constant."""
    sizes = [part.shape[dim] for part in parts]
    if len(set(sizes)) == 1:
        dim %= parts[0].dim()
        return torch.stack(tuple(parts), dim).flatten(dim, dim + 1)
    shape = list(parts[0].shape)
    shape[dim] = sum(sizes)
    whole = parts[0].new_empty(shape)
    for part, end in zip(parts, itertools.accumulate(sizes), strict=True):
        whole.narrow(dim, end - part.shape[dim], part.shape[dim]).copy_(part)
    return whole


def catch_up(candidates: tuple[int, ...]) -> Pass:
    """Makes the pass that adds each block for several tokens at once, with an exit score at the candidate depths."""

    def catch_up(program: RiverProgram) -> RiverProgram | Refusal:
        """Each block comes a second time, for several tokens at once."""
        extra = each_block(program, lambda s, block: _over_tokens(s, block, s.depth in candidates))
        return extra if isinstance(extra, Refusal) else replace(program, extra=extra)

    return catch_up


def _over_tokens(segment: Segment, block: Block, scored: bool) -> Segment | Refusal:
    """Returns a decode block as a segment with the block's inputs and outputs, for several tokens.

    Those of :func:`per_token` have one dimension more, in front. `scored`: the newest token's exit score follows.
    """
    simplify_attention(segment.graph)  # (the fused operator would run the tokens one by one)
    refusal = _obstacle(segment, block)
    if refusal is not None:
        return refusal
    tokens = _Tokens(segment, block)
    operations = [n for n in segment.graph.nodes if n.op not in ("placeholder", "output")]
    writes = [n for n in operations if called(n, Tensor.index_copy_)]
    advances = [n for n in operations if not tokens.counters.isdisjoint(mutated_inputs(n))]
    slots = [a for write in writes for a in write.args[2:4]]  # of each write the position and the entry
    before = ancestors(slots)
    after = [n for n in operations if n not in before and n not in writes and n not in advances]
    crossing = [n for n in operations if n in before and not set(after).isdisjoint(n.users)]

    tokens.map([n for n in operations if n in before], list(dict.fromkeys([*slots, *crossing])))
    for write in writes:
        cache, axis, position, entry = write.args
        tokens.call(write_entries, tokens.inputs[cache], axis, tokens.here[position], tokens.here[entry])
        tokens.here[write] = tokens.inputs[cache]
        tokens.shared.add(write)
    for node in advances:  # (once for all tokens)
        tokens.call(Tensor.add_, tokens.inputs[node.args[0]], *node.args[1:])
    result = segment.node_of(block.hidden_out)
    tokens.map(after, [result])
    outputs = [tokens.here[result]]
    if scored:
        newest = [tokens.call(torch.select, n, 0, -1) for n in (tokens.here[result], tokens.hidden)]
        outputs.append(tokens.call(torch.ops.river.exit_score.default, *newest))
    tokens.graph.output(tuple(outputs))
    return replace(segment, kind="catch_up", graph=tokens.graph, has_score=scored)


def per_token(segment: Segment, block: Block) -> tuple[fx.Node, ...]:
    """Returns the inputs of a block's segment that differ from token to token (counters are computed inside)."""
    return tuple(n for n in segment.inputs if _is_mapped(n, block) and n not in block.kv.lengths)


def _is_mapped(value: fx.Node, block: Block) -> bool:
    return not is_parameter(value) and value not in {m for write in block.kv.writes for m in mutated_inputs(write)}


def _obstacle(segment: Segment, block: Block) -> Refusal | None:
    if block.kv.capacity is None or any(not called(write, Tensor.index_copy_) for write in block.kv.writes):
        return Refusal(
            'its KV cache is not a static one that is filled from the front (cache_implementation="static" gives one)',
            block.path,
        )
    if segment.outputs != (block.hidden_out,):
        return Refusal("it hands on more than its hidden state", block.path)
    if segment.graph.find_nodes(op="call_function", target=ENTER_AUTOCAST):
        return Refusal("it changes autocast inside", block.path)
    for node in segment.origins:
        if not is_tensor(node) or not all(isinstance(n, int) for n in value_of(node).shape):
            return Refusal("a size is not fixed", f"{block.path}, {node.name}")
    written = {m: node for node in segment.graph.nodes for m in mutated_inputs(node)}
    for target, node in written.items():
        late = [n for n in target.users if n > node]
        if target.op == "placeholder" and rank(target) != 4 and late:
            return Refusal("it reads a counter after advancing it", f"{block.path}, {late[0].name}")
    return None


class _Tokens:
    """The graph over tokens while it is built out of the nodes of a block's graph.

    `inputs` (placeholders alone) and `here` (all nodes) give for a node of the block's graph what stands for it in the
    new one. `shared` are its nodes that are the same for all tokens, `counters` the placeholders that count slots.
    """

    def __init__(self, segment: Segment, block: Block) -> None:
        self.graph = fx.Graph(owning_module=segment.graph.owning_module)
        origins = segment.origins
        self.inputs = {n: self.graph.placeholder(n.name) for n in origins}
        self.hidden = self.inputs[segment.node_of(block.hidden_in)]
        self.here = dict(self.inputs)
        self.shared = {n for n, value in origins.items() if not _is_mapped(value, block)}
        self.counters = {n for n, value in origins.items() if value in block.kv.lengths}
        for node in self.counters:
            self.here[node] = self.call(token_counts, self.inputs[node], self.hidden)
        _set_examples(self.inputs, self.shared | self.counters)

    def call(self, function: Callable, *arguments: object) -> fx.Node:
        return self.graph.call_function(function, arguments)

    def map(self, nodes: list[fx.Node], results: list[fx.Node]) -> None:
        """Adds nodes as one call over all tokens that returns these results."""
        inputs = read_by(nodes)
        inner = subgraph(self.graph.owning_module, nodes, inputs, results)
        for node in inner.find_nodes(op="call_function", target=torch.cat):
            node.target = joined
        module = fx.GraphModule(self.graph.owning_module, inner, class_name="OverTokens")
        outputs = self.call(OverTokens(module, [n not in self.shared for n in inputs]), *(self.here[n] for n in inputs))
        for i, node in enumerate(results):
            self.here[node] = self.call(operator.getitem, outputs, i)


def _set_examples(new: dict[fx.Node, fx.Node], fixed: set[fx.Node]) -> None:
    """Gives the new placeholders example values whose number of tokens is a symbol (so not in Dynamo's mode)."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    sizes = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    tokens = mode.from_tensor(torch.empty(_EXAMPLE), symbolic_context=sizes, source=ConstantSource("tokens")).shape[0]
    with mode:
        for node, placeholder in new.items():
            value = value_of(node)
            if node in fixed:
                example = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
            else:
                example = torch.empty((tokens, *value.shape), dtype=value.dtype, device=value.device)
            placeholder.meta["example_value"] = example
