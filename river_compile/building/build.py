"""Builds an executor of a decoder: choose, run the passes, quantize, compile.

Not handled: graphs that are no decoder (:mod:`river_compile.backend` sorts them out).
"""

from __future__ import annotations

import functools
import logging
import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from river_compile.agreement import Agreement
from river_compile.building.choose import Choices, choose, has_room, passes_for, why_width_matters
from river_compile.building.graph_record import GraphRecord, Graphs
from river_compile.building.structured_trace import trace_artifact, trace_pass, trace_program
from river_compile.config import RiverConfig
from river_compile.errors import OptionError, RiverWarning
from river_compile.exits import WHOLE, SequenceStates
from river_compile.kernels.messages import with_id
from river_compile.kernels.native import load as native
from river_compile.lowering.inductor import (
    TRITON_LAYOUT,
    ProgramExamples,
    SegmentCompiler,
    choose_lowering,
    inductor_settings,
    load_generated,
    lower_segment,
    warn_of_slow_lowering,
)
from river_compile.passes.edits import PassRecord, run_passes
from river_compile.passes.freeze import freeze
from river_compile.passes.nodes import calls_flex_attention, value_of
from river_compile.passes.program import Matmul, Program, RiverProgram, SegmentSpec
from river_compile.passes.segments import with_shared_graphs
from river_compile.passes.twins import linear_names
from river_compile.progress import stage_reached
from river_compile.record import ModelRecord, adopt
from river_compile.runtime.captures import Capturing, check_captures, choose_captures
from river_compile.runtime.executor import RiverExecutor
from river_compile.runtime.placement import Placement, Steps
from river_compile.runtime.state import CompiledProgram, all_vocab_blocks
from river_compile.runtime.stats import ExitStats
from river_compile.runtime.units import Step, Units
from river_compile.system import advise_pageout
from river_compile.twins.backbone_file import has_backbone_file
from river_compile.twins.making import Job, Statistics
from river_compile.twins.pack import TwinWeights
from river_compile.twins.quantize import UNOBSERVED
from river_compile.twins.weights import Parameters, ProgramWeights, TwinWeight
from river_compile.upstream.dynamo import OwnCall

log = logging.getLogger("river_compile.twins")


def build(
    found: RiverProgram,
    values: Mapping[fx.Node, Any],
    model: ModelRecord,
    graph: GraphRecord,
) -> RiverExecutor:
    """Build a recognised decoder on its real inputs, in order, and fill in the records."""
    config, plan, inputs = graph.config, found.plan, [*values.values()]
    how = choose_lowering(config, plan.device, calls_flex_attention(plan.graph.nodes))
    if how.layout == TRITON_LAYOUT:
        load_generated()
    choices, twins = choose(found, config, how), model.of(TwinWeights)
    by_default = config.target_weights == "auto" and choices.target_weights == "12bit"
    check_captures(plan.device, config, how.native)
    _placement(model, config).check(plan, config)
    unwritten: list[Matmul] = []  # whose 12-bit weights the background writes to a file
    with graph.stage("rewriting"):
        rewritten, passes = _rewritten(found, choices)
        if by_default:
            lossless = [x for segment in rewritten.segments for x in segment.packed if x.lossless]
            later = _only_drafts(model, config) and twins.packs_later(lossless)
            if later:
                there = has_backbone_file(lossless, inputs, twins.digests)
            else:
                there = twins.has(lossless=True) or has_room(found)
            if not there:
                choices = replace(choices, target_weights="model")
                rewritten, passes = _rewritten(found, choices)
                unwritten = lossless if later else []
        for number, record in enumerate(passes, start=1):
            trace_pass(plan.kind, number, record)
        trace_program(plan.kind, rewritten)
        rewritten = with_shared_graphs(rewritten)
        program = _frozen(found, rewritten, choices, graph)
    graph.traced = found
    examples = {slot: value_of(node) for node, slot in rewritten.slots.items()}
    warn = functools.partial(warn_of_slow_lowering, how, plan.device)
    executor = _executor(_assembled(program, examples, inputs, model, graph, warn), model, graph)
    if unwritten:
        executor.is_kept = False
        twins.write_later(unwritten, inputs)
    return executor


def _placement(model: ModelRecord, config: RiverConfig) -> Placement:
    """Return where a model's weights lie."""
    if config.moves_weights and type(model.of(Placement)) is Placement:
        from river_compile.runtime.offload import OffloadedWeights

        model.put_as(Placement, OffloadedWeights())
    return model.of(Placement)


def _frozen(found: RiverProgram, rewritten: RiverProgram, choices: Choices, graph: GraphRecord) -> Program:
    """Lower the result of the passes."""
    how = choices.lowering
    lower, matrices = functools.partial(lower_segment, lowering=how), tuple(sorted(linear_names(found)))
    why = why_width_matters(rewritten, choices)
    return freeze(rewritten, lower, graph.inputs, matrices, how.native, why)


def _only_drafts(model: ModelRecord, config: RiverConfig) -> bool:
    """Whether only exact mode's drafts read a model's twins: none else runs its programs at another depth than full."""
    return model.find(OwnCall) is not None and config.first_exit == WHOLE


def rebuild(program: Program, inputs: Sequence[Any], model: ModelRecord, graph: GraphRecord) -> RiverExecutor:
    """Build a program that was rewritten before, perhaps in another process, on its real inputs, in order."""
    if program.native:
        native.load()
    elif graph.config.kernels == "triton":
        load_generated()
    return _executor(_assembled(program, ProgramExamples(program), inputs, model, graph), model, graph)


Built = tuple[CompiledProgram, Capturing | None]


def _executor(built: Built, model: ModelRecord, graph: GraphRecord) -> RiverExecutor:
    """Return a program's executor, which rebuilds it when its parameters change."""
    executor = RiverExecutor(*built, functools.partial(_rebuild, weakref.ref(model), graph))
    graph.executor = weakref.ref(executor)
    return executor


def _rebuild(
    model_ref: weakref.ref[ModelRecord], graph: GraphRecord, program: Program, inputs: Sequence[Any], changed: bool
) -> Built:
    """Rebuild a program whose parameters changed, or whose missing twins are there."""
    model = model_ref()
    assert model is not None, "the model whose parameters these are is there"
    start = time.perf_counter()
    adopt(model, (inputs[i] for i in range(len(inputs)) if program.is_parameter(i)))
    graph.token_bytes = graph.packed_bytes = graph.lossless_bytes = 0
    built = _assembled(program, ProgramExamples(program), inputs, model, graph, refresh=changed)
    weights = built[0].weights
    made = weights.made if changed and isinstance(weights, ProgramWeights) else ()
    again = [twin for twin in made if not twin.matmul.lossless]
    if again:
        _tell_of_change(model, again, time.perf_counter() - start)
    return built


def _tell_of_change(model: ModelRecord, changed: Sequence[TwinWeight], seconds: float) -> None:
    """Report requantized weights: the first time as a warning, later in the log, for training loops."""
    twins = model.of(TwinWeights)
    twins.loss.value, twins.changes, twins.changed = None, twins.changes + 1, len(changed)
    others = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    message = (
        f"The weights changed after their 4-bit twins were packed ({changed[0].name}{others}). The twins were packed "
        f"again in {seconds:.1f} s"
    )
    observed = sum(twin.statistics.endswith("observed tokens") for twin in changed)
    if observed:
        message += f", {observed} with the old statistics. river_compile.collect_statistics collects new ones"
    if any(twin.quantizer == UNOBSERVED != twin.asked for twin in changed):
        message += f". Matrices without statistics took quantizer={UNOBSERVED!r}"
    if twins.changes == 1:
        hint = "Later changes are only logged, and counted in the report"
        warnings.warn(with_id("RC048", f"{message}. {hint}"), RiverWarning, stacklevel=2)
    log.info("%s", message)


def _assembled(
    program: Program,
    examples: Mapping[int, Any],
    inputs: Sequence[Any],
    model: ModelRecord,
    graph: GraphRecord,
    warn: Callable[[], object] = lambda: None,
    refresh: bool = False,
) -> Built:
    """Quantize a program's twins, compile its segments and put them together; `refresh`: its parameters changed."""
    config, agreement, placement = graph.config, model.of(Agreement), _placement(model, graph.config)
    graph.program = program
    policy = config.exit_policy(program)
    segments = policy.reachable(program)
    weights = _packed(program, segments, inputs, model, graph, warn, refresh)
    packed = {} if weights is None else weights.packed
    segments = [segment for segment in segments if packed.keys() >= {*segment.packed}]  # twins may be missing
    if program.is_decode:
        resident = sum(packed[linear].nbytes for segment in segments for linear in segment.packed)
        with model.of(TwinWeights).moving():
            placement.arrange(program, inputs, config, resident)
    how = placement.steps(program, inputs, config)
    vocab_blocks = all_vocab_blocks(program)
    steps = _compiled(program, examples, segments, packed, vocab_blocks, how, graph)
    if agreement.several and program.twins:
        graph.shares = agreement.gather(graph.share(agreement.name))
    trace_artifact(f"river_{program.kind}_report", lambda: "\n".join(graph.lines()))
    stats = model.of(ExitStats)
    stats.num_blocks = program.num_blocks
    captures = choose_captures(program, config, graph.captures, agreement.not_captured)
    compiled = CompiledProgram(
        program=program,
        plain=Units(program, steps, _nothing),
        units=None if captures is None else Units(program, steps, captures.kind.obstacle),
        policy=policy,
        stats=stats,
        sequences=model.of(SequenceStates),
        remembers=policy.criterion.reads == "previous" and program.head.has_score,
        all_vocab_blocks=vocab_blocks,
        log=graph.captures,
        weights=weights,
        on_close=how.on_close,
        agreement=agreement,
    )
    return compiled, captures


def _nothing(_: object) -> None:
    return None


def _rewritten(found: RiverProgram, choices: Choices) -> tuple[RiverProgram, list[PassRecord]]:
    """Run the passes; return the result and what each of them changed."""
    records: list[PassRecord] = []
    return run_passes(found, passes_for(choices, found.plan), records.append), records


def _packed(
    program: Program,
    segments: Sequence[SegmentSpec],
    inputs: Sequence[Any],
    model: ModelRecord,
    graph: GraphRecord,
    warn: Callable[[], object],
    refresh: bool,
) -> ProgramWeights | None:
    """Return the packed weights of the matmuls that the passes made and tokens can reach."""
    twins, statistics, start = model.of(TwinWeights), model.of(Statistics).now(), time.perf_counter()
    config, how = graph.config, graph.config.target_weights
    with graph.stage("packing"):
        packable = [linear for segment in segments for linear in segment.packed]
        reached = [linear for linear in packable if linear.lossless or program.twins]
        if how == "12bit" and not any(linear.lossless for linear in packable):
            raise OptionError(
                "target_weights='12bit' requires bfloat16 weights, and no matrix of the layers has any. Call "
                "model.to(torch.bfloat16), or use target_weights='model'",
                id="RC004",
            )
        weights = None
        if reached:
            weights = twins.find(reached, _job(program, reached, inputs, model, config, statistics, refresh))
            twins.seconds += time.perf_counter() - start
    packed = {} if weights is None else weights.packed
    graph.twins = tuple(made for made in packed.values() if not made.matmul.lossless)
    digests = {(twin.name, twin.asked): twin.digest for twin in graph.twins}
    for other in model.of(Graphs):  # rebuilt at its next run
        other.twins = tuple(t for t in other.twins if digests.get((t.name, t.asked), t.digest) == t.digest)
    lossless = [linear for linear in packed if linear.lossless]
    smaller = [linear for linear in lossless if not packed[linear].weight.unpacked]
    if how == "8bit" and not smaller:
        raise OptionError(
            "target_weights='8bit' requires weights that are 8-bit numbers times a scale for each row or group, as in "
            "a file in Q8_0 or of compressed-tensors. This model has none in the dtype of the file's scales. Load it "
            "with dtype='auto', or use target_weights='model'",
            id="RC004",
        )
    # Every time, since quantizing has just read the parameters again.
    replaced = {i for linear in smaller for i in linear.weights}
    if config.exit_depth == 0 and config.prefill == "exit":  # twins run prompts too
        read = {slot for segment in segments for slot in segment.inputs}
        replaced |= {i for linear in packed for i in linear.weights} - read
    graph.paged_out_bytes = advise_pageout({id(inputs[i]): inputs[i] for i in replaced}.values())
    if graph.twins:
        warn()
    return weights


def _job(
    program: Program,
    reached: Sequence[Matmul],
    inputs: Sequence[Any],
    model: ModelRecord,
    config: RiverConfig,
    statistics: Statistics,
    refresh: bool,
) -> Job:
    """Return how weights of a program are made: from which parameters, and by which file."""
    twins = model.of(TwinWeights)
    savable = [matmul for segment in program.segments for matmul in segment.packed if not matmul.lossless]
    parameters = {matmul: Parameters.from_inputs(matmul, inputs) for matmul in (*reached, *savable)}
    drafting, digests = _only_drafts(model, config), twins.digests.of(parameters)
    job = Job(config, statistics, program.device, parameters, digests, refresh, drafting)
    has_twins = any(not matmul.lossless for matmul in parameters)  # a prompt's program may have none
    if config.twins is None or not has_twins or refresh:
        return job
    return twins.with_file(job, savable, program.matrices)


def _compiled(
    program: Program,
    examples: Mapping[int, Any],
    segments: Sequence[SegmentSpec],
    packed: Mapping[Matmul, TwinWeight],
    vocab_blocks: Tensor | None,
    how: Steps,
    graph: GraphRecord,
) -> dict[SegmentSpec, Step]:
    """Compile the segments, each with the operands that follow its inputs."""
    settings = inductor_settings(graph.mode, whole=False)
    compiler = SegmentCompiler(examples, program.device, program.native, settings)
    steps: dict[SegmentSpec, Step] = {}
    with graph.stage("compiling"):
        for number, segment in enumerate(segments):
            stage_reached(number / len(segments), compiler.describe(segment))
            operands = [tensor for linear in segment.packed for tensor in packed[linear].tensors]
            if all(linear.lossless for linear in segment.packed):
                graph.lossless_bytes += sum(packed[linear].weight.qweight.nbytes for linear in segment.packed)
            else:
                graph.packed_bytes += sum(tensor.nbytes for tensor in operands)
                graph.token_bytes += bytes_of_token(segment, operands, len(segment.inputs))
            more = [vocab_blocks] if segment.takes_vocab_blocks and vocab_blocks is not None else []
            callee = compiler.compile(segment, [*operands, *more])
            steps[segment] = how.make(segment, callee, operands)
    graph.compiled = tuple(compiler.compiled)
    return steps


def bytes_of_token(segment: SegmentSpec, values: Sequence[object], first: int = 0) -> int:
    """Return the bytes that a token reads of a segment's placeholders, from number `first` on."""
    chosen = dict(segment.experts)
    return sum(
        (value[: chosen[place]] if place in chosen else value).nbytes
        for place, value in enumerate(values, start=first)
        if isinstance(value, Tensor)
    )
