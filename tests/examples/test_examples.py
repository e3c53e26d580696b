"""The examples' own logic: the histogram, time stamps per token, prompts with and without a chat template."""

import re
import sys
import time

import pytest
import torch
import transformers
from rich.console import Console

from examples import compare_thresholds, demo, exact
from river_compile.cli import humaneval, models
from river_compile.cli.texts import topics
from river_compile.cli.timing import Generation, decode_rate, generate
from river_compile.reporting.report import histogram
from river_compile.runtime.stats import CycleRecord, RowCycle
from tests.support.families import make, prompt


def test_histogram_bars_are_in_proportion_and_name_tokens_that_never_left():
    lines = histogram({30: 2, 2: 8}, num_blocks=30)
    assert [line.count("#") for line in lines] == [32, 8]
    assert "8 (80 %)" in lines[0]
    assert not lines[0].endswith("never left")
    assert lines[1].endswith("never left")


def test_the_demo_marks_changed_words_side_by_side(capsys):
    """In 80 columns; the texts themselves are whole, whatever spaces they have."""
    plain = "def f(n):\n    return n  # the number"
    texts = {"plain": plain, "exact": plain, "fast": plain.replace("number", "count of steps")}
    assert "".join(piece for piece, _ in demo.compared(plain, texts["fast"])) == texts["fast"]
    assert [piece for piece, differs in demo.compared(plain, texts["fast"]) if differs] == ["count", "of", "steps"]
    Console(width=demo.WIDTH, file=sys.stdout).print(demo.side_by_side(texts, marks=True))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["plain", "exact:", "the", "same", "text", "fast:", "3", "words", "changed"]
    assert "*count*" in "".join(lines)
    assert max(map(len, lines)) <= demo.WIDTH


@pytest.mark.parametrize("static", [False, True])
def test_every_new_token_has_a_time_stamp(static):
    """The tokens are `generate`'s own, the prompt has no stamp, and times grow."""
    model, ids = make("llama", layers=2), prompt()
    timed = generate(model, ids, new_tokens=6, static_cache=static)
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert list(timed.tokens) == plain[0, ids.shape[1] :].tolist()
    assert len(timed.times) == 6
    assert list(timed.times) == sorted(timed.times)


def test_a_warm_up_stops_early_with_the_same_tokens():
    model, ids = make("llama", layers=2), prompt()
    assert generate(model, ids, 8, stop_after=2).tokens == generate(model, ids, 8).tokens[:2]


def test_rates_leave_the_first_token_out():
    assert Generation((5, 6, 7), (10.0, 10.5, 11.0)).decode_tokens_per_s == 2.0
    assert Generation((5, 6, 7), (10.0, 10.5, 11.0)).first_token_s == 10.0
    with pytest.raises(ValueError, match="at least 2 tokens, there are 1"):
        decode_rate([1.0])


def test_prompts_use_the_chat_template_where_there_is_one():
    class Tokenizer:
        chat_template = None

        def __call__(self, text, return_tensors):
            return {"input_ids": torch.tensor([[1, 2]])}

        def apply_chat_template(self, messages, **options):
            assert messages == [{"role": "user", "content": "Hi"}]
            assert options["add_generation_prompt"]
            return {"input_ids": torch.tensor([[7, 1, 2, 8]])}

    tokenizer = Tokenizer()
    assert models.encode(tokenizer, "Hi").tolist() == [[1, 2]]
    tokenizer.chat_template = "template"
    assert models.encode(tokenizer, "Hi").tolist() == [[7, 1, 2, 8]]


def test_too_few_tokens_are_refused(capsys):
    with pytest.raises(SystemExit):
        demo.main(["--new-tokens", "1"])
    assert "1 is too few to measure a rate" in capsys.readouterr().err


def test_calibration_has_texts_enough():
    """The passages that the calibration example uses are many, different and not empty."""
    passages = topics()
    assert len(passages) == len(set(passages)) >= 60
    assert all(len(passage) > 100 for passage in passages)


def test_cycles_are_shown_with_the_source_of_every_token():
    def cycle(drafted, kept, width):
        return CycleRecord((RowCycle(0, drafted, kept),), width, seconds=(0.002, 0.01, 0.0), thread=0, model=0)

    cycles = [cycle(("river",) * 3, ("river", "backbone"), 4), cycle(("lookup",), ("lookup", "backbone"), 2)]
    lines = exact.cycle_lines(cycles, [" a", "\n", " b", "."])
    assert lines[1].split() == ["1", "3", "1", "4", "2.0", "10.0", "a[⏎]"]
    assert lines[2].endswith("  ( b)[.]")


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("assert sum(range(4)) == 6", "passed"),
        ("assert sum(range(4)) == 7", "AssertionError"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("while True: pass", "timed out"),
        ("import time; time.sleep(60)", "timed out"),
        ("held = bytearray(2 << 30)", "MemoryError"),
        ("open('big', 'wb').write(bytes(64 << 20))", "OSError: [Errno 27] File too large"),
        ("import sys; sys.exit(3)", "ended with status 3"),
    ],
)
def test_answers_run_within_limits(program, expected):
    assert humaneval.verdict(program, seconds=1, memory_mb=512) == expected


def test_answers_leave_nothing_behind_and_see_nothing_of_ours(tmp_path, monkeypatch):
    """What an answer starts ends with it; it has neither our environment nor our folder."""
    monkeypatch.setenv("SECRET", "1")
    alive = tmp_path / "alive"
    child = f"import time; time.sleep(2); open({str(alive)!r}, 'w')"
    program = f"""
import os, subprocess, sys
assert "SECRET" not in os.environ and os.listdir() == []
subprocess.Popen([sys.executable, "-c", {child!r}])
"""
    assert humaneval.verdict(program) == "passed"
    time.sleep(3)  # longer than a child that is still alive would take to tell
    assert not alive.exists()


def test_answers_are_cut_where_something_new_begins():
    assert humaneval.cut("    return 1\n\ndef other():\n") == "    return 1\n"
    assert humaneval.cut("    return 1\n") == "    return 1\n"


@pytest.fixture(scope="module")
def little_model(smollm2_tokenizer, tmp_path_factory):
    """A folder with four blocks of random weights and a real tokenizer."""
    config = transformers.LlamaConfig(
        vocab_size=len(smollm2_tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("little")
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    smollm2_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_thresholds_are_compared_on_one_prompt(little_model, capsys):
    """The first line never exits, threshold 1 neither, and -1 lets every token leave after two blocks."""
    assert compare_thresholds.main(["--model", little_model, "--new-tokens", "8", "--thresholds", "1", "-1"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if re.match(r" *(never exit|-?1 )", line)]
    assert lines[0][4] == "4.0"
    assert [line[3] for line in lines[1:]] == ["4.0", "2.0"]
    assert lines[1][-2:] == ["the", "end"]
