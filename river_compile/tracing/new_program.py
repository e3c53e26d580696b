"""Programs that no pass has seen: stamped from a trace of a few layers, or derived from a program of several tokens."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import NamedTuple

import sympy
from torch import fx

from river_compile.passes.decoder import with_size
from river_compile.passes.freeze import size_conditions, to_example
from river_compile.passes.nodes import input_name, is_parameter, value_of
from river_compile.passes.program import Input, Program, Refusal, RiverProgram, Source
from river_compile.passes.segments import recognise
from river_compile.passes.stamp import stamp
from river_compile.tracing.forward import Forward
from river_compile.tracing.template import trace_template

log = logging.getLogger("river_compile.tracing")


class NewProgram(NamedTuple):
    """A program before any pass, whose inputs have sources."""

    found: RiverProgram
    inputs: tuple[Input, ...]  # with sources
    conditions: tuple[sympy.Basic, ...]

    def copy_sources(self, program: Program) -> Program:
        """Return what the passes made of it, with the sources of its inputs."""
        pairs = zip(program.inputs, self.inputs, strict=True)
        inputs = tuple(replace(given, source=known.source) for given, known in pairs)
        return replace(program, inputs=inputs, conditions=self.conditions)


def stamped_program(forward: Forward, twins: bool) -> NewProgram | Refusal:
    """Return the program of a pass, stamped from a trace of a few layers; or why that is not possible."""
    template = trace_template(forward)
    stamped = template if isinstance(template, Refusal) else stamp(template)
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
    return NewProgram(found, located, size_conditions(map(value_of, found.inputs)))


def _name(node: fx.Node, source: Source) -> str:
    """Return an input's name as a trace of the whole model has it."""
    if source.kind == "cache":
        return f"['cache'].layers[{source.layer}].{source.name}"
    return source.name if source.kind == "model" else input_name(node)


def decode_variant(program: Program, traced: RiverProgram) -> NewProgram | None:
    """Return the variant of a program for one token per row; None, with a line in the log, if there is none."""
    length = traced.plan.query_length
    if isinstance(length, int) or not length.node.expr.is_Symbol:
        return None
    symbol = length.node.expr
    try:
        found = recognise(with_size(traced.plan.graph, symbol, 1), twins=False)
    except Exception as error:  # operators may raise anything
        found = Refusal(f"{type(error).__name__}: {error}")
    if isinstance(found, Refusal):
        log.info("the program for several tokens has no variant for one token: %s", found)
        return None
    left = {node.name for node in found.inputs}
    inputs = (given for node, given in zip(traced.inputs, program.inputs, strict=True) if node.name in left)
    assumed = size_conditions(map(value_of, found.inputs))
    conditions = tuple(condition for condition in assumed if symbol not in condition.free_symbols)
    return NewProgram(found, tuple(inputs), conditions)
