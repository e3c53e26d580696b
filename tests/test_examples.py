"""The examples' own logic: the histogram, time stamps per token, prompts with and without a chat template."""

import pytest
import torch

from examples import calibrate, demo, exact, models
from examples.timing import Generation, decode_rate, generate
from river_compile.stats import CycleRecord
from tests.families import make, prompt


def test_histogram_bars_are_in_proportion_and_name_tokens_that_never_left():
    lines = demo.histogram([2] * 8 + [30] * 2, blocks=30, width=8).splitlines()
    assert [line.count("█") for line in lines] == [8, 2]
    assert "8 (80%)" in lines[0]
    assert lines[1].endswith("never left")


def test_histogram_of_nothing_says_so():
    assert demo.histogram([], blocks=4) == "(no token was decoded)"


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
    passages = calibrate.topics()
    assert len(passages) == len(set(passages)) >= 60
    assert all(len(passage) > 100 for passage in passages)


def test_cycles_are_shown_with_the_source_of_every_token():
    def cycle(drafted, kept, width):
        return CycleRecord(drafted, kept, width, held_back=0, seconds=(0.002, 0.01, 0.0), thread=0, model=0)

    cycles = [cycle(("river",) * 3, ("river", "backbone"), 4), cycle(("lookup",), ("lookup", "backbone"), 2)]
    lines = exact.cycle_lines(cycles, [" a", "\n", " b", "."])
    assert lines[1].split() == ["1", "3", "1", "4", "2.0", "10.0", "a[⏎]"]
    assert lines[2].endswith("  ( b)[.]")
