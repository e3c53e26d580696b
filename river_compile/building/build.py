"""Builds an executor of a traced decoder: choose, run the passes, freeze; then it is assembled.

Not handled: graphs that are no decoder (:mod:`river_compile.backend` sorts them out); packing and compiling
(`assemble.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from river_compile.building.assemble import assembled, executor_of, placement_of
from river_compile.building.choose import (
    Choices,
    check_kernels_read_mxfp4,
    choose,
    has_room,
    packing_for,
    passes_for,
    why_width_matters,
)
from river_compile.building.graph_record import GraphRecord
from river_compile.building.packing import is_packed_later, packed_losslessly
from river_compile.building.structured_trace import trace_pass, trace_program
from river_compile.collector import collector_paused
from river_compile.lowering.lower import (
    TRITON_LAYOUT,
    choose_lowering,
    load_generated,
    lower_segment,
    warn_of_slow_lowering,
)
from river_compile.passes.edits import Pass, PassRecord, run_passes
from river_compile.passes.freeze import freeze
from river_compile.passes.nodes import calls_flex_attention, value_of
from river_compile.passes.program import Matmul, Program, RiverProgram
from river_compile.passes.segments import with_shared_graphs
from river_compile.passes.twins import linear_names
from river_compile.record import ModelRecord
from river_compile.runtime.captures import check_captures
from river_compile.runtime.executor import RiverExecutor
from river_compile.twins.backbone_file import has_backbone_file
from river_compile.twins.pack import TwinWeights


def build(
    found: RiverProgram,
    values: Mapping[fx.Node, Any],
    model: ModelRecord,
    graph: GraphRecord,
) -> RiverExecutor:
    """Build a recognized decoder on its real inputs, in order, and fill in the records."""
    config, plan, inputs = graph.config, found.plan, [*values.values()]
    how = choose_lowering(config, plan.device, calls_flex_attention(plan.graph.nodes))
    if how.layout == TRITON_LAYOUT:
        load_generated()
    choices, twins = choose(found, config, how), model.of(TwinWeights)
    by_default = config.target_weights == "auto" and choices.target_weights == "12bit"
    check_captures(plan.device, config, how.native)
    placement_of(model, config).check(plan, config)
    unwritten: list[Matmul] = []  # whose 12-bit weights the background writes to a file
    for_later: Callable[[], Program] | None = None
    with graph.stage("rewriting"), collector_paused():
        rewritten, passes = _rewritten(found, passes_for(choices, plan))
        if by_default:
            lossless = packed_losslessly(rewritten)
            if is_packed_later(lossless, model, config):
                there = has_backbone_file(lossless, inputs, twins.digests)
                unwritten = [] if there else lossless
            else:
                there = twins.has(lossless=True) or has_room(found)
            if unwritten:
                for_later = functools.partial(_frozen, found, rewritten, choices, graph)
            if not there:
                choices = replace(choices, target_weights="model")
                rewritten, others = _rewritten(passes.pop().before, packing_for(choices))
                passes += others
        check_kernels_read_mxfp4(rewritten)
        for number, record in enumerate(passes, start=1):
            trace_pass(plan.kind, number, record)
        trace_program(plan.kind, rewritten)
        program = _frozen(found, rewritten, choices, graph)
    graph.traced = found
    examples = {slot: value_of(node) for node, slot in rewritten.slots.items()}
    warn = functools.partial(warn_of_slow_lowering, how, plan.device)
    executor = executor_of(assembled(program, examples, inputs, model, graph, warn), model, graph)
    executor.for_later = for_later
    if unwritten:
        twins.write_later(unwritten, inputs, has_twins=config.exit_depth is None)
    return executor


def _frozen(found: RiverProgram, rewritten: RiverProgram, choices: Choices, graph: GraphRecord) -> Program:
    """Lower the result of the passes."""
    rewritten, how = with_shared_graphs(rewritten), choices.lowering
    lower, matrices = functools.partial(lower_segment, lowering=how), tuple(sorted(linear_names(found)))
    why = why_width_matters(rewritten, choices)
    return freeze(rewritten, lower, graph.inputs, matrices, how.native, why)


def _rewritten(program: RiverProgram, passes: Sequence[Pass]) -> tuple[RiverProgram, list[PassRecord]]:
    """Run passes; return the result and what each of them changed."""
    records: list[PassRecord] = []
    return run_passes(program, passes, records.append), records
