"""`benchmarks.tasks` on a tiny model: rows, and what a second run finds."""

import json

import pytest

from benchmarks import tasks
from tests.support.tokenizers import save_tiny_llama


@pytest.mark.slow
def test_the_table_has_a_row_for_each_rule_and_goes_on_where_it_was(tmp_path, capsys):
    """Exact has never's texts, and leaving tokens a depth; a second run answers nothing anew."""
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")
    folder, answers, outcome = save_tiny_llama(tmp_path / "model"), tmp_path / "a.jsonl", tmp_path / "table.json"
    arguments = ["--model", folder, "--dtype", "float32", "--task", "gsm", "--limit", "3", "--new-tokens", "6"]
    arguments += ["--quantizers", "rtn", "--similarity", "-2", "0.7", "--batch", "2", "--timed", "1", "--threads", "1"]
    assert tasks.main([*arguments, "--answers", str(answers), "--json", str(outcome)]) == 0
    rows = json.loads(outcome.read_text())["rows"]
    names = ["never", "exact, rtn", "4-bit, rtn", "similarity -2, rtn", "similarity 0.7, rtn", "confidence, rtn"]
    assert list(rows) == names
    assert rows["exact, rtn"]["same_texts"] == rows["never"]["same_texts"] == 3
    assert rows["similarity -2, rtn"]["mean_depth"] < 3
    assert all(row["tokens_per_s"] > 0 and row["problems"] == 3 for row in rows.values())
    assert "0 of 3" in capsys.readouterr().out
    before = answers.read_bytes()
    assert tasks.main([*arguments, "--answers", str(answers), "--json", str(outcome)]) == 0
    assert answers.read_bytes() == before
    assert json.loads(outcome.read_text())["rows"] == rows
