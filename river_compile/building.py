"""Builds what runs a rewritten decoder, in one direction: choose, rewrite, pack what the twins pass made, compile.

Not handled: whether a graph is a decoder (:mod:`river_compile.backend` refuses others before).
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from river_compile.capture.capture_cache import CaptureCache
from river_compile.capture.choose import choose_device
from river_compile.capture.runner import CapturedRunner
from river_compile.choices import Choices, choose, passes_for
from river_compile.distributed.runner import RankRunner
from river_compile.errors import OptionError
from river_compile.exits import CRITERIA
from river_compile.lowering.choose import Lowering, choose_lowering, warn_of_slow_lowering
from river_compile.lowering.compile import SegmentCompiler, inductor_settings
from river_compile.model_record import GraphRecord, ModelRecord, adopt
from river_compile.offload.streaming import Streamer
from river_compile.passes.linears import matrix_names
from river_compile.passes.nodes import calls_flex_attention
from river_compile.passes.pipeline import run_passes
from river_compile.passes.program import Matmul, RiverProgram, Segment
from river_compile.passes.segments import with_shared_graphs
from river_compile.progress import stage_reached
from river_compile.reporting.report import bytes_of_token, graph_lines, note_ranks
from river_compile.reporting.structured_trace import trace_artifact, trace_pass, trace_program
from river_compile.runtime.draft_vocab import HeadVocab
from river_compile.runtime.executor import RiverExecutor
from river_compile.runtime.runner import PlainRunner, Runner, Step
from river_compile.twins.packed import PackedMatmul
from river_compile.twins.registry import TwinWatch
from river_compile.upstream.memory import give_back

Packed = dict[Matmul, PackedMatmul]


def build(
    found: RiverProgram,
    values: Mapping[fx.Node, Any],
    lowering: Lowering | None,
    model: ModelRecord,
    graph: GraphRecord,
) -> RiverExecutor:
    """Rewrites a decoder, packs its twins' weights, and compiles what tokens can reach.

    Args:
        found: the decoder's segments, as they were recognised.
        values: the graph's inputs, real tensors, in order.
        lowering: how segments are lowered; None: as options and device say.
        model, graph: the records to fill in.

    Raises:
        OptionError: (a ``ValueError``) options that do not go together, or with this model.
    """
    choices = _choose(found, lowering, model, graph)
    model.offloaded.check(found.plan, graph.config)
    graph.matrices = tuple(sorted(matrix_names(found)))
    with graph.stage("rewriting"):
        program = _rewritten(found, choices)
    return _assembled(program, values, choices, model, graph)


def rebuild(program: RiverProgram, inputs: Sequence[Any], model: ModelRecord, graph: GraphRecord) -> RiverExecutor:
    """Builds a program that was rewritten before, in another process perhaps.

    Args:
        program: what the passes made of a decoder with the same options on a machine alike.
        inputs: of its graph, real tensors, in order.
        model, graph: the records to fill in; `graph` has the program's matrices.
    """
    choices = _choose(program, None, model, graph)
    return _assembled(program, dict(zip(program.inputs, inputs, strict=True)), choices, model, graph)


def _choose(program: RiverProgram, lowering: Lowering | None, model: ModelRecord, graph: GraphRecord) -> Choices:
    config, plan = graph.config, program.plan
    lowering = lowering or choose_lowering(config, plan.device, calls_flex_attention(plan.graph.nodes))
    device = choose_device(program, config, graph.captures, lowering.native, model.ranks)
    choices = replace(choose(program, config, lowering), device=device)
    if choices.backbone_weights != "model" and model.ranks.several:
        raise OptionError(
            f"backbone_weights={config.backbone_weights!r} is not for ranks that share a model; use "
            "backbone_weights='model'"
        )
    graph.native = choices.lowering.native
    return choices


def _assembled(
    program: RiverProgram, values: Mapping[fx.Node, Any], choices: Choices, model: ModelRecord, graph: GraphRecord
) -> RiverExecutor:
    """Packs the twins of a rewritten program, compiles its segments, and puts them together."""
    config, plan = choices.config, program.plan
    graph.width_matters = _why_width_matters(program, choices)
    segments = choices.policy.reachable(program)
    packed = _packed(program, segments, [*values.values()], choices, model, graph)
    if plan.is_decode:
        resident = sum(packed[linear].nbytes for segment in segments for linear in segment.packed)
        with model.twins.moving():
            model.offloaded.arrange(program, values, config, resident)
    streamer = Streamer(model.offloaded, program, values, config.offload)
    vocabulary = HeadVocab.of(program)
    steps = _compiled(program, segments, packed, choices, streamer, vocabulary, graph)
    note_ranks(program, graph, model.ranks)
    trace_artifact(f"river_{plan.kind}_report", lambda: "\n".join(graph_lines(graph)))
    model.exit_stats.num_blocks = plan.num_blocks
    watch = None
    if packed:
        watch = TwinWatch(packed, model.twins, lambda: model.statistics, functools.partial(adopt, model))
    executor = RiverExecutor(
        program,
        _runner(program, steps, choices, model, graph),
        choices.policy,
        model.exit_stats,
        model.exit_memories,
        model.sequences,
        watch,
        streamer.forget,
        vocabulary,
        graph.entry,
        graph.inputs,
    )
    graph.executor = weakref.ref(executor)
    return executor


def _why_width_matters(program: RiverProgram, choices: Choices) -> str:
    """Returns why a token's bits may depend on how many run with it through the backbone, empty where they do not."""
    config, how = choices.config, choices.backbone_weights
    if not choices.own_backbone:
        return "its backbone's matmuls are not River's own, which sum alike in all passes; use backbone='river'"
    if choices.lowering.native:
        return ""
    missed = next((f for f in program.fusions if f.missed and f.segment.startswith(("block", "head"))), None)
    if missed is not None:
        return f"not all of {missed.segment} is the generated kernels' ({missed.rule}: {missed.missed})"
    if how != "model":
        return f"one row of weights in {how} has a kernel of its own; use backbone_weights='model'"
    checks = config.first_exit < program.plan.num_blocks and CRITERIA[config.criterion].reads == "block"
    if config.exit_depth is None and checks:
        return (
            f"exit checks by criterion={config.criterion!r} end blocks of decode steps otherwise; use "
            "criterion='confidence'"
        )
    return ""


def _rewritten(found: RiverProgram, choices: Choices) -> RiverProgram:
    """Runs the passes and traces what they did; blocks that are alike share a graph then."""
    kind, numbers = found.plan.kind, itertools.count(1)
    result = run_passes(found, passes_for(choices, found.plan), lambda record: trace_pass(kind, next(numbers), record))
    trace_program(kind, result)
    return with_shared_graphs(result)


def _packed(
    program: RiverProgram,
    segments: Sequence[Segment],
    inputs: Sequence[Any],
    choices: Choices,
    model: ModelRecord,
    graph: GraphRecord,
) -> Packed:
    """Returns the packed weights of the matmuls that passes made and tokens can reach."""
    twins = model.twins
    with graph.stage("packing"):
        every = [linear for segment in program.segments for linear in segment.packed]
        packable = [linear for segment in segments for linear in segment.packed]
        reached = [linear for linear in packable if linear.lossless or program.twins]
        how = choices.backbone_weights
        if how == "12bit" and not any(linear.lossless for linear in packable):
            raise OptionError(
                "backbone_weights='12bit' is for weights in bfloat16, and no matrix of the blocks is; call "
                "model.to(torch.bfloat16), or use backbone_weights='model'"
            )
        savable = [linear for linear in every if not linear.lossless]
        packed = {}
        if reached:
            packed = twins.pack(reached, inputs, choices.config, model.statistics, graph.matrices, savable)
    graph.twins = tuple(made for made in packed.values() if not made.linear.lossless)
    lossless = [linear for linear in packed if linear.lossless]
    smaller = [linear for linear in lossless if not packed[linear].weight.unpacked]
    if how == "8bit" and not smaller:
        raise OptionError(
            "backbone_weights='8bit' is for weights that are numbers of 8 bits times a scale of their row or group, as "
            "those of a file in Q8_0 or of compressed-tensors are in the dtype of its scales, and none of this model's "
            "are; load that with dtype='auto', or use backbone_weights='model'"
        )
    # (Every time: what was packed just now read the parameters again.)
    graph.given_back = give_back({id(inputs[i]): inputs[i] for linear in smaller for i in linear.weights}.values())
    if graph.twins:
        warn_of_slow_lowering(choices.lowering, program.plan.device)
        if model.ranks.several:  # (which judge together or not at all; else the first report does)
            twins.judge(graph.twins, model.statistics)
    return packed


def _compiled(
    program: RiverProgram,
    segments: Sequence[Segment],
    packed: Packed,
    choices: Choices,
    streamer: Streamer,
    vocabulary: HeadVocab | None,
    graph: GraphRecord,
) -> dict[Segment, Step]:
    """Returns the steps of the segments, each with the operands that follow its inputs."""
    compiler = SegmentCompiler(choices.lowering, inductor_settings(graph.mode, whole=False))
    steps: dict[Segment, Step] = {}
    with graph.stage("compiling"):
        for number, segment in enumerate(segments):
            stage_reached(number / len(segments))
            operands = [tensor for linear in segment.packed for tensor in packed[linear].tensors]
            if all(linear.lossless for linear in segment.packed):
                graph.lossless_bytes += sum(packed[linear].weight.qweight.nbytes for linear in segment.packed)
            else:
                graph.packed_bytes += sum(tensor.nbytes for tensor in operands)
                graph.token_bytes += bytes_of_token(segment, operands, len(segment.inputs))
            if vocabulary is not None and segment.chooses_logits:
                operands.append(vocabulary.list)
            steps[segment] = streamer.step(segment, compiler.compile(segment, operands), operands, program.slots)
    graph.describe(program, compiler.compiled)
    return steps


def _runner(
    program: RiverProgram, steps: Mapping[Segment, Step], choices: Choices, model: ModelRecord, graph: GraphRecord
) -> Runner:
    config, runner = choices.config, PlainRunner(program, steps)
    if model.ranks.several:
        runner = RankRunner(program, steps, model.ranks, config.check_ranks)
    if choices.device is None:
        return runner
    captures = CaptureCache(program, choices.device, graph.captures, config.max_captures)
    return CapturedRunner(program, steps, captures, runner)
