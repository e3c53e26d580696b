"""The TorchDynamo backend: a traced graph in, something callable out.

A decoder that runs without gradients is rewritten by the passes, its segments are compiled and a RiverExecutor takes
the graph's place. Every other graph runs as Inductor runs it, with one warning that names the reason.
"""

from __future__ import annotations

import functools
import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import fx
from torch._inductor.compile_fx import compile_fx
from tqdm import tqdm

from river_compile.cudagraphs.choose import check_device, choose_device, make_executor
from river_compile.cudagraphs.device import CaptureLog
from river_compile.fills.rivals import FILLS
from river_compile.lowering.choose import Lowering, choose_lowering, warn_of_slow_lowering
from river_compile.lowering.compile import SegmentCompiler, inductor_settings
from river_compile.offload.streaming import Streamer
from river_compile.offload.weights import OffloadedWeights
from river_compile.passes.nodes import is_parameter, value_of
from river_compile.passes.normalize import normalized
from river_compile.passes.program import DecoderPlan, FillRefusal, LinearSite, Refusal, RiverProgram, Segment
from river_compile.passes.rewrite import RewriteOptions, keep_linears, rewrite
from river_compile.reporting.dump import dump_program
from river_compile.runtime.executor import ExitRule, RiverExecutor
from river_compile.runtime.trace import ExitStats
from river_compile.twins.make import PackedSite
from river_compile.twins.observe import Observation
from river_compile.twins.pack import GraphTwins, PackedWeights

from .config import RiverConfig, check_mode
from .errors import OptionError, RiverWarning, UnsupportedGraphError
from .exits import CRITERIA, Criterion, Memories
from .state import GraphRecord, ModelState, state_of

log = logging.getLogger("river_compile")


def river(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[object],
    *,
    options: Mapping[str, object] | None = None,
    mode: str | None = None,
) -> Callable:
    """The backend behind ``torch.compile(model, backend="river", options=..., mode=...)``.

    Args:
        graph_module: what Dynamo traced.
        example_inputs: its inputs, real tensors.
        options: fields of :class:`RiverConfig`.
        mode: passed on to Inductor.

    Raises:
        OptionError: (a ``ValueError``) an unknown option or a bad value.
        UnsupportedGraphError: the graph cannot be rewritten and ``on_unsupported="raise"``.
    """
    config = RiverConfig.from_options(options)
    mode = check_mode(mode)
    traced = normalized(graph_module)
    values = dict(zip(traced.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
    state = state_of(value for node, value in values.items() if is_parameter(node))
    start = time.perf_counter()
    program = _needs_gradients(example_inputs) or rewrite(traced, functools.partial(_rewrite_options, config))
    record = GraphRecord(config, mode=mode, seconds={"rewriting": time.perf_counter() - start})
    state.graphs.append(record)
    if isinstance(program, FillRefusal):
        raise OptionError(f"fill={config.fill!r} cannot be used here: {program}; use another one, such as fill='river'")
    if isinstance(program, Refusal):
        record.refusal = str(program)
        return _as_inductor(graph_module, example_inputs, program, config, mode)
    return _build(program, values, config, mode, state, record)


def _needs_gradients(example_inputs: Sequence[object]) -> Refusal | None:
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs):
        return Refusal("the graph needs gradients; run generation under torch.no_grad() or torch.inference_mode()")
    return None


def _rewrite_options(config: RiverConfig, plan: DecoderPlan) -> RewriteOptions:
    config.check_depths(plan.num_blocks)
    check_device(config, plan)
    lowering = _lowering(config, plan)
    return RewriteOptions(
        exits=(plan.is_decode or config.prefill == "exit") and config.exit_depth != plan.num_blocks,
        checks=config.exit_depth is None and CRITERIA[config.criterion].scores_blocks,
        first_exit=config.first_exit,
        exit_every=config.exit_every,
        quantize=config.quantizer != "none",
        group_size=config.group_size,
        layout=lowering.layout,
        fuse=lowering.fuse,
        scale_inputs=config.quantizer == "awq",
        quantize_head=config.lm_head == "w4",
        same_rows=config.same_rows and not plan.is_decode,
        entropy=config.exit_depth is None and _needs_entropy(plan, CRITERIA[config.criterion]),
        deepest=config.deepest,
        tail=FILLS[config.fill].tail,
        presence=FILLS[config.fill].masks,
        catch_up=FILLS[config.fill].catches_up,
    )


def _lowering(config: RiverConfig, plan: DecoderPlan) -> Lowering:
    return choose_lowering(config, value_of(plan.blocks[0].hidden_in).device)


def _needs_entropy(plan: DecoderPlan, criterion: Criterion) -> bool:
    """Tells whether a graph's heads must return their logits' entropy; a prompt's only for the step after it."""
    return criterion.reads_logits and (plan.is_decode or criterion.remembers)


def _exit_rule(program: RiverProgram, config: RiverConfig) -> ExitRule:
    """Returns the rule of a graph.

    Raises:
        OptionError: the criterion reads logits and the model returns none.
    """
    criterion = CRITERIA[config.criterion]
    if config.exit_depth is not None:  # no criterion plays a part, so none needs to remember anything
        deepest = config.deepest if program.twins else None
        return ExitRule(None, config.exit_depth if program.twins else program.plan.num_blocks, deepest=deepest)
    if _needs_entropy(program.plan, criterion) and not program.head.has_score:
        raise OptionError(
            f"criterion={config.criterion!r} reads the logits, and this model returns none (its output is as wide as "
            "its hidden state); compile the model with its head, or use criterion='similarity'"
        )
    threshold = config.threshold if program.twins else None
    deepest = config.deepest if program.twins else None
    return ExitRule(threshold, program.plan.num_blocks, criterion, config.first_exit, deepest)


def _reachable(program: RiverProgram, rule: ExitRule) -> list[Segment]:
    """Returns the segments that some token may run through: all of them, but where depths are fixed or bounded."""
    if rule.threshold is not None and rule.deepest is None:
        return list(program.segments)
    first, last = (0, rule.deepest) if rule.threshold is not None else (rule.fixed_depth, rule.fixed_depth)
    head = program.head if last == program.plan.num_blocks or program.river_head is None else program.river_head
    return [program.prologue, *program.blocks[:last], *program.twins[first:], head]


def _build(
    program: RiverProgram,
    values: dict[fx.Node, object],
    config: RiverConfig,
    mode: str | None,
    state: ModelState,
    record: GraphRecord,
) -> RiverExecutor:
    """Packs and compiles what the program can reach and returns the executor."""
    plan = program.plan
    lowering = _lowering(config, plan)
    rule = _exit_rule(program, config)
    offloaded, stats, captures = state.of(OffloadedWeights), state.of(ExitStats), record.of(CaptureLog)
    offloaded.check(plan, config)
    start = time.perf_counter()
    packed = _pack(_reachable(program, rule), values, config, state)
    if packed:
        warn_of_slow_lowering(lowering, value_of(plan.blocks[0].hidden_in).device)
    packed_at = time.perf_counter()
    low = {site.name: packed[site].reason for site in packed if packed[site].reason}
    if low:
        program = keep_linears(program, _rewrite_options(config, plan), low)
    if config.dump_dir is not None:
        log.info("wrote the rewritten graph to %s", dump_program(program, config.dump_dir, plan.kind))
    segments = _reachable(program, rule)
    if plan.is_decode:
        offloaded.arrange(program, values, config, sum(packed[s].nbytes for p in segments for s in p.packed))
    streamer = Streamer(offloaded, program, values, config.offload)
    device = choose_device(program, config, captures)
    compiler = SegmentCompiler(lowering.compiler, inductor_settings(mode, captured=device is not None))
    steps = {}
    with tqdm(segments, desc="river: compiling segments", unit="segment", leave=False, delay=1) as bar:
        for segment in bar:
            weights = [tensor for site in segment.packed for tensor in packed[site].tensors]
            steps[segment] = streamer.step(segment, compiler.compile(segment, weights), weights, program.slots)
    record.seconds |= {"packing": packed_at - start, "compiling": time.perf_counter() - packed_at}
    record.describe(program, compiler.compiled)
    record.put(GraphTwins(packed.values()))
    stats.num_blocks = plan.num_blocks
    executor = make_executor(program, steps, rule, stats, state.of(Memories), config, captures, device)
    executor.streamer = streamer
    return executor


def _pack(
    segments: Sequence[Segment], values: dict[fx.Node, object], config: RiverConfig, state: ModelState
) -> dict[LinearSite, PackedSite]:
    sites = [site for segment in segments for site in segment.packed]
    observation = state.find(Observation)
    return state.of(PackedWeights).pack(
        sites, values, config.quantizer, config.artifact, config.min_sqnr, observation=observation
    )


def _as_inductor(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[object],
    refusal: Refusal,
    config: RiverConfig,
    mode: str | None,
) -> Callable:
    if config.on_unsupported == "raise":
        raise UnsupportedGraphError(f"backend 'river' cannot rewrite this graph: {refusal}")
    warnings.warn(f"backend 'river' leaves a graph to Inductor: {refusal}", RiverWarning, stacklevel=2)
    return compile_fx(graph_module, example_inputs, config_patches=inductor_settings(mode))
