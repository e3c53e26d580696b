"""Programs that no pass has seen: stamped from a trace of a few layers, or derived from a program of several tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import sympy
from torch import fx

from river_compile.passes.decoder import with_size
from river_compile.passes.freeze import size_conditions, to_example
from river_compile.passes.nodes import input_name, is_parameter, value_of
from river_compile.passes.program import Input, Program, Refusal, RiverProgram, Source
from river_compile.passes.segments import recognise
from river_compile.passes.stamp import Template, stamp
from river_compile.tracing.forward import Forward
from river_compile.tracing.template import trace_template

log = logging.getLogger("river_compile.tracing")


class NewProgram(NamedTuple):
    """A program before any pass, whose inputs have sources."""

    found: RiverProgram
    inputs: tuple[Input, ...]  # with sources
    conditions: tuple[sympy.Basic, ...]
    template: Template | None = None  # that it was stamped from

    def copy_sources(self, program: Program) -> Program:
        """Return what the passes made of it, with the sources of its inputs."""
        pairs = zip(program.inputs, self.inputs, strict=True)
        inputs = tuple(replace(given, source=known.source) for given, known in pairs)
        return replace(program, inputs=inputs, conditions=self.conditions)


def stamped_program(forward: Forward, twins: bool) -> NewProgram | Refusal:
    """Return the program of a pass, stamped from a trace of a few layers; or why that is not possible."""
    template = trace_template(forward)
    return template if isinstance(template, Refusal) else _stamped_from(template, twins)


def _stamped_from(template: Template, twins: bool) -> NewProgram | Refusal:
    stamped = stamp(template)
    if isinstance(stamped, Refusal):
        return stamped
    found = recognise(stamped.graph_module, twins)
    if isinstance(found, Refusal):
        return found
    if len(found.returned) != 1:
        return Refusal("the graph returns more than logits")
    located = tuple(
        Input(_name(node, source), to_example(value_of(node)), is_parameter(node), False, source)
        for node, source in zip(found.inputs, stamped.sources, strict=True)
    )
    return NewProgram(found, located, size_conditions(map(value_of, found.inputs)), template)


def _name(node: fx.Node, source: Source) -> str:
    """Return an input's name as a trace of the whole model has it."""
    if source.kind == "cache":
        return f"['cache'].layers[{source.layer}].{source.name}"
    return source.name if source.kind == "model" else input_name(node)


def decode_variant(traced: RiverProgram, inputs: Sequence[Input], template: Template | None) -> NewProgram | None:
    """Return the variant of a program for one token per row; None, with a line in the log, if there is none.

    `traced` is the program before its passes, `inputs` are its inputs, and `template` is what it was stamped from.
    """
    length = traced.plan.query_length
    if isinstance(length, int) or not length.node.expr.is_Symbol:
        return None
    symbol = length.node.expr
    try:
        if template is None:
            new = _of_one_token(traced, inputs, symbol)
        else:  # a few layers take less time than all
            new = _stamped_from(_template_of_one_token(template, symbol), twins=False)
    except Exception as error:  # operators may raise anything
        new = Refusal(f"{type(error).__name__}: {error}")
    if isinstance(new, Refusal):
        log.info("the program for several tokens has no variant for one token: %s", new)
        return None
    conditions = (condition for condition in new.conditions if symbol not in condition.free_symbols)
    return new._replace(conditions=tuple(conditions))


def _of_one_token(traced: RiverProgram, inputs: Sequence[Input], symbol: sympy.Symbol) -> NewProgram | Refusal:
    found = recognise(with_size(traced.plan.graph, symbol, 1), twins=False)
    if isinstance(found, Refusal):
        return found
    left = {node.name for node in found.inputs}
    kept = (given for node, given in zip(traced.inputs, inputs, strict=True) if node.name in left)
    return NewProgram(found, tuple(kept), size_conditions(map(value_of, found.inputs)))


def _template_of_one_token(template: Template, symbol: sympy.Symbol) -> Template:
    graph_module = with_size(template.graph_module.graph, symbol, 1)
    by_name = {node.name: source for node, source in template.sources.items()}
    inputs = graph_module.graph.find_nodes(op="placeholder")
    return replace(template, graph_module=graph_module, sources={node: by_name[node.name] for node in inputs})
