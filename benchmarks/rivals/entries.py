"""Cuts what other repairs of missing KV entries run, out of a block: the river's rivals, for comparison.

piece             is the block                                         writes
_only_entries     without what only its hidden state needs             keys and values of the hidden state that left
_empty_entries    the same, without norm and projections               zeros: the slot is taken, counters advance
_with_presence    with one input more, which entries are there         what the block writes

The first two hand their hidden state on as it came. Not handled (a Refusal): hidden states of several streams, keys and
values of another form than ``[B, H, T, D]``, and attention that is neither ``scaled_dot_product_attention`` nor a
softmax over the keys.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from river_compile.passes.edits import add_placeholders
from river_compile.passes.nodes import as_sdpa, called, closure, is_parameter, memory_of, mutated_inputs, rank, value_of
from river_compile.passes.pipeline import Pass, each_block
from river_compile.passes.program import Block, Refusal, RiverProgram, Segment


def kv_entries(empty: bool) -> Pass:
    """Makes the pass that puts the part of each block which writes its KV entries in its twin's place."""

    def kv_entries(program: RiverProgram) -> RiverProgram | Refusal:
        """A token that left fills the KV cache and runs nothing else of the later blocks."""
        if rank(program.plan.blocks[0].hidden_in) != 3:
            return Refusal("the hidden state consists of several streams", program.plan.blocks[0].path)
        twins = each_block(program, _empty_entries if empty else _only_entries)
        return twins if isinstance(twins, Refusal) else replace(program, twins=twins)

    return kv_entries


def presence_masks(program: RiverProgram) -> RiverProgram | Refusal:
    """Blocks attend only to KV entries that are there."""
    blocks = each_block(program, _with_presence)
    if isinstance(blocks, Refusal):
        return blocks
    return replace(program, blocks=blocks, added_inputs=tuple(block.inputs[-1] for block in blocks))


def _only_entries(segment: Segment, block: Block) -> Segment:
    """Returns the part of a block that writes its KV entries; its hidden state passes through unchanged."""
    output, hidden = segment.graph.output_node(), segment.node_of(block.hidden_in)
    pairs = zip(segment.outputs, output.args[0], strict=True)
    output.args = (tuple(hidden if of is block.hidden_out else node for of, node in pairs),)
    return replace(_without_dead_code(segment), kind="entries")


def _empty_entries(segment: Segment, block: Block) -> Segment | Refusal:
    """Returns the part of a block that takes a KV slot and leaves zeros in it."""
    segment = _only_entries(segment, block)
    graph = segment.graph
    hidden = segment.node_of(block.hidden_in)
    placeholders = graph.find_nodes(op="placeholder")
    cached = _downstream(n for n in placeholders if rank(n) == 4 and not is_parameter(n))
    new = _downstream([hidden]) - cached
    for node in [n for n in graph.nodes if n in cached]:
        for entry in [a for a in node.all_input_nodes if a in new]:
            if rank(entry) != 4:
                return Refusal("new keys and values are not [batch, heads, tokens, features]", entry.name)
            with graph.inserting_before(node):
                node.replace_input_with(entry, _zeros_like_entry(graph, hidden, entry))
    return _without_dead_code(segment)


def _zeros_like_entry(graph: fx.Graph, hidden: fx.Node, entry: fx.Node) -> fx.Node:
    """Adds zeros of a key's shape ``[B, H, T, D]``; B and T come from the hidden state, since they may be symbols."""
    value = value_of(entry)
    one = graph.call_function(torch.narrow, (hidden, -1, 0, 1))
    zeros = graph.call_function(torch.zeros_like, (one,), {"dtype": value.dtype})
    heads = graph.call_function(torch.unsqueeze, (zeros, 1))
    return graph.call_function(torch.Tensor.expand, (heads, (-1, value.shape[1], -1, value.shape[3])))


def _with_presence(segment: Segment, block: Block) -> Segment | Refusal:
    """Makes a block's attention look only at entries that are there.

    The segment gets one more input, the last one: boolean ``[S]`` over the keys that the attention reads, True for an
    entry that is there.
    """
    graph = segment.graph
    attention = [node for node in graph.nodes if _num_keys(node) is not None]
    if not attention:
        return Refusal("no attention whose mask could hide missing entries", segment.name)
    name = f"present_{segment.depth}"
    (placeholder,) = add_placeholders(graph, [name])
    like = value_of(block.hidden_in)
    with like.fake_mode:
        value = torch.ones(_num_keys(attention[0]), dtype=torch.bool, device=like.device)
    present = fx.Graph().placeholder(name)  # (in no graph that anybody runs: a name for the value)
    placeholder.meta["example_value"] = present.meta["example_value"] = value
    for node in attention:
        _hide_missing(graph, node, placeholder)
    return replace(segment, inputs=(*segment.inputs, present))


def _num_keys(node: fx.Node) -> Any:
    """Returns how many keys (an int or a SymInt) an attention or a softmax ranges over, None for other nodes."""
    attention = as_sdpa(node)
    if attention is not None:
        return value_of(attention.k).shape[2]
    return value_of(node).shape[-1] if called(node, torch.softmax) and rank(node) == 4 else None


def _hide_missing(graph: fx.Graph, node: fx.Node, present: fx.Node) -> None:
    """Adds `present` to an attention's mask, or puts -inf into the scores ``[B, H, T, S]`` that a softmax reads."""
    place = 0 if called(node, torch.softmax) else 3
    scores = node.args[place]
    with graph.inserting_before(node):
        if scores is None:
            new = graph.call_function(torch.Tensor.expand, (present, (1, 1, 1, -1)))
        elif value_of(scores).dtype == torch.bool:
            new = graph.call_function(torch.logical_and, (scores, present))
        else:
            missing = graph.call_function(torch.logical_not, (present,))
            new = graph.call_function(torch.masked_fill, (scores, missing, -torch.inf))
    node.update_arg(place, new)


def _without_dead_code(segment: Segment) -> Segment:
    """Drops what neither an output nor the caller's memory depends on, and the inputs that only this read."""
    graph = segment.graph
    source_of = segment.origins
    live: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):
        writes = any((memory := memory_of(m)).op == "placeholder" or memory in live for m in mutated_inputs(node))
        if node.op == "output" or node in live or writes:
            live.update({node, *node.all_input_nodes, *map(memory_of, node.all_input_nodes)})
    for node in reversed(list(graph.nodes)):
        size = node.op == "placeholder" and rank(node) is None  # the shapes of others may need it
        if node not in live and not size:
            graph.erase_node(node)
    return replace(segment, inputs=tuple(source_of[n] for n in graph.nodes if n in source_of))


def _downstream(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    return closure(nodes, lambda node: (user for user in node.users if user.op != "output"))
