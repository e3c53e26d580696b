"""Adds the exit check to a block: how much the block still changes the hidden state.

The check is the node ``river::exit_score``: the cosine between the block's input and output on the residual stream
("state transition similarity", Shen and Zou, River-LLM, arXiv 2604.18396), least over rows and tokens. The segment
returns it after its other outputs; whoever runs the program compares it with the threshold.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from river_compile.kernels import ops  # noqa: F401  (registers river::exit_score)

from .types import Block, Segment


def candidate_depths(num_blocks: int, first_exit: int, exit_every: int) -> tuple[int, ...]:
    """Returns the depths after which a token may leave: first_exit, then every exit_every blocks, below num_blocks.

    Depth 0 (before any block) has nothing to compare and is no candidate.
    """
    return tuple(range(max(first_exit, 1), num_blocks, exit_every))


def add_exit_check(segment: Segment, block: Block) -> Segment:
    """Returns the block's segment with a float32 score behind its outputs (its graph is changed)."""
    graph = segment.graph_module.graph
    output = next(n for n in graph.nodes if n.op == "output")
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    previous = placeholders[segment.inputs.index(block.hidden_in)]
    hidden = output.args[0][segment.outputs.index(block.hidden_out)]
    with graph.inserting_before(output):
        score = graph.call_function(torch.ops.river.exit_score.default, (hidden, previous))
    output.args = ((*output.args[0], score),)
    segment.graph_module.recompile()
    return replace(segment, has_score=True)
