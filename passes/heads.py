"""Adds exit scores to blocks and heads, and a draft vocabulary and 16-bit reranking to the 4-bit head.

Not handled: a head that is not one linear layer or whose weight has another dtype than its input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import fx

from river_compile.kernels import ops  # noqa: F401  (registers river::rescore)
from river_compile.kernels.portable import largest_entropy
from river_compile.passes.edits import NoMatch, Pass, add_placeholders, call, require
from river_compile.passes.nodes import called, is_hidden, is_ordinary, same_dtype, shape, source_of, value_of
from river_compile.passes.program import Fusion, RiverProgram, Segment

_NORM = {"norm": "none", "norm_weight": None, "norm_bias": None, "eps": 1e-6}


def exit_checks(candidates: tuple[int, ...]) -> Pass:
    """Make the pass that adds a float32 exit score to the blocks of these depths."""

    def exit_checks(program: RiverProgram) -> RiverProgram:
        """Layers at candidate depths return the similarity of their input and output."""
        # The cosine on the residual stream ("state transition similarity", Shen and Zou, River-LLM, arXiv 2604.18396),
        # the minimum over rows and tokens.
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
    """Heads that return logits return the entropy of the next token too, the maximum over rows."""
    logits = find_logits(program)
    if logits is None:
        return program
    twin_head = program.twin_head and _with_score(program.twin_head, largest_entropy, logits)
    return replace(program, head=_with_score(program.head, largest_entropy, logits), twin_head=twin_head)


def vocab_blocks(program: RiverProgram) -> RiverProgram:
    """The 4-bit head takes a list of blocks of logits to compute."""
    # A draft vocabulary: each step leaves out blocks of tokens that are rare.
    logits = find_logits(program)
    rule, fallback = "head + list of vocabulary blocks", "drafts compute all logits"
    return _change_head(program, rule, lambda head: _with_list(head, logits), fallback)


def rescored_head(program: RiverProgram) -> RiverProgram:
    """The 4-bit head recomputes its largest logits from the 16-bit weight."""
    rule, fallback = "head + largest logits recomputed", "the head stays in 16 bits"
    return _change_head(program, rule, lambda head: _rescored(head, program.inputs), fallback)


def find_logits(program: RiverProgram) -> fx.Node | None:
    """Return the graph's last output ``[B, T, V]`` after the blocks that is not as wide as the hidden state."""
    plan = program.plan
    width = value_of(plan.blocks[-1].hidden_out).shape[-1]
    found = [
        node
        for node in program.returned
        if plan.part_of.get(node) == plan.num_blocks + 1 and is_hidden(node) and value_of(node).shape[-1] != width
    ]
    return found[-1] if found else None


def _with_score(segment: Segment, function: Callable, *values: fx.Node) -> Segment:
    """Append an output: a function of some of the segment's inputs and outputs."""
    scored = replace(segment.copy(), has_score=True)
    output = scored.graph.output_node()
    with scored.graph.inserting_before(output):
        score = scored.graph.call_function(function, tuple(map(scored.node_of, values)))
    output.args = ((*output.args[0], score),)
    return scored


def _change_head(program: RiverProgram, rule: str, change: Callable[[Segment], Segment], fallback: str) -> RiverProgram:
    """Apply `change` to a copy of the 4-bit head, if there is one, and record the outcome."""
    head = program.twin_head
    if head is None or not head.packed:
        return program
    missed = where = ""
    try:
        head = change(head.copy())
    except NoMatch as miss:
        missed = f"{miss.reason}; {fallback}"
        where = "" if miss.node is None else source_of(miss.node)
    fusion = Fusion(rule, head.name, missed, where)
    return replace(program, twin_head=head, fusions=(*program.fusions, fusion))


def _with_list(head: Segment, logits: fx.Node | None) -> Segment:
    matmul = _head_linear(head)
    plain = matmul.kwargs.get("residual") is None and not matmul.kwargs.get("gated", False)
    all_of_them = logits is not None and shape(logits)[-1] == matmul.args[4]
    require(plain and all_of_them, "the outputs of its matmul are not the logits", matmul)
    (listed,) = add_placeholders(head.graph, ["vocab_blocks"])
    matmul.kwargs = {**matmul.kwargs, "vocab_blocks": listed}
    return replace(head, takes_vocab_blocks=True)


def _rescored(head: Segment, inputs: Sequence[fx.Node]) -> Segment:
    matmul, packed = _head_linear(head), head.packed[0]
    head, weight = _with_input(head, inputs[packed.weights[0]])
    plain = is_ordinary(value_of(weight)) and value_of(weight).is_contiguous() and not packed.transposed
    plain = plain and not packed.scales_inputs and same_dtype(matmul.args[0], weight) and same_dtype(matmul, weight)
    require(plain, "its weight is not an ordinary parameter of the activations' dtype", matmul)
    norm = [matmul.kwargs.get(name, default) for name, default in _NORM.items()]
    with head.graph.inserting_after(matmul):
        arguments = (matmul, matmul.args[0], weight, matmul.args[3], *norm)
        rescored = call(torch.ops.river.rescore.default, arguments, value_of(matmul), matmul)
    matmul.replace_all_uses_with(rescored, delete_user_cb=lambda user: user is not rescored)
    return head


def _head_linear(head: Segment) -> fx.Node:
    matmuls = [node for node in head.graph.nodes if called(node, torch.ops.river.linear.default)]
    require(len(matmuls) == len(head.packed) == 1, f"it has {len(matmuls)} 4-bit matmuls")
    return matmuls[0]


def _with_input(head: Segment, source: fx.Node) -> tuple[Segment, fx.Node]:
    """Return the segment with `source` among its inputs, and the placeholder of that."""
    placeholders = head.graph.find_nodes(op="placeholder")
    if source in head.inputs:
        return head, placeholders[head.inputs.index(source)]
    with head.graph.inserting_before(placeholders[len(head.inputs)]):
        weight = head.graph.placeholder("head_weight")
    weight.meta["example_value"] = value_of(source)
    return replace(head, inputs=(*head.inputs, source)), weight
