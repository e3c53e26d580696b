"""Adds numbers that decide exits to segments: a block's similarity, and the entropy of a head's logits.

A block's check is the node ``river::exit_score``: the cosine between the block's input and output on the residual
stream ("state transition similarity", Shen and Zou, River-LLM, arXiv 2604.18396), least over rows and tokens. A head's
is the entropy of the next token's distribution, largest over rows. A segment returns its number after its other
outputs; whoever runs the program compares it with the threshold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import fx

from river_compile.kernels import ops  # noqa: F401  (registers river::exit_score)
from river_compile.kernels.entropy import largest_entropy

from .nodes import is_tensor, value_of
from .program import Block, DecoderPlan, Segment


def candidate_depths(end: int, first_exit: int, exit_every: int) -> tuple[int, ...]:
    """Returns the depths after which a token may leave: first_exit, then every exit_every blocks, below `end`.

    Depth 0 (before any block) has nothing to compare and is no candidate.
    """
    return tuple(range(max(first_exit, 1), end, exit_every))


def add_exit_check(segment: Segment, block: Block) -> Segment:
    """Returns the block's segment with a float32 score behind its outputs (its graph is changed)."""
    placeholders = [n for n in segment.graph_module.graph.nodes if n.op == "placeholder"]
    previous = placeholders[segment.inputs.index(block.hidden_in)]
    hidden = _output(segment, block.hidden_out)
    return _with_score(segment, torch.ops.river.exit_score.default, (hidden, previous))


def logits_of(plan: DecoderPlan, returned: tuple[fx.Node, ...]) -> fx.Node | None:
    """Returns the logits ``[B, T, V]`` among the values that the graph returns, None for a model without a head.

    They are the last three-dimensional output behind the blocks that is not as wide as the hidden state.
    """
    width = value_of(plan.blocks[-1].hidden_out).shape[-1]
    found = [
        node
        for node in returned
        if plan.part_of.get(node) == plan.num_blocks + 1
        and is_tensor(node)
        and value_of(node).dim() == 3
        and value_of(node).is_floating_point()
        and value_of(node).shape[-1] != width
    ]
    return found[-1] if found else None


def add_entropy(head: Segment, logits: fx.Node) -> Segment:
    """Returns a head's segment with the entropy of its logits behind its outputs (its graph is changed)."""
    return _with_score(head, largest_entropy, (_output(head, logits),))


def _output(segment: Segment, value: fx.Node) -> fx.Node:
    """Returns the node of the segment's own graph that computes one of its outputs."""
    output = next(n for n in segment.graph_module.graph.nodes if n.op == "output")
    return output.args[0][segment.outputs.index(value)]


def _with_score(segment: Segment, function: Callable, arguments: tuple[fx.Node, ...]) -> Segment:
    graph = segment.graph_module.graph
    output = next(n for n in graph.nodes if n.op == "output")
    with graph.inserting_before(output):
        score = graph.call_function(function, arguments)
    output.args = ((*output.args[0], score),)
    segment.graph_module.recompile()
    return replace(segment, has_score=True)
