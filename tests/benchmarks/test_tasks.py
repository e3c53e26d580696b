"""`benchmarks.tasks` on a tiny model: rows, what a second run finds, problems and their answers, perplexity."""

import json

import pytest
import torch
import transformers

from benchmarks import tasks
from benchmarks.quality import perplexity, reasoning
from benchmarks.quality.answers import wilson
from tests.support.commands import compile_by_operator
from tests.support.tokenizers import save_tiny_llama


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def _without_inductor(monkeypatch):
    compile_by_operator(monkeypatch)


def rows_of(tiny, tmp_path, *arguments):
    outcome = tmp_path / "outcome.json"
    common = ["--model", tiny, "--dtype", "float32", "--threads", "1", "--quantizers", "rtn"]
    assert tasks.main([*common, "--json", str(outcome), *map(str, arguments)]) == 0
    return json.loads(outcome.read_text())["rows"]


def test_exact_answers_are_the_plain_ones(tiny, tmp_path):
    """A random model solves nothing."""
    rows = rows_of(tiny, tmp_path, "--task", "reasoning", "--limit", 2, "--new-tokens", 8, "--rules", "never", "exact")
    assert rows["exact, rtn"]["same_texts"] == 2
    assert rows["never"]["solved"] == 0
    assert rows["never"]["interval"] == pytest.approx([0, 0.658], abs=1e-3)


def test_a_run_goes_on_with_its_file(tiny, tmp_path):
    """A run that was killed while it wrote asks for what is missing."""
    file = tmp_path / "answers.jsonl"
    asked = ("--task", "gsm", "--limit", 3, "--new-tokens", 6, "--answers", file, "--rules")

    def texts():
        found = {}
        for line in file.read_text().splitlines():
            one = json.loads(line)
            found.setdefault(one["run"], {})[one["problem"]] = one["answer"]["text"]
        return list(found.values())

    first = rows_of(tiny, tmp_path, *asked, "plain", "never", "exact")
    assert first["plain"]["same_texts"] == first["exact, rtn"]["same_texts"] == 3
    runs = texts()
    assert runs[0] == runs[1] == runs[2]
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 9
    file.write_text("".join(lines[:4]) + lines[4][:30])
    again = rows_of(tiny, tmp_path, *asked, "plain", "never")
    assert file.read_text().startswith("".join(lines[:4]))
    assert len(file.read_text().splitlines()) == 6
    assert again["never"]["solved"] == first["never"]["solved"]
    file.write_text("[]\n")
    with pytest.raises(SystemExit) as end:
        rows_of(tiny, tmp_path, *asked, "never")
    assert f"{file}, line 1, is no answer of `benchmarks.tasks`" in end.value.code


def test_perplexities_are_compared(tiny, tmp_path, monkeypatch):
    """The plain model's is that of its logits, token by token."""
    text = "a text for a test that is long enough"
    monkeypatch.setattr(perplexity, "topics", lambda: [text])
    rows = rows_of(tiny, tmp_path, "--task", "perplexity", "--new-tokens", 8, "--rules", "plain", "4-bit")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    ids = transformers.AutoTokenizer.from_pretrained(tiny)(text, return_tensors="pt")["input_ids"][:, :24]
    with torch.no_grad():
        logits = model(ids).logits[0, 16:23].float()
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 17:24]).exp().item()
    assert rows["plain"]["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert rows["4-bit, rtn"]["perplexity"] != rows["plain"]["perplexity"]


def test_reasoning_problems_have_answers():
    """The same for a seed; the last number of an answer counts, however it is written."""
    asked = reasoning.problems(9)
    assert [problem.question for problem in asked] == [problem.question for problem in reasoning.problems(9)]
    assert len({problem.question for problem in asked}) == 9
    assert {problem.source.config.__class__.__name__ for problem in asked[:3]} == {
        "ChainSumConfig", "BasicArithmeticDatasetConfig", "GSMSymbolicDatasetConfig",
    }  # fmt: skip
    for problem in asked:
        right = problem.entry["answer"]
        assert reasoning.solved(problem, f"Take 1 first. The answer is {right}.")
        assert not reasoning.solved(problem, f"{right}, or rather {int(right) + 1}")
    assert reasoning.solved(asked[0], f"{int(asked[0].entry['answer']):,}")
    assert not reasoning.solved(asked[0], "many")


def test_intervals_of_a_share():
    """Known values of Wilson's interval; it stays within 0 and 1."""
    assert wilson(5, 164) == pytest.approx((0.01308, 0.06936), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0, 0.27754), abs=1e-4)
    assert wilson(10, 10)[1] == 1


@pytest.mark.slow
def test_the_table_has_a_row_for_each_rule_and_goes_on_where_it_was(tiny, tmp_path, capsys):
    """Exact has full depth's texts, and exiting tokens have a depth; a second run answers nothing again."""
    answers, outcome = tmp_path / "a.jsonl", tmp_path / "table.json"
    arguments = ["--model", tiny, "--dtype", "float32", "--task", "gsm", "--limit", "3", "--new-tokens", "6"]
    arguments += ["--quantizers", "rtn", "--similarity", "-2", "0.7", "--threads", "1"]
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
