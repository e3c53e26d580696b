"""Lists of passes: no pass changes its input, and the table lists those that ran."""

import logging
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from river_compile.building.choose import choose, passes_for
from river_compile.config import RiverConfig
from river_compile.passes.edits import PassRecord, run_passes, table
from river_compile.passes.program import RiverProgram
from tests.passes.decoders import Spelling, planned
from tests.passes.graphs import texts
from tests.support.examples import examples
from tests.support.lowerings import FUSED, OPERATORS, UNQUANTIZED

PLAIN = Spelling(blocks=3, batch=1)
OPTIONS = (
    {"first_exit": 1},
    {"first_exit": 1, "quantizer": "awq", "lm_head": "w4"},
    {"criterion": "confidence"},
)


@examples(30)
@given(
    options=st.sampled_from(OPTIONS),
    lowering=st.sampled_from([FUSED, OPERATORS, UNQUANTIZED, replace(FUSED, layout=None)]),
    norm=st.sampled_from(["rms", "layer"]),
    parallel=st.booleans(),
    bias=st.sampled_from(["", "all"]),
)
def test_a_pass_leaves_the_program_it_was_given(options, lowering, norm, parallel, bias):
    """No pass changes graphs, inputs or outputs of an earlier program."""
    program = planned(replace(PLAIN, norm=norm, parallel=parallel, bias=bias))
    seen: list[tuple[RiverProgram, dict[str, list[str]]]] = [(program, texts(program))]
    passes = passes_for(choose(program, RiverConfig(**options), lowering), program.plan)
    assert passes
    result = run_passes(program, passes, lambda record: seen.append((record.after, texts(record.after))))
    assert isinstance(result, RiverProgram)
    for earlier, expected in seen:
        assert texts(earlier) == expected
        for segment in earlier.segments:
            segment.graph.lint()
            assert len(segment.graph.output_node().args[0]) == len(segment.outputs) + segment.has_score


def test_the_table_says_what_ran(caplog):
    """One line for each pass: its name, the operations that it added, and the first line of its docstring."""
    program = planned(PLAIN)
    records: list[PassRecord] = []
    with caplog.at_level(logging.DEBUG, logger="river_compile.passes"):
        choices = choose(program, RiverConfig(first_exit=1), OPERATORS)
        run_passes(program, passes_for(choices, program.plan), records.append)
    lines = table(records).splitlines()
    assert [line.split()[0] for line in lines] == ["pass", "twin_layers", "one_row_head", "exit_checks"]
    assert lines[3].split()[3] == "+2"  # a check after each of the candidates 1 and 2
    assert all(
        record.text.endswith(".") and record.text in line for record, line in zip(records, lines[1:], strict=True)
    )
    assert lines[1] in caplog.text
