"""What the commands share: time stamps per token, prompts with and without a chat template, texts to calibrate on."""

import pytest
import torch

from river_compile.cli import shared
from river_compile.cli.shared import topics
from river_compile.reporting.timing import Generation, decode_rate, generate
from tests.support.families import make, prompt


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
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
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
    assert shared.encode(tokenizer, "Hi").tolist() == [[1, 2]]
    tokenizer.chat_template = "template"
    assert shared.encode(tokenizer, "Hi").tolist() == [[7, 1, 2, 8]]


def test_calibration_has_texts_enough():
    """The passages that the calibration example uses are many, different and not empty."""
    passages = topics()
    assert len(passages) == len(set(passages)) >= 60
    assert all(len(passage) > 100 for passage in passages)
