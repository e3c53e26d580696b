"""Changes of the river's head, for tokens that left early: fewer logits, and exact ones among the largest.

*Draft vocabulary*: a draft needs no token that hardly ever comes. A list of blocks of logits becomes an input of the
head's 4-bit matmul (`wanted` of `river::linear`), and each step says which blocks are on it.

*Reranking*: a 4-bit matrix says which logits are large; those are computed anew from their rows of the 16-bit matrix.

Not handled: a head that is no plain linear layer, or whose matrix has another dtype than its input (tokens that left
use the backbone's); a draft vocabulary for a head of several matmuls, or whose logits come from several ranks.
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


def _change_head(program: RiverProgram, rule: str, change: Callable[[Segment], Segment], fallback: str) -> RiverProgram:
    """Returns the program with a river head that `change` made of a copy; notes what `otherwise` is where it misses.

    Programs whose river head has no packed matmul stay as they are.
    """
    head = program.river_head
    if head is None or not head.packed:
        return program
    missed = where = ""
    try:
        head = change(head.copy())
    except NoMatch as miss:
        missed = f"{miss.reason}; {fallback}"
        where = "" if miss.node is None else source_of(miss.node)
    fusion = Fusion(rule, head.name, missed, where)
    return replace(program, river_head=head, fusions=(*program.fusions, fusion))


def _head_linear(head: Segment) -> fx.Node:
    """Returns the one matmul of a head; raises `NoMatch` where it has none or several."""
    matmuls = [node for node in head.graph.nodes if called(node, torch.ops.river.linear.default)]
    require(len(matmuls) == len(head.packed) == 1, f"it has {len(matmuls)} matmuls in 4 bits")
    return matmuls[0]


def draft_vocab(program: RiverProgram) -> RiverProgram:
    """The matmul of the river's head takes a list of the blocks of logits that are wanted."""
    logits = find_logits(program)
    rule, fallback = "head + list of wanted logits", "drafts compute all logits"
    return _change_head(program, rule, lambda head: _with_list(head, logits), fallback)


def _with_list(head: Segment, logits: fx.Node | None) -> Segment:
    matmul = _head_linear(head)
    plain = matmul.kwargs.get("residual") is None and not matmul.kwargs.get("gated", False)
    all_of_them = logits is not None and shape(logits)[-1] == matmul.args[4]
    require(plain and all_of_them, "the matmul's outputs are not the logits", matmul)
    (wanted,) = add_placeholders(head.graph, ["wanted"])
    matmul.kwargs = {**matmul.kwargs, "wanted": wanted}
    return replace(head, chooses_logits=True)


_NORM = {"norm": "none", "norm_weight": None, "norm_bias": None, "eps": 1e-6}


def rescored_head(program: RiverProgram) -> RiverProgram:
    """The largest logits of tokens that left are computed anew from the head's 16-bit matrix."""
    rule, fallback = "head + largest logits anew", "the head stays in 16 bits"
    return _change_head(program, rule, lambda head: _rescored(head, program.inputs), fallback)


def _rescored(head: Segment, inputs: Sequence[fx.Node]) -> Segment:
    matmul, site = _head_linear(head), head.packed[0]
    head, weight = _with_input(head, inputs[site.weights[0]])
    fits = is_ordinary(value_of(weight)) and value_of(weight).is_contiguous() and not site.transposed
    fits = fits and not site.scales_inputs and same_dtype(matmul.args[0], weight) and same_dtype(matmul, weight)
    require(fits, "its matrix is not an ordinary parameter of the activations' dtype", matmul)
    norm = [matmul.kwargs.get(name, default) for name, default in _NORM.items()]
    with head.graph.inserting_after(matmul):
        arguments = (matmul, matmul.args[0], weight, matmul.args[3], *norm)
        anew = call(torch.ops.river.rescore.default, arguments, value_of(matmul), matmul)
    matmul.replace_all_uses_with(anew, delete_user_cb=lambda user: user is not anew)
    return head


def _with_input(head: Segment, source: fx.Node) -> tuple[Segment, fx.Node]:
    """Returns a segment that takes one more input of the graph, and the placeholder of it."""
    placeholders = head.graph.find_nodes(op="placeholder")
    if source in head.inputs:
        return head, placeholders[head.inputs.index(source)]
    with head.graph.inserting_before(placeholders[len(head.inputs)]):
        weight = head.graph.placeholder("head_weight")
    weight.meta["example_value"] = value_of(source)
    return replace(head, inputs=(*head.inputs, source)), weight


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
    logits = find_logits(program)
    if logits is None:
        return program
    river_head = program.river_head and _with_score(program.river_head, largest_entropy, logits)
    return replace(program, head=_with_score(program.head, largest_entropy, logits), river_head=river_head)


def find_logits(program: RiverProgram) -> fx.Node | None:
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
