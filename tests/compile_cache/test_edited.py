"""Programs and twins from elsewhere, edited and with the right hash: refused, or harmless."""

import json
import random

import pytest

from river_compile.compile_cache import codec
from tests.support import edited


def test_edited_files_are_refused_or_harmless(tmp_path):
    numbers = [random.Random(number) for number in range(20)]
    assert {edited.try_program(rng) for rng in numbers} == {"passed", "refused"}
    assert {edited.try_twins(rng, tmp_path) for rng in numbers} == {"passed", "refused"}


def test_text_of_a_program_that_became_code_is_found(monkeypatch):
    """The name of a keyword; quoted, as an argument's value, it is none."""
    edited.check_code("def forward(self, x):\n    return f(x, 'river_forged()')")
    content = json.loads(edited.program())
    keyword = next(
        argument
        for code in content["codes"]
        for node in code["module"]["graph"]
        for argument in (node[3]["dict"] if node[0] == "call_function" else ())
    )
    keyword[0] = "x = river_forged, y"
    assert edited.read_program(content) == "refused"
    monkeypatch.setattr(codec, "_check_identifiers", lambda *names: None)
    with pytest.raises(AssertionError, match="text became code"):
        edited.read_program(content)
