"""The tool that breaks kernels: its table fits the sources, and a trial names the test that notices."""

import re
import subprocess

import pytest

from tools.mutations.__main__ import main
from tools.mutations.table import MUTATIONS
from tools.mutations.trial import ROOT, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.id)
def test_what_a_mutation_replaces_occurs_once_and_python_takes_what_it_puts_there(mutation):
    source = (ROOT / mutation.file).read_text(encoding="utf-8")
    assert source.count(mutation.old) == 1
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


def test_a_failing_test_is_named_and_a_survivor_is_reported(tmp_path, capsys):
    (tmp_path / "toy.py").write_text("def double(x):\n    return 2 * x\n\n\ndef half(x):\n    return x / 2\n")
    (tmp_path / "test_toy.py").write_text("import toy\n\ndef test_double():\n    assert toy.double(3) == 6\n")
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    mutations = [
        Mutation(name, "toy.py", old, new, "nothing is right", ("test_toy.py",))
        for name, old, new in (("times", "2 * x", "3 * x"), ("by", "x / 2", "x / 3"), ("gone", "x ** 2", "x"))
    ]
    report = tmp_path / "report.md"
    report.write_text("# Before\n")
    assert main(["times", "--report", str(report)], mutations, tmp_path) == 0
    assert main(["by", "gone", "--report", str(report)], mutations, tmp_path) == 1
    assert "toy.py has 0 times, not once: 'x ** 2'" in capsys.readouterr().out
    rows = [line.split(" | ")[-1] for line in report.read_text().splitlines() if line.startswith("| `")]
    assert rows == ["`test_toy.py::test_double` |", "**nothing** |", "could not be tried |"]
    assert report.read_text().startswith("# Before\n")
    assert (tmp_path / "toy.py").read_text().count("2") == 2, "the checkout itself was changed"
