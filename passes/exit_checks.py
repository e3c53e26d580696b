"""Adds the numbers that decide exits to segments, each after the segment's other outputs.

A block's is the cosine between its input and output on the residual stream ("state transition similarity", Shen and
Zou, River-LLM, arXiv 2604.18396), least over rows and tokens. A head's is the entropy of the next token's distribution,
largest over rows. Not handled here: thresholds, which whoever runs the program compares with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import fx

from river_compile.kernels import ops  # noqa: F401  (registers river::exit_score)
from river_compile.kernels.portable import largest_entropy
from river_compile.passes.nodes import is_hidden, value_of
from river_compile.passes.pipeline import Pass
from river_compile.passes.program import RiverProgram, Segment


def exit_checks(candidates: tuple[int, ...]) -> Pass:
    """Makes the pass after which the blocks of these depths return a float32 exit score."""

    def exit_checks(program: RiverProgram) -> RiverProgram:
        """Blocks return their similarity after each candidate depth."""
        exit_score = torch.ops.river.exit_score.default
        blocks = tuple(
            _with_score(segment, exit_score, block.hidden_out, block.hidden_in)
            if segment.depth in candidates
            else segment
            for segment, block in zip(program.blocks, program.plan.blocks, strict=True)
        )
        return replace(program, blocks=blocks, candidates=candidates)

    return exit_checks


def logits_entropy(program: RiverProgram) -> RiverProgram:
    """Heads return the entropy of their logits; those of a model that returns no logits stay as they are."""
    logits = logits_of(program)
    if logits is None:
        return program
    river_head = program.river_head and _with_score(program.river_head, largest_entropy, logits)
    return replace(program, head=_with_score(program.head, largest_entropy, logits), river_head=river_head)


def logits_of(program: RiverProgram) -> fx.Node | None:
    """Returns the logits ``[B, T, V]`` among the values that the graph returns, None for a model without a head.

    They are the last three-dimensional output after the blocks that is not as wide as the hidden state.
    """
    plan = program.plan
    width = value_of(plan.blocks[-1].hidden_out).shape[-1]
    found = [
        node
        for node in program.returned
        if plan.part_of.get(node) == plan.num_blocks + 1 and is_hidden(node) and value_of(node).shape[-1] != width
    ]
    return found[-1] if found else None


def _with_score(segment: Segment, function: Callable, *values: fx.Node) -> Segment:
    """Returns the segment with one output more: the function of some of its inputs and outputs."""
    scored = replace(segment.copy(), has_score=True)
    output = scored.graph.output_node()
    with scored.graph.inserting_before(output):
        score = scored.graph.call_function(function, tuple(map(scored.node_of, values)))
    output.args = ((*output.args[0], score),)
    return scored
