"""Runs the passes in order: a traced graph in, a RiverProgram or a Refusal out.

pass             from                    to
decoder_layers   traced graph            DecoderPlan: prologue, blocks, KV slots, head
segments         DecoderPlan             one segment per part
exit_checks      block segments          blocks that return an exit score, after each candidate
                 heads                   heads that return the entropy of their logits (on request)
river_twins      copies of the blocks    twins with 4-bit matrix products and swap_ops' operators
fills            copies of the blocks    what another fill runs in the twins' place; masks in front of attention
over_tokens      copies of the blocks    blocks for several tokens at once (for a fill that runs skipped blocks later)
fused_twins      twins, head, checks     operators of the generated kernels in place of what they compute (on request)
swap_ops         all but twins           operators whose rows do not depend on the pass's width (on request)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import fx

from river_compile.passes.fills.entries import empty_entries, only_entries, with_presence
from river_compile.passes.fills.over_tokens import over_tokens
from river_compile.passes.fusion.fuse import fuse_checks, fuse_twins

from .decoder import find_decoder
from .exit_checks import add_entropy, add_exit_check, candidate_depths, logits_of
from .program import DecoderPlan, KeptLinear, Refusal, RiverProgram, Segment
from .segments import cut, output_values
from .swap_ops import keep_rows, simplify_attention, simplify_linears
from .twins import make_twin

log = logging.getLogger("river_compile.passes")
T = TypeVar("T")


@dataclass(frozen=True)
class RewriteOptions:
    """What the passes need to know.

    Attributes:
        exits: False where no token of this graph can leave: no checks and no twins are made.
        checks: False leaves the exit checks out, for a fixed exit depth.
        first_exit: smallest depth with a check, in blocks executed.
        exit_every: distance between depths with a check.
        quantize: False keeps the twins' matrices as they are: each twin computes what its block computes.
        group_size: requested group size of the 4-bit weights.
        layout: name of their packing.
        fuse: True puts the generated kernels' operators into what runs with 4-bit weights.
        scale_inputs: True lets the packing scale the inputs of the 4-bit products where that costs nothing.
        quantize_head: True makes a second head with a 4-bit matrix.
        same_rows: True gives several tokens at once the bits of one token at a time.
        entropy: True makes the heads return the entropy of their logits; a model that returns none stays without.
        deepest: depth at which every token leaves without being asked; None: the last block.
        tail: what a token that left runs for each block behind its exit: "twins", "entries" (its KV entries from the
            hidden state that left) or "empty" (entries of zeros).
        presence: True masks missing KV entries out of the blocks' attention.
        catch_up: True makes blocks for several tokens at once.
    """

    exits: bool
    checks: bool
    first_exit: int
    exit_every: int
    quantize: bool
    group_size: int
    layout: str
    scale_inputs: bool = False
    quantize_head: bool = False
    same_rows: bool = False
    entropy: bool = False
    deepest: int | None = None
    tail: str = "twins"
    presence: bool = False
    catch_up: bool = False
    fuse: bool = False


def rewrite(
    graph_module: fx.GraphModule, options_for: Callable[[DecoderPlan], RewriteOptions]
) -> RiverProgram | Refusal:
    """Rewrites a decoder's graph; the graph given stays untouched.

    Args:
        graph_module: what Dynamo traced.
        options_for: chooses the options once it is known what the graph is.
    """
    table = _PassTable(len(graph_module.graph.nodes))
    plan = table.run("decoder_layers", lambda: find_decoder(graph_module))
    if isinstance(plan, Refusal):
        return plan
    returned = output_values(plan)
    if isinstance(returned, Refusal):
        return returned
    options = options_for(plan)
    prologue, blocks, head = table.run("segments", lambda: _segments(plan))
    if options.same_rows:
        grown = plan.blocks[0].kv.kind == "dynamic"
        for segment in (prologue, *blocks, head):
            keep_rows(segment.graph_module.graph, grown)
    presence: tuple[fx.Node, ...] = ()
    if options.exits and options.presence:
        masked = table.run("presence", lambda: _with_presence(blocks))
        if isinstance(masked, Refusal):
            return masked
        blocks, presence = masked
    candidates: tuple[int, ...] = ()
    if options.exits and options.checks:
        end = plan.num_blocks if options.deepest is None else options.deepest
        candidates = candidate_depths(end, options.first_exit, options.exit_every)
        blocks = table.run("exit_checks", lambda: _with_checks(plan, blocks, candidates))
    catch_up: tuple[Segment, ...] = ()
    if options.exits and options.catch_up:
        catch_up = table.run("over_tokens", lambda: _over_tokens(plan, candidates))
        if isinstance(catch_up, Refusal):
            return catch_up
    name = "river_twins" if options.tail == "twins" else "fills"
    tail = table.run(name, lambda: _tail(plan, returned, options, {}))
    if isinstance(tail, Refusal):
        return tail
    twins, river_head, kept = tail
    head = _with_entropy(head, plan, returned, options)
    program = RiverProgram(
        plan, returned, prologue, blocks, twins, head, river_head, candidates, kept, presence, catch_up
    )
    if options.fuse and twins:
        program = table.run("fused_twins", lambda: fuse_twins(fuse_checks(program)))
    table.log()
    return program


def keep_linears(program: RiverProgram, options: RewriteOptions, keep: Mapping[str, str]) -> RiverProgram:
    """Makes the twins anew, with some of their products in 16 bits.

    Args:
        program: what `rewrite` returned.
        options: those that it was made with.
        keep: names of 4-bit products (`LinearSite.name`), each with the reason.
    """
    twins, river_head, kept = _tail(program.plan, program.returned, options, keep)
    checks = tuple(fusion for fusion in program.fusions if fusion.segment.startswith("block"))
    program = replace(program, twins=twins, river_head=river_head, kept=kept, fusions=checks)
    return fuse_twins(program) if options.fuse and twins else program


def _segments(plan: DecoderPlan) -> tuple[Segment, tuple[Segment, ...], Segment]:
    prologue = cut(plan, 0, "prologue")
    blocks = tuple(cut(plan, depth, "block") for depth in range(1, plan.num_blocks + 1))
    return prologue, blocks, cut(plan, plan.num_blocks + 1, "head")


def _with_checks(plan: DecoderPlan, blocks: tuple[Segment, ...], candidates: tuple[int, ...]) -> tuple[Segment, ...]:
    return tuple(
        add_exit_check(segment, block) if depth in candidates else segment
        for depth, (segment, block) in enumerate(zip(blocks, plan.blocks, strict=True), start=1)
    )


def _with_presence(blocks: tuple[Segment, ...]) -> tuple[tuple[Segment, ...], tuple[fx.Node, ...]] | Refusal:
    made = [with_presence(segment, f"present_{depth}") for depth, segment in enumerate(blocks, start=1)]
    refusal = _first_refusal(made)
    return refusal or (tuple(segment for segment, _ in made), tuple(present for _, present in made))


def _over_tokens(plan: DecoderPlan, candidates: tuple[int, ...]) -> tuple[Segment, ...] | Refusal:
    def make(depth: int) -> Segment | Refusal:
        segment = cut(plan, depth, "block")
        simplify_attention(segment.graph_module.graph)  # (the fused operator would run the tokens one by one)
        return over_tokens(segment, plan.blocks[depth - 1], depth in candidates)

    made = tuple(make(depth) for depth in range(1, plan.num_blocks + 1))
    return _first_refusal(made) or made


def _first_refusal(made: Iterable[object]) -> Refusal | None:
    return next((m for m in made if isinstance(m, Refusal)), None)


def _with_entropy(head: Segment, plan: DecoderPlan, returned: tuple[fx.Node, ...], options: RewriteOptions) -> Segment:
    logits = logits_of(plan, returned) if options.entropy else None
    return head if logits is None else add_entropy(head, logits)


def _tail(
    plan: DecoderPlan, returned: tuple[fx.Node, ...], options: RewriteOptions, keep: Mapping[str, str]
) -> tuple[tuple[Segment, ...], Segment | None, tuple[KeptLinear, ...]] | Refusal:
    """Makes what tokens that left run: for every block its twin or another fill's piece, and the head."""
    if not options.exits:
        return (), None, ()
    kept: list[KeptLinear] = []

    def twin(part: int, kind: str) -> Segment:
        segment = cut(plan, part, kind)
        if not options.quantize:
            return segment
        simplify_attention(segment.graph_module.graph)
        segment, left = make_twin(segment, options.group_size, options.layout, options.scale_inputs, keep)
        kept.extend(left)
        return segment

    def piece(depth: int) -> Segment | Refusal:
        if options.tail == "twins":
            return twin(depth, "twin")
        make = {"entries": only_entries, "empty": empty_entries}[options.tail]
        return make(cut(plan, depth, options.tail), plan.blocks[depth - 1])

    twins = tuple(piece(depth) for depth in range(1, plan.num_blocks + 1))
    refusal = _first_refusal(twins)
    if refusal:
        return refusal
    river_head = None
    if options.quantize_head:
        river_head = twin(plan.num_blocks + 1, "river_head")
    elif options.quantize and (plan.is_decode or not options.fuse):
        head = cut(plan, plan.num_blocks + 1, "river_head")
        river_head = head if options.fuse or simplify_linears(head.graph_module.graph) else None
    if river_head is not None:
        river_head = _with_entropy(river_head, plan, returned, options)
    return twins, river_head, tuple(kept)


class _PassTable:
    """Times the passes and counts the nodes that each left, for one table in the log."""

    def __init__(self, num_nodes: int) -> None:
        self._rows: list[tuple[str, float, int]] = [("traced graph", 0.0, num_nodes)]

    def run(self, name: str, step: Callable[[], T]) -> T:
        start = time.perf_counter()
        result = step()
        self._rows.append((name, time.perf_counter() - start, _count_nodes(result)))
        return result

    def log(self) -> None:
        if not log.isEnabledFor(logging.DEBUG):
            return
        lines = [f"{'pass':<16} {'ms':>8} {'ops':>7} {'change':>7}"]
        before = self._rows[0][2]
        for name, seconds, ops in self._rows:
            lines.append(f"{name:<16} {seconds * 1e3:>8.1f} {ops:>7} {ops - before:>+7}")
            before = ops
        log.debug("passes\n%s", "\n".join(lines))


def _count_nodes(result: object) -> int:
    """Counts the operations in a plan, a segment or any nesting of segments."""
    if isinstance(result, DecoderPlan):
        return len(result.part_of)
    if isinstance(result, RiverProgram):
        result = (*result.blocks, *result.twins, result.river_head)
    if isinstance(result, Segment):
        return sum(n.op not in ("placeholder", "output") for n in result.graph_module.graph.nodes)
    return sum(map(_count_nodes, result)) if isinstance(result, tuple) else 0
