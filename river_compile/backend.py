"""The TorchDynamo backend: a traced graph in, a callable out.

A decoder without gradients becomes a RiverExecutor. Every other graph goes to Inductor, or runs operator by operator if
nothing compiles, with one warning for each reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from river_compile.agreement import Agreement
from river_compile.building.build import build
from river_compile.building.graph_record import GraphRecord, Graphs
from river_compile.building.unsupported import graph_break, obstacle, runs_instead
from river_compile.config import RiverConfig, check_mode
from river_compile.kernels.native.build import CannotBuild
from river_compile.lowering.lower import no_compiler
from river_compile.passes.nodes import input_name, is_parameter
from river_compile.passes.normalize import normalized
from river_compile.passes.program import Refusal
from river_compile.passes.segments import recognise
from river_compile.record import find_record, record_of
from river_compile.runtime.executor import RiverExecutor
from river_compile.runtime.processes import processes_of
from river_compile.twins.making import Statistics
from river_compile.twins.pack import TwinWeights
from river_compile.upstream.dynamo import (
    OwnCall,
    build_libraries_atomically,
    compiled_module,
    guard_model,
    traces_whole_call,
)
from river_compile.upstream.transformers import disable_auto_compile
from river_compile.upstream.versions import warn_of_untested

warn_of_untested()
disable_auto_compile()


def river(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, object] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend of ``torch.compile(model, backend="river", options=..., mode=...)``.

    Args:
        graph_module: the traced graph.
        example_inputs: its inputs, real tensors.
        options: fields of :class:`RiverConfig`.
        mode: passed on to Inductor.

    Raises:
        OptionError: (a ``ValueError``) an unknown option or a bad value.
        UnsupportedGraphError: the graph is unsupported and ``on_unsupported="raise"``, or a weight is not finite.
    """
    mode = check_mode(mode)
    traced = normalized(graph_module)
    values = dict(zip(traced.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
    parameters = [node for node in values if is_parameter(node)]
    owner = compiled_module(river)  # a piece of a broken graph reads some of its parameters
    owned = [*(values[node] for node in parameters), *(owner.parameters() if owner else ())]
    model, processes = record_of(owned), processes_of(owned)
    config = processes.fitted(RiverConfig.from_options(options), options or ())
    build_libraries_atomically()
    if owner is not None:
        model.of(Statistics).own.attach(owner)
    if processes.several:
        model.put_as(Agreement, processes)
        twins = model.of(TwinWeights)  # other processes make other parts of them
        twins.stores = twins.background.enabled = False
    local = processes.take_shards(traced, values, mode)
    graph = GraphRecord(config, mode=mode, inputs=tuple(map(input_name, values)))
    graphs = model.of(Graphs)
    graphs.add(graph)
    for parameter in parameters[:1]:
        guard_model(parameter, counts=len(graphs) > torch._dynamo.config.recompile_limit)
        graph.is_whole_call = traces_whole_call(owner, model.find(OwnCall))
    unbuildable = no_compiler(config, example_inputs, rewritten=True)
    with graph.stage("rewriting"):
        refusal = unbuildable or obstacle(config, owner, example_inputs)
        program = refusal or recognise(traced, twins=config.packs_twins)
    if not isinstance(program, Refusal):
        try:
            executor = build(program, values, model, graph)
            return processes.wrap(executor, executor.program, [*values], local)
        except CannotBuild as error:
            why = " ".join(str(error).split())
            program = unbuildable = Refusal(f"{why}. If the compiler is the cause, set CXX to another g++ or clang++")
    where = "" if unbuildable else graph_break(graph_module, owner, model.find(OwnCall))
    graph.refusal = f"{program}{where}"
    return runs_instead(graph_module, example_inputs, graph, graphs, "RC100" if unbuildable else "RC021")


def executors_of(model: nn.Module) -> list[RiverExecutor]:
    """Return the live executors of a model, in the order of their compilation."""
    record = find_record(model)
    graphs = [] if record is None else record.of(Graphs)
    return [executor for graph in graphs if isinstance(executor := graph.executor(), RiverExecutor)]
