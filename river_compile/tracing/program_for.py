"""From a pass to the program that runs it: known, on disk, derived, stamped from a few layers, or the graph of Dynamo.

The last is for models without an identity, whose guards only Dynamo checks, and for the first pass of others. A call of
the model then ends at the graph that stands for all of it, before that runs. Not handled, so the call runs as that of
the bare backend: code between graphs and effects, which only Dynamo can run, and graphs that read other tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from river_compile.building.assemble import rebuild
from river_compile.building.build import build
from river_compile.building.graph_record import GraphRecord, Graphs, Origin
from river_compile.building.packing import waits_for_file
from river_compile.building.unsupported import obstacle
from river_compile.collector import collector_paused
from river_compile.kernels.native.build import CannotBuild
from river_compile.lowering.lower import no_compiler
from river_compile.passes.program import Input, Program, Refusal, RiverProgram
from river_compile.progress import stage_shown
from river_compile.record import ModelRecord
from river_compile.runtime.executor import Reached, RiverExecutor, through_dynamo
from river_compile.tracing.forward import Forward
from river_compile.tracing.new_program import NewProgram, decode_variant, stamped_program
from river_compile.tracing.programs import ProgramCache
from river_compile.twins.making import Statistics
from river_compile.upstream.transformers import is_transformers_model

log = logging.getLogger("river_compile.tracing")


class Bindable(NamedTuple):
    """An executor, and the inputs of its program in one call."""

    executor: RiverExecutor
    args: Sequence[Any]


class ModelRan(NamedTuple):
    """What a call of the model returned that no program stands for."""

    outputs: Any
    executor: RiverExecutor | None  # of a graph that it reached; None if it reached none of River's
    hidden: Tensor | None = None  # its last hidden states, as `StepState.hidden`


def program_for(
    forward: Forward,
    record: ModelRecord,
    programs: ProgramCache | None,
    call: Callable[[], Any],
    last_token: bool = False,
    keeps_hidden: bool = False,
) -> Bindable | ModelRan:
    """Return the program of a call and its inputs, before the call runs.

    Args:
        forward: the call.
        record: the model's.
        programs: those of the model's present identity; None: it has none.
        call: makes the call, through Dynamo.
        last_token: whether a graph that runs may omit all logits but the last token's.
        keeps_hidden: whether the last hidden states of one that runs are wanted.
    """
    found = None if programs is None else _by_identity(forward, record, programs)
    return found or _by_guards(forward, record, programs, call, last_token, keeps_hidden)


def run_model(call: Callable[[], Any], last_token: bool = False, keeps_hidden: bool = False) -> ModelRan:
    """Run a call that no program stands for: on a cache that grows, or of a prompt with inputs that are not known."""
    with through_dynamo(None, last_token, keeps_hidden) as dynamo:
        outputs = call()
    return ModelRan(outputs, dynamo.reached, dynamo.hidden)


def _by_identity(forward: Forward, record: ModelRecord, programs: ProgramCache) -> Bindable | None:
    """Return a program that is known, or that follows from a known one or a few layers."""
    try:
        with programs.lock:
            found = _known(forward, record, programs) or _derived(forward, record, programs)
            return found or _stamped(forward, record, programs)
    except CannotBuild as why:  # the backend reports it
        log.info("known programs are not used: %s", why)
        return None


def _known(forward: Forward, record: ModelRecord, programs: ProgramCache) -> Bindable | None:
    """Return the first program of the call's signature that accepts its sizes; one that was read is built now."""
    signature = forward.signature()
    for known in [*programs.of(signature)]:
        args = forward.read(known.program.inputs, known.program.conditions)
        if args is None:
            continue
        if known.executor is None:
            if waits_for_file(known.program, args, record, programs.options):
                programs.forget(signature, known)
                continue
            known.executor = _built(known.program, known.program.inputs, args, "stored", forward, record, programs)
            programs.touch()
        return Bindable(known.executor, args)
    return None


def _derived(forward: Forward, record: ModelRecord, programs: ProgramCache) -> Bindable | None:
    """Build the program for one token from a known one for several; None if that is not possible."""
    if not forward.is_one_token or not is_transformers_model(forward.model):
        return None
    for known in programs.of(forward.signature(one_token=False)):
        if known.traced is None:
            continue
        with collector_paused():
            new = decode_variant(known.traced, known.program.inputs, known.template)
        found = None if new is None else _new(new, "derived", forward, record, programs)
        if found is not None:
            return found
    return None


def _stamped(forward: Forward, record: ModelRecord, programs: ProgramCache) -> Bindable | None:
    """Build the program from a trace of a few layers; None if the whole model must be traced."""
    model, signature = forward.model, forward.signature()
    if signature in programs.not_stamped or not is_transformers_model(model) or torch.is_grad_enabled():
        return None
    with stage_shown("tracing"), collector_paused():
        new = stamped_program(forward, twins=programs.config.packs_twins)
    if isinstance(new, Refusal):
        log.info("all layers of %s are traced: %s", type(model).__name__, new)
        programs.not_stamped.add(signature)
        return None
    return _new(new, "stamped", forward, record, programs)


def _new(
    new: NewProgram, origin: Origin, forward: Forward, record: ModelRecord, programs: ProgramCache
) -> Bindable | None:
    """Build a program that no pass has seen and add it to the known ones; None if it does not accept the call."""
    args = forward.read(new.inputs, new.conditions)
    if args is None:
        return None
    executor = _built(new.found, new.inputs, args, origin, forward, record, programs)
    executor.program = new.copy_sources(executor.program)
    programs.add(forward.signature(), executor, new.found, new.template)
    return Bindable(executor, args)


def _built(
    found: Program | RiverProgram,
    inputs: Sequence[Input],
    args: Sequence[Any],
    origin: Origin,
    forward: Forward,
    record: ModelRecord,
    programs: ProgramCache,
) -> RiverExecutor:
    """Build a program for a call; raise a CannotBuild for what the backend does not support, which reports it."""
    config, model = programs.options, forward.model
    refusal = (
        no_compiler(config, args, rewritten=True) or obstacle(config, model, args) if origin == "stamped" else None
    )
    if refusal is not None:
        raise CannotBuild(str(refusal))
    record.of(Statistics).own.attach(model)
    graph = GraphRecord(config, inputs=tuple(given.name for given in inputs), origin=origin)
    if isinstance(found, Program):
        executor = rebuild(found, args, record, graph)
    else:
        executor = build(found, dict(zip(found.inputs, args, strict=True)), record, graph)
    record.of(Graphs).append(graph)
    return executor


def _by_guards(
    forward: Forward,
    record: ModelRecord,
    programs: ProgramCache | None,
    call: Callable[[], Any],
    last_token: bool,
    keeps_hidden: bool,
) -> Bindable | ModelRan:
    """Return the program of the graph that Dynamo has or makes for a call; if that is not all of it, the call runs."""
    graphs = record.of(Graphs)

    def stands_for_call(executor: RiverExecutor, args: Sequence[Any]) -> bool:
        graph = graphs.of(executor)
        if graph is None or graph.traced is None or not (graph.is_whole_call and len(graph.traced.returned) == 1):
            return False
        located = forward.with_sources(executor.program, graph.traced, args)
        if isinstance(located, Refusal):
            log.info("such passes go through the model each time: %s", located)
            return False
        executor.program = located
        if programs is not None:
            programs.add(forward.signature(), executor, graph.traced)
        return True

    try:
        with stage_shown("tracing"), through_dynamo(stands_for_call, last_token, keeps_hidden) as dynamo:
            outputs = call()
        return ModelRan(outputs, dynamo.reached, dynamo.hidden)
    except Reached as reached:
        return Bindable(reached.executor, reached.inputs)
