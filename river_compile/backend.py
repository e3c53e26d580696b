"""The TorchDynamo backend: a traced graph in, something callable out.

A decoder that runs without gradients is rewritten by the passes, its segments are compiled and a RiverExecutor takes
the graph's place. Every other graph runs as Inductor runs it (with ``lowering="eager"``, and where nothing compiles,
operator by operator), with one warning that names the reason.
"""

from __future__ import annotations

import functools
import logging
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._inductor.compile_fx import compile_fx
from tqdm import tqdm

from river_compile.capture.capture_cache import CaptureCache
from river_compile.capture.device import CaptureDevice, CaptureLog
from river_compile.capture.device_exit_state import DeviceExitState
from river_compile.capture.device_exits import captured_runner, verdicts_for
from river_compile.capture.runner import choose_device
from river_compile.choose_passes import passes_for, twinning, uses_own_backbone
from river_compile.config import RiverConfig, check_mode
from river_compile.distributed.ranks import ranks_of
from river_compile.distributed.runner import RankRunner, called_on_shards
from river_compile.distributed.support import check as check_supported
from river_compile.errors import OptionError, RiverWarning, UnsupportedGraphError
from river_compile.exits import ExitPolicy
from river_compile.kernels.native.build import CannotBuild, working_compiler
from river_compile.lowering.choose import Lowering, choose_lowering, warn_of_slow_lowering
from river_compile.lowering.compile import SegmentCompiler, inductor_settings
from river_compile.model_record import BROKE, GraphRecord, ModelRecord, adopt, find_record, record_of
from river_compile.offload.streaming import Streamer
from river_compile.passes.decoder import find_decoder
from river_compile.passes.dtensor_locals import on_local_shards
from river_compile.passes.exit_checks import logits_of
from river_compile.passes.nodes import input_name, is_parameter
from river_compile.passes.normalize import normalized
from river_compile.passes.pipeline import Pass, run_passes
from river_compile.passes.program import DecoderPlan, LinearSite, Refusal, RiverProgram, Segment
from river_compile.passes.segments import segmented
from river_compile.passes.twins import twin_sites, without_products
from river_compile.reporting.dump import PassDump, trace_artifact
from river_compile.reporting.report import bytes_of_token, graph_lines, note_ranks
from river_compile.runtime.compiled_call import install
from river_compile.runtime.draft_vocab import HeadVocab
from river_compile.runtime.executor import RiverExecutor
from river_compile.runtime.fill import Fill
from river_compile.runtime.runner import PlainRunner, Runner, Step
from river_compile.twins.packed import PackedSite
from river_compile.twins.registry import TwinWatch
from river_compile.upstream.dynamo import break_before, build_whole_files, compiled_module
from river_compile.upstream.tensors import local_of
from river_compile.upstream.versions import warn_of_untested

log = logging.getLogger("river_compile")
warn_of_untested()


def river(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, object] | None = None,
    mode: str | None = None,
    lowering: Lowering | None = None,
    fill: type[Fill] = Fill,
) -> Callable[..., Any]:
    """The backend of ``torch.compile(model, backend="river", options=..., mode=...)``.

    Args:
        graph_module: what Dynamo traced.
        example_inputs: its inputs, real tensors.
        options: fields of :class:`RiverConfig`.
        mode: passed on to Inductor.
        lowering: how segments are lowered; None: as options and device say.
        fill: what skipped blocks leave in the KV cache. (`functools.partial` sets this and the above for a model.)

    Raises:
        OptionError: (a ``ValueError``) an unknown option or a bad value.
        UnsupportedGraphError: the graph cannot be rewritten and ``on_unsupported="raise"``, or a weight is not finite.
    """
    config = RiverConfig.from_options(options)
    mode = check_mode(mode)
    build_whole_files()
    traced = normalized(graph_module)
    values = dict(zip(traced.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
    parameters = [node for node in values if is_parameter(node)]
    owner = compiled_module(river)  # of the pieces of a broken graph, each of which reads some of its parameters
    owned = [*(values[node] for node in parameters), *(owner.parameters() if owner else ())]
    model, ranks, local = record_of(owned), ranks_of(owned), frozenset[fx.Node]()
    if owner is not None:
        model.self_calibration.is_of(owner)
    if ranks.several:
        check_supported(ranks, config, mode, traced.graph)
        model.ranks = ranks
        local = on_local_shards(traced, ranks.size, ranks.group.group_name)
        values |= {node: local_of(values[node]) for node in local}
    record = GraphRecord(config, mode=mode, inputs=tuple(map(input_name, values)))
    model.add(record, limit=torch._dynamo.config.recompile_limit)
    for parameter in parameters[:1]:
        record.entry.belongs_to_model_of(parameter, then=functools.partial(_watch, model, record))
    no_compiler = _no_compiler(config, example_inputs)
    with record.stage("rewriting"):
        plan = no_compiler or _needs_gradients(example_inputs) or find_decoder(traced)
        program = plan if isinstance(plan, Refusal) else segmented(plan)
        if not isinstance(program, Refusal) and config.quantizer != "none":
            program = without_products(program) or program
    if not isinstance(program, Refusal):
        return called_on_shards(_build(program, values, lowering, fill, model, record), [*values], local)
    record.refusal = str(program) if no_compiler else f"{program}{_graph_break(graph_module, owner)}"
    if config.on_unsupported == "raise":
        raise UnsupportedGraphError(f"backend 'river' cannot rewrite this graph: {record.refusal}")
    if record.refusal not in {graph.refusal for graph in model.graphs if graph is not record}:
        does = "runs a model uncompiled" if no_compiler else "leaves a graph to Inductor"
        warnings.warn(f"backend 'river' {does}: {record.refusal}", RiverWarning, stacklevel=1)
    if no_compiler or config.lowering == "eager":
        return graph_module.forward
    compiled: Any = compile_fx(graph_module, example_inputs, config_patches=inductor_settings(mode))
    return compiled


def _graph_break(graph_module: fx.GraphModule, model: nn.Module | None) -> str:
    """Returns where Dynamo broke the model's code, for a graph that is a piece of it for that reason."""
    why = getattr(graph_module, "compile_subgraph_reason", None)
    if why is None or not why.graph_break:
        why = None if model is None else break_before(model)
    if why is None:
        return ""
    line = f" ({Path(why.user_stack[-1].filename).name}:{why.user_stack[-1].lineno})" if why.user_stack else ""
    return f", as {BROKE}: {why.reason.partition(chr(10))[0]}{line}"


def executors_of(model: nn.Module) -> list[RiverExecutor]:
    """Returns the executors of a model's rewritten graphs that are alive, in the order of their compilation."""
    record = find_record(model)
    graphs = [] if record is None else record.graphs
    return [executor for graph in graphs if isinstance(executor := graph.executor(), RiverExecutor)]


def _watch(model: ModelRecord, record: GraphRecord, module: nn.Module) -> None:
    if record.block_paths:
        model.plain_runs.watch(module, record.block_paths[0], river, model.exit_stats)
        install(module, after=model.plain_runs.called)


def _no_compiler(config: RiverConfig, example_inputs: Sequence[Any]) -> Refusal | None:
    """Returns why Inductor could compile nothing for a CPU, None where it can or need not."""
    if config.lowering == "eager" or any(isinstance(x, Tensor) and x.device.type != "cpu" for x in example_inputs):
        return None
    try:
        working_compiler()
    except CannotBuild as error:
        return Refusal(str(error))
    return None


def _needs_gradients(example_inputs: Sequence[Any]) -> Refusal | None:
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs):
        return Refusal("the graph needs gradients; run generation under torch.no_grad() or torch.inference_mode()")
    return None


def _build(
    program: RiverProgram,
    values: Mapping[fx.Node, Any],
    lowering: Lowering | None,
    fill_type: type[Fill],
    model: ModelRecord,
    record: GraphRecord,
) -> RiverExecutor:
    """Rewrites, packs the twins' weights, and compiles what tokens can reach; raises an OptionError."""
    plan, config = program.plan, record.config
    offloaded, captures, ranks = model.offloaded, record.captures, model.ranks
    config.check_depths(plan.num_blocks)
    lowering = lowering or choose_lowering(config, plan.device)
    record.own_backbone = lowering.native and uses_own_backbone(config, lowering, plan.is_decode)
    device = choose_device(program, config, captures, lowering.native, ranks)
    offloaded.check(plan, config)
    policy = _exit_policy(program, config)
    verdicts = _verdicts(plan, policy, config, device, captures)
    with record.stage("rewriting"):
        passes = passes_for(config, plan, lowering, fill_type, decides=verdicts is not None)
        program = _rewritten(program, config, passes)
    segments = policy.reachable(program)
    packed = _pack_and_judge(program, segments, values, lowering, model, record)
    if plan.is_decode:
        with model.twins.moving():
            offloaded.arrange(program, values, config, sum(packed[s].nbytes for p in segments for s in p.packed))
    streamer = Streamer(offloaded, program, values, config.offload)
    settings = inductor_settings(record.mode, whole=False)
    compiler = SegmentCompiler(lowering, settings)
    steps: dict[Segment, Step] = {}
    wanted = HeadVocab.of(program)
    with record.stage("compiling"):
        for segment in tqdm(segments, desc="river: compiling segments", unit="segment", leave=False, delay=1):
            weights = [tensor for site in segment.packed for tensor in packed[site].tensors]
            record.packed_bytes += sum(tensor.nbytes for tensor in weights)
            record.token_bytes += bytes_of_token(segment, weights, len(segment.inputs))
            weights += [wanted.list] if wanted is not None and segment.chooses_logits else []
            weights += verdicts.of(segment.depth) if verdicts is not None and segment.decides else []
            steps[segment] = streamer.step(segment, compiler.compile(segment, weights), weights, program.slots)
    record.describe(program, compiler.compiled)
    record.twins = tuple(packed.values())
    note_ranks(program, record, ranks)
    trace_artifact(f"river_{plan.kind}_report", lambda: "\n".join(graph_lines(record)))
    stats = model.exit_stats
    stats.num_blocks = plan.num_blocks
    fill = fill_type(program)
    runner: Runner = PlainRunner(program, steps, fill)
    if ranks.several:
        runner = RankRunner(program, steps, ranks, config.check_ranks)
    if device is not None:
        launcher = CaptureCache(program, device, captures, config.max_captures)
        runner = captured_runner(program, steps, launcher, policy, config.launch_ahead, verdicts, plain=runner)
    watch = None
    if packed:
        adopt_all = functools.partial(adopt, model)
        watch = TwinWatch(packed, program.slots, model.twins, lambda: model.statistics, adopt_all)
    executor = RiverExecutor(
        program,
        runner,
        policy,
        stats,
        model.exit_memories,
        fill,
        model.sequences,
        watch,
        streamer.forget,
        wanted,
        record.entry,
        record.inputs,
    )
    record.executor = weakref.ref(executor)
    return executor


def _exit_policy(program: RiverProgram, config: RiverConfig) -> ExitPolicy:
    """Returns when a graph's tokens leave. No pass needs to have run.

    Raises:
        OptionError: the criterion reads logits and the model returns none. (None are read where no token leaves, as in
            an accelerated model whose graph breaks before the head.)
    """
    policy = config.exit_policy(program.plan)
    if policy.needs_entropy(program.plan) and not policy.never_leaves and logits_of(program) is None:
        raise OptionError(
            f"criterion={config.criterion!r} reads the logits, and this model returns none (its output is as wide as "
            "its hidden state); compile the model with its head, or use criterion='similarity'"
        )
    return policy


def _verdicts(
    plan: DecoderPlan, policy: ExitPolicy, config: RiverConfig, device: CaptureDevice | None, captures: CaptureLog
) -> DeviceExitState | None:
    """Returns what decisions on the device read and write, None where the host decides; `captures` may say why."""
    if device is None or config.launch_ahead != "device" or not plan.is_decode:
        return None
    return verdicts_for(plan, policy, device, captures)


def _rewritten(program: RiverProgram, config: RiverConfig, passes: Sequence[Pass]) -> RiverProgram:
    """Runs the passes, and writes what they did where that was asked for."""
    dump = PassDump(config.dump_dir, program.plan.kind)
    result = run_passes(program, passes, dump.after_pass)
    if isinstance(result, Refusal):  # the river's own passes refuse nothing
        raise OptionError(f"this fill cannot be used here: {result}")
    dump.program(result)
    if dump.folder is not None:
        log.info("wrote the rewritten graph to %s", dump.folder)
    return result


def _pack_and_judge(
    program: RiverProgram,
    segments: Sequence[Segment],
    values: Mapping[fx.Node, Any],
    lowering: Lowering,
    model: ModelRecord,
    record: GraphRecord,
) -> dict[LinearSite, PackedSite]:
    """Returns the packed weights of the twins that tokens can reach; where there are any, judges them."""
    with record.stage("packing"):
        packed = _pack(program, segments, values, record.config, lowering, model)
    if packed:
        warn_of_slow_lowering(lowering, program.plan.device)
        with record.stage("judging"):
            model.twins.judge(packed.values(), model.statistics)
    return packed


def _pack(
    program: RiverProgram,
    segments: Sequence[Segment],
    values: Mapping[fx.Node, Any],
    config: RiverConfig,
    lowering: Lowering,
    model: ModelRecord,
) -> dict[LinearSite, PackedSite]:
    """Returns the packed weights of segments of a rewritten program."""
    how = twinning(config, lowering)
    if how is None or not program.twins:
        return {}
    sites = [site for segment in segments for site in segment.packed]
    savable = [site for segment in (*program.twins, program.river_head) if segment for site in segment.packed]
    names = {site.name for site in (*savable, *twin_sites(program.head, how))}
    return model.twins.pack(sites, values, config, model.statistics, names, savable)
