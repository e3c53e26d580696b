"""Assembles an executor of a frozen program: pack the weights, compile the segments, and do so again if weights change.

Not handled: graphs before the passes (`build.py`).
"""

from __future__ import annotations

import functools
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from river_compile.agreement import Agreement
from river_compile.building.graph_record import GraphRecord
from river_compile.building.packing import packed_weights, tell_of_change
from river_compile.building.structured_trace import trace_artifact
from river_compile.config import RiverConfig
from river_compile.exits import SequenceStates
from river_compile.lowering.lower import load_generated, load_native
from river_compile.lowering.segments import ProgramExamples, SegmentCompiler
from river_compile.passes.program import Matmul, Program, SegmentSpec
from river_compile.progress import stage_reached
from river_compile.record import ModelRecord, adopt
from river_compile.runtime.captures import Capturing, choose_captures
from river_compile.runtime.executor import RiverExecutor
from river_compile.runtime.placement import Placement, Steps
from river_compile.runtime.state import CompiledProgram, all_vocab_blocks
from river_compile.runtime.stats import ExitStats
from river_compile.runtime.units import Step, Units
from river_compile.twins.pack import TwinWeights
from river_compile.twins.weights import ProgramWeights, TwinWeight


def placement_of(model: ModelRecord, config: RiverConfig) -> Placement:
    """Return where a model's weights lie."""
    if config.moves_weights and type(model.of(Placement)) is Placement:
        from river_compile.runtime.offload import OffloadedWeights

        model.put_as(Placement, OffloadedWeights())
    return model.of(Placement)


def rebuild(program: Program, inputs: Sequence[Any], model: ModelRecord, graph: GraphRecord) -> RiverExecutor:
    """Build a program that was rewritten before, perhaps in another process, on its real inputs, in order."""
    if program.native:
        load_native()
    elif graph.config.kernels == "triton":
        load_generated()
    return executor_of(assembled(program, ProgramExamples(program), inputs, model, graph), model, graph)


Built = tuple[CompiledProgram, Capturing | None]


def executor_of(built: Built, model: ModelRecord, graph: GraphRecord) -> RiverExecutor:
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
    graph.backbone_bytes = graph.expert_bytes = graph.chosen_bytes = 0
    built = assembled(program, ProgramExamples(program), inputs, model, graph, refresh=changed)
    weights = built[0].weights
    made = weights.made if changed and isinstance(weights, ProgramWeights) else ()
    again = [twin for twin in made if not twin.matmul.lossless]
    if again:
        tell_of_change(model, again, time.perf_counter() - start)
    return built


def assembled(
    program: Program,
    examples: Mapping[int, Any],
    inputs: Sequence[Any],
    model: ModelRecord,
    graph: GraphRecord,
    warn: Callable[[], object] = lambda: None,
    refresh: bool = False,
) -> Built:
    """Quantize a program's twins, compile its segments and put them together; `refresh`: its parameters changed."""
    config, agreement, placement = graph.config, model.of(Agreement), placement_of(model, graph.config)
    graph.program = program
    policy = config.exit_policy(program)
    segments = policy.reachable(program)
    weights = packed_weights(program, segments, inputs, model, graph, warn, refresh)
    packed = {} if weights is None else weights.packed
    segments = [segment for segment in segments if packed.keys() >= {*segment.packed}]  # twins may be missing
    if program.is_decode:
        resident = sum(packed[linear].nbytes for segment in segments for linear in segment.packed)
        with model.of(TwinWeights).moving():
            placement.arrange(program, inputs, config, resident)
    how = placement.steps(program, inputs, config)
    vocab_blocks = all_vocab_blocks(program)
    steps = _compiled(program, examples, segments, packed, vocab_blocks, how, graph)
    _count_experts(graph, segments, packed, inputs)
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
        tuned=None if config.budget is None or not program.is_decode else model.of(TwinWeights).exits.applied_to,
    )
    return compiled, captures


def _nothing(_: object) -> None:
    return None


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
    compiler = SegmentCompiler(examples, program.device, program.native, graph.mode)
    steps: dict[SegmentSpec, Step] = {}
    with graph.stage("compiling"):
        for number, segment in enumerate(segments):
            stage_reached(number / len(segments), compiler.describe(segment))
            operands = [tensor for linear in segment.packed for tensor in packed[linear].tensors]
            if all(linear.lossless for linear in segment.packed):
                graph.lossless_bytes += sum(packed[linear].weight.qweight.nbytes for linear in segment.packed)
            else:  # (a twin shares the layer's MXFP4 experts)
                graph.packed_bytes += sum(packed[linear].nbytes for linear in segment.packed if not linear.lossless)
                graph.token_bytes += bytes_of_token(segment, operands, len(segment.inputs))
            more = [vocab_blocks] if segment.takes_vocab_blocks and vocab_blocks is not None else []
            callee = compiler.compile(segment, [*operands, *more])
            steps[segment] = how.make(segment, callee, operands)
    graph.compiled = tuple(compiler.compiled)
    return steps


def _count_experts(
    graph: GraphRecord, segments: Sequence[SegmentSpec], packed: Mapping[Matmul, TwinWeight], inputs: Sequence[Any]
) -> None:
    """Note the bytes of the 16-bit layers' weights and stacks of experts, and of those that a token reads."""
    assert graph.program is not None
    for segment in (segment for segment in segments if segment.kind in ("block", "head")):
        given = [inputs[slot] if graph.program.is_parameter(slot) else None for slot in segment.inputs]
        values = [*given, *(tensor for matmul in segment.packed for tensor in packed[matmul].tensors)]
        graph.backbone_bytes += bytes_of_token(segment, values)
        stacks = [(values[place], count) for place, count in segment.experts]
        graph.expert_bytes += sum(stack.nbytes for stack, _ in stacks if isinstance(stack, Tensor))
        graph.chosen_bytes += sum(stack[:count].nbytes for stack, count in stacks if isinstance(stack, Tensor))


def bytes_of_token(segment: SegmentSpec, values: Sequence[object], first: int = 0) -> int:
    """Return the bytes that a token reads of a segment's placeholders, from number `first` on."""
    chosen = dict(segment.experts)
    return sum(
        (value[: chosen[place]] if place in chosen else value).nbytes
        for place, value in enumerate(values, start=first)
        if isinstance(value, Tensor)
    )
