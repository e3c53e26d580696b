"""The tool that breaks the product: its table fits the sources, and a trial tells a test that notices from one that
does not."""

import re
import subprocess
from pathlib import Path

import pytest

from tools.mutations.__main__ import main, reported
from tools.mutations.table import MUTATIONS
from tools.mutations.trial import ROOT, Mutation, Outcome


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.id)
def test_what_a_mutation_replaces_occurs_once_and_python_takes_what_it_puts_there(mutation):
    assert mutation.unfit() == ""
    source = (ROOT / mutation.file).read_text(encoding="utf-8")
    mutated = source.replace(mutation.old, mutation.new)
    assert mutated != source
    if mutation.file.endswith(".py"):
        compile(mutated, mutation.file, "exec")
    assert mutation.tests
    for test in mutation.tests:
        path, _, name = test.partition("::")
        text = (ROOT / path).read_text(encoding="utf-8")
        assert not name or re.search(rf"(def|class) {name.rpartition('::')[2]}\b", text)


def test_no_two_mutations_share_a_name_or_a_change():
    assert len({mutation.id for mutation in MUTATIONS}) == len(MUTATIONS)
    assert len({(mutation.file, mutation.old) for mutation in MUTATIONS}) == len(MUTATIONS)


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A checkout of one function, one test of it among the likely ones, and one among the rest."""
    (tmp_path / "toy.py").write_text("def double(x):\n    return 2 * x\n\n\ndef half(x):\n    return x / 2\n")
    (tmp_path / "test_toy.py").write_text("import toy\n\ndef test_double():\n    assert toy.double(3) == 6\n")
    (tmp_path / "test_rest.py").write_text("import toy\n\ndef test_half():\n    assert toy.half(6) == 3\n")
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    return tmp_path


def change(name: str, old: str, new: str) -> Mutation:
    return Mutation(name, "toy.py", old, new, "nothing is right", ("test_toy.py",))


def test_a_failing_test_is_named_and_a_survivor_meets_the_rest_if_asked(toy, capsys):
    noticed, survivor = change("times", "2 * x", "3 * x"), change("by", "x / 2", "x / 3")
    report = toy / "report.md"
    report.write_text("# Before\n")
    assert main(["--jobs", "1", "--report", str(report)], (noticed, survivor), toy) == 1
    printed = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"times +\d+ s  test_toy.py::test_double", printed[0])
    assert re.fullmatch(r"by +\d+ s  NOT NOTICED", printed[1])
    assert printed[2] == "1 of 2 mutations were noticed"
    assert "| `by` | nothing is right | `toy.py` | **nothing** |" in report.read_text()
    assert main(["--whole", "--only", "by", "--report", str(report)], (noticed, survivor), toy) == 0
    rows = [line for line in report.read_text().splitlines() if line.startswith("| `")]
    assert [row.split(" | ")[-1] for row in rows] == ["`test_toy.py::test_double` |", "`test_rest.py::test_half` |"]
    assert report.read_text().startswith("# Before\n")
    assert (toy / "toy.py").read_text().count("2") == 2, "the checkout itself was changed"


def test_tests_that_cannot_run_notice_nothing(toy, capsys):
    assert main([], [change("broken", "def double(x):", "def double(x:")], toy) == 2
    assert "SyntaxError" in capsys.readouterr().out


def test_without_a_program_that_its_tests_need_a_mutation_is_not_tried(toy, capsys):
    needy = change("needy", "2 * x", "3 * x")._replace(needs=("git", "no-such-program"))
    assert main([], (needy,), toy) == 2
    assert "not installed: no-such-program" in capsys.readouterr().out


def test_a_mutation_that_does_not_fit_is_named_and_nothing_runs(toy, capsys):
    twice, gone = change("twice", "return", "yield"), change("gone", "x ** 2", "x")
    assert main([], (change("times", "2 * x", "3 * x"), twice, gone), toy) == 2
    assert capsys.readouterr().out.splitlines() == [
        "twice: toy.py has 2 times, not once: 'return'",
        "gone: toy.py has 0 times, not once: 'x ** 2'",
    ]


def test_a_report_forgets_mutations_that_are_gone_and_says_which_were_not_tried():
    first, second = change("first", "a", "b"), change("second", "c", "d")
    before = reported("", [Outcome(first, "test_a", "", 1.0)], (first,))
    after = reported(before, [Outcome(second, "", "no tests", 1.0)], (second, change("third", "e", "f")))
    assert "first" not in after
    assert [line.split(" | ")[-1] for line in after.splitlines() if line.startswith("| `")] == [
        "could not be tried |",
        "not tried |",
    ]
