"""A list of passes, and how it is run: each turns a program into another one.

A pass is a plain function of a :class:`RiverProgram`; a factory makes it where it needs settings. The first line of its
docstring says what the program is like afterwards. No pass changes a graph of the program that it is given.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from river_compile.passes.program import RiverProgram

log = logging.getLogger("river_compile.passes")

Pass = Callable[[RiverProgram], RiverProgram]


@dataclass(frozen=True)
class PassRecord:
    """One pass that ran: its name, description, time, and the programs before and after it."""

    name: str
    text: str
    seconds: float
    before: RiverProgram
    after: RiverProgram


def run_passes(
    program: RiverProgram, passes: Sequence[Pass], observe: Callable[[PassRecord], None] | None = None
) -> RiverProgram:
    """Runs the passes in order and returns the last one's program. `observe` is called after each."""
    records = []
    for step in passes:
        start = time.perf_counter()
        result = step(program)
        text = (step.__doc__ or "").partition("\n")[0]
        records.append(PassRecord(step.__name__, text, time.perf_counter() - start, program, result))
        if observe is not None:
            observe(records[-1])
        program = result
    if log.isEnabledFor(logging.DEBUG):
        log.debug("passes\n%s", table(records))
    return program


def table(records: Sequence[PassRecord]) -> str:
    """Returns a table of the passes: milliseconds, operations afterwards, their change, and descriptions."""
    lines = [f"{'pass':<18} {'ms':>8} {'ops':>7} {'change':>7}  what it does"]
    for record in records:
        ops = _num_ops(record.after)
        change = ops - _num_ops(record.before)
        lines.append(f"{record.name:<18} {record.seconds * 1e3:>8.1f} {ops:>7} {change:>+7}  {record.text}")
    return "\n".join(lines)


def _num_ops(program: RiverProgram) -> int:
    return sum(n.op not in ("placeholder", "output") for s in program.segments for n in s.graph.nodes)
