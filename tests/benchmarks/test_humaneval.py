"""Answers to HumanEval: judged in a separate process, within limits, which leaves nothing behind."""

import pytest

from benchmarks.quality import humaneval
from benchmarks.quality.answers import Problems
from tests.support.processes import ends
from tests.support.tokenizers import byte_tokenizer


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("assert sum(range(4)) == 6", "passed"),
        ("assert sum(range(4)) == 7", "AssertionError"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("held = bytearray(2 << 30)", "MemoryError"),
        ("open('big', 'wb').write(bytes(64 << 20))", "OSError: [Errno 27] File too large"),
        ("import sys; sys.exit(3)", "ended with status 3"),
    ],
)
def test_answers_run_within_limits(program, expected):
    assert humaneval.verdict(program, memory_mb=512) == expected


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(600)"])
def test_answers_that_do_not_end_are_ended(program):
    assert humaneval.verdict(program, seconds=1) == "timed out"


def test_answers_leave_nothing_behind_and_see_nothing_of_ours(tmp_path, monkeypatch):
    """What an answer starts ends with it; it has neither our environment nor our folder."""
    monkeypatch.setenv("SECRET", "1")
    started = tmp_path / "started"
    program = f"""
import os, subprocess, sys
assert "SECRET" not in os.environ and os.listdir() == []
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(started)!r}, "w").write(str(child.pid))
"""
    assert humaneval.verdict(program) == "passed"
    assert ends(int(started.read_text()))


def test_answers_are_cut_where_something_new_begins():
    assert humaneval.cut("    return 1\n\ndef other():\n") == "    return 1\n"
    assert humaneval.cut("    return 1\n") == "    return 1\n"


def test_humaneval_judges_completions():
    problem = {"prompt": "def f(x):\n", "test": "def check(f):\n    assert f(2) == 4", "entry_point": "f"}
    assert humaneval.passes(problem, "    return 2 * x\n\nprint('more')")
    assert not humaneval.passes(problem, "    return x")


def test_a_chat_model_is_asked_and_its_answer_begins_with_the_problem():
    """What it writes completes the problem's own text, as for a model that is not asked."""
    tokenizer = byte_tokenizer()
    asked = Problems.of("humaneval-chat", tokenizer, 2, 16)
    for number, problem in enumerate(humaneval.problems()[:2]):
        text = tokenizer.decode(asked.prompts[number][0])
        question, _, begun = text.partition("assistant: ")
        assert question.startswith("user: Write a solution")
        assert problem["prompt"] in question
        assert begun.endswith(f"```python\n{problem['prompt'].rstrip()}\n")
        assert asked.solves(number, problem["canonical_solution"] + "```\nThis function ...")
        assert not asked.solves(number, "    return None\n")
