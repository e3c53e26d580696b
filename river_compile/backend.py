"""The TorchDynamo backend: a traced graph in, a callable out.

A decoder without gradients becomes a RiverExecutor. Every other graph goes to Inductor, or runs operator by operator if
nothing compiles, with one warning for each reason.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

from river_compile.agreement import Agreement
from river_compile.building.build import build
from river_compile.building.graph_record import BROKE, GraphRecord, Graphs
from river_compile.config import RiverConfig, check_mode
from river_compile.errors import RiverWarning, UnsupportedGraphError
from river_compile.kernels.messages import with_id
from river_compile.kernels.native.build import CannotBuild
from river_compile.lowering.lower import no_compiler
from river_compile.passes.nodes import input_name, is_parameter
from river_compile.passes.normalize import normalized
from river_compile.passes.program import Refusal
from river_compile.passes.segments import recognise
from river_compile.record import find_record, record_of
from river_compile.runtime.executor import RiverExecutor
from river_compile.twins.making import Statistics
from river_compile.twins.pack import TwinWeights
from river_compile.upstream.dynamo import (
    OwnCall,
    build_libraries_atomically,
    compiled_module,
    guard_model,
    last_graph_break,
    traces_whole_call,
    untraceable,
)
from river_compile.upstream.tensors import local_of
from river_compile.upstream.transformers import disable_auto_compile
from river_compile.upstream.versions import warn_of_untested

if TYPE_CHECKING:
    from river_compile.runtime.tensor_parallel import Ranks

log = logging.getLogger("river_compile")
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
    model, ranks, local = record_of(owned), shared_by(owned), frozenset[fx.Node]()
    config = config_for(options, ranks)
    build_libraries_atomically()
    if owner is not None:
        model.of(Statistics).own.attach(owner)
    if ranks is not None:
        model.put_as(Agreement, ranks)
        twins = model.of(TwinWeights)  # other processes make other parts of them
        twins.stores = twins.background.enabled = False
        local = ranks.take_shards(traced, mode)
        values |= {node: local_of(values[node]) for node in local}
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
            if ranks is None:
                return executor
            ranks.warn_of_16_bits(executor.program)
            return ranks.wrap(executor, [*values], local)
        except CannotBuild as error:
            why = " ".join(str(error).split())
            program = unbuildable = Refusal(f"{why}. If the compiler is the cause, set CXX to another g++ or clang++")
    graph.refusal = (
        str(program) if unbuildable else f"{program}{_graph_break(graph_module, owner, model.find(OwnCall))}"
    )
    plainly = config.runs_by_operator or no_compiler(config, example_inputs, rewritten=False) is not None
    is_new = graph.refusal not in {other.refusal for other in graphs if other is not graph}
    _report_refusal(graph.refusal, "RC100" if unbuildable else "RC021", plainly, is_new, config)
    if plainly:
        return graph_module.forward
    from river_compile.lowering.inductor import compile_whole

    return compile_whole(graph_module, example_inputs, mode)


def shared_by(parameters: Iterable[object]) -> Ranks | None:
    """Return the processes that share a model's parameters, None for this one alone."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    from river_compile.runtime.tensor_parallel import ranks_of

    return ranks_of(parameters)


def config_for(options: Mapping[str, object] | None, ranks: Ranks | None) -> RiverConfig:
    """Return the options of a model that these processes share, checked; raise an OptionError."""
    config = RiverConfig.from_options(options)
    return config if ranks is None else ranks.fitted(config, {*(options or ())})


def _report_refusal(refusal: str, id: str, plainly: bool, is_new: bool, config: RiverConfig) -> None:
    """Raise or warn that a graph is not rewritten, by an option; a reason that a model had before is not repeated."""
    failed = "Could not compile River's C++ kernels" if id == "RC100" else "backend='river' cannot rewrite this graph"
    if config.on_unsupported == "raise":
        raise UnsupportedGraphError(f"{failed}: {refusal}", id="RC100" if id == "RC100" else "RC020")
    if is_new:
        runs = "the model runs uncompiled" if plainly else "Inductor runs the model, without River"
        warnings.warn(with_id(id, f"{failed}, so {runs}: {refusal}"), RiverWarning, stacklevel=2)


def _graph_break(graph_module: fx.GraphModule, model: nn.Module | None, own: OwnCall | None) -> str:
    """Return where Dynamo broke the model's code, if this graph is a piece of it."""
    why = getattr(graph_module, "compile_subgraph_reason", None)
    if why is None or not why.graph_break:
        why = None if model is None else last_graph_break(model, own)
    if why is None:
        return ""
    line = f" ({Path(why.user_stack[-1].filename).name}:{why.user_stack[-1].lineno})" if why.user_stack else ""
    return f", as {BROKE}: {why.reason.partition(chr(10))[0]}{line}"


def executors_of(model: nn.Module) -> list[RiverExecutor]:
    """Return the live executors of a model, in the order of their compilation."""
    record = find_record(model)
    graphs = [] if record is None else record.of(Graphs)
    return [executor for graph in graphs if isinstance(executor := graph.executor(), RiverExecutor)]


def obstacle(config: RiverConfig, model: nn.Module | None, example_inputs: Sequence[Any]) -> Refusal | None:
    """Return why no graph of a model can be rewritten, whatever it computes; None if it may be."""
    why = "" if model is None else untraceable(model)
    if why:
        return Refusal(why)
    torch_alone = config.runs_by_operator and not config.packs_twins
    if not torch_alone and any(_is_float64_weight(x) for x in example_inputs):
        return Refusal("its weights are float64, which no kernel of River takes; call model.to(torch.bfloat16)")
    return _needs_gradients(example_inputs)


def _is_float64_weight(x: Any) -> bool:
    return isinstance(x, nn.Parameter) and x.dtype == torch.float64


def _needs_gradients(example_inputs: Sequence[Any]) -> Refusal | None:
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs):
        return Refusal("the graph needs gradients; run generation under torch.no_grad() or torch.inference_mode()")
    return None
