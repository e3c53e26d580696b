"""lm-eval's model ``river``: its scores are lm-eval's own where no token leaves, and others where tokens do."""

from __future__ import annotations

import runpy
import sys

import datasets
import pytest
import torch
import transformers
from lm_eval import simple_evaluate
from lm_eval.api.registry import get_model
from lm_eval.api.task import ConfigurableTask

from river_compile import accelerate, restore, trace
from river_compile.errors import OptionError
from river_compile.evaluation.lm_eval_model import RiverLM
from river_compile.evaluation.meter import TextDecoder
from tests.support.families import make
from tests.support.lowerings import OPERATORS
from tests.support.tokenizers import byte_tokenizer

QUICK = {"kernels": OPERATORS, "group_size": 32, "quantizer": "rtn"}
CHOICES = ["a b", "cd", " efg"]
TEXTS = [f"question {n}, and what follows it:" for n in "abcd"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=257, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=None, pad_token_id=0, max_position_embeddings=256,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def tasks() -> list[ConfigurableTask]:
    """One of multiple choice and one of perplexity, whose texts lie in this file."""

    def texts(**_):
        return {"test": datasets.Dataset.from_list([{"text": text} for text in TEXTS])}

    common = {"custom_dataset": texts, "test_split": "test", "num_fewshot": 0}
    choice = {"output_type": "multiple_choice", "doc_to_text": "{{text}}", "doc_to_choice": CHOICES, "doc_to_target": 0}
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    metric = [{"metric": "word_perplexity"}]
    return [
        ConfigurableTask(config={"task": "choice", **common, **choice}),
        ConfigurableTask(config={"task": "rolling", **common, **rolling, "metric_list": metric}),
    ]


def evaluated(model, **arguments):
    """Returns lm-eval's results, and the log-probabilities of all answers."""
    torch._dynamo.reset()
    lm = RiverLM(model, tokenizer=byte_tokenizer(), **arguments)
    try:
        found = simple_evaluate(lm, tasks=tasks(), bootstrap_iters=0, log_samples=True)
    finally:
        restore(model)
    answers = [r[0] for samples in found["samples"].values() for sample in samples for r in sample["resps"]]
    return found, torch.tensor([float(a[0] if isinstance(a, tuple) else a) for a in answers])


@pytest.fixture(scope="module")
def forward(model):
    return evaluated(model, quality="plain", scoring="forward")


@pytest.mark.slow
def test_decoded_answers_have_the_scores_of_one_pass_where_no_token_leaves(model, forward):
    found, scores = evaluated(model, quality="exact", **QUICK)
    assert torch.allclose(scores, forward[1], atol=1e-3)
    assert (found["config"]["scoring"], found["config"]["quality"]) == ("decode", "exact")
    assert found["config"]["mean_depth"] == 3


@pytest.mark.slow
def test_one_pass_hides_what_tokens_that_leave_lose_and_decoding_shows_it(model, forward):
    """The same rule, by which every token runs through the twins alone: each result says how it was scored."""
    hidden, blind = evaluated(model, quality="fast", scoring="forward", exit_depth=0, **QUICK)
    shown, scores = evaluated(model, quality="fast", exit_depth=0, **QUICK)
    assert torch.allclose(blind, forward[1], atol=1e-3)
    assert (scores - forward[1]).abs().max() > 0.01
    assert (hidden["config"]["scoring"], hidden["config"]["decode_steps"]) == ("forward", 0)
    assert (shown["config"]["scoring"], shown["config"]["mean_depth"]) == ("decode", 0)


def test_an_answer_of_one_token_is_decoded_too(model):
    """Its score comes from the step that is given the context's last token."""
    torch._dynamo.reset()
    lm = RiverLM(model, tokenizer=byte_tokenizer(), quality="fast", exit_depth=1, **QUICK)
    with trace() as steps:
        lm._loglikelihood_tokens([(None, [5, 6, 7], [8])], disable_tqdm=True)
    restore(model)
    assert [(step.decode, step.depth) for step in steps.steps] == [(False, 3), (True, 1)]


def test_texts_share_nothing_but_their_cache():
    """A text has the logits that it has alone, whatever was decoded before it, also where it begins with one token."""
    network, texts = make("llama", layers=2), [torch.tensor([[9, 8, 7, 6]]), torch.tensor([[3]])]
    network.compile(backend="river", options={**QUICK, "criterion": "confidence", "threshold": 9.0, "first_exit": 0})
    together, each = TextDecoder(network, 8), [TextDecoder(network, 8) for _ in texts]
    for text, alone in zip(texts, each, strict=True):
        assert torch.equal(together.logits(text, 0), alone.logits(text, 0))
    restore(network)


def test_each_token_keeps_its_logits():
    """Steps that are replayed write to one buffer; the logits of a text are those of its beginnings."""
    network, text = make("llama", layers=2), torch.tensor([[9, 8, 7, 6, 5, 4, 3]])
    accelerate(network, **QUICK | {"kernels": "auto"})
    tokens = range(3, text.shape[1] + 1)
    each = [TextDecoder(network, 8).logits(text[:, :n], n - 1) for n in tokens]
    assert torch.allclose(TextDecoder(network, 8).logits(text, 2), torch.cat(each), atol=1e-3)
    restore(network)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scoring": "guess"}, "scoring='guess' is not allowed"),
        ({"quality": "best"}, "quality='best' is not allowed"),
        ({"quality": "plain", "threshold": 0.5}, "threshold= requires River"),
    ],
)
def test_bad_arguments_are_refused(model, arguments, message):
    with pytest.raises(OptionError, match=message):
        RiverLM(model, tokenizer=byte_tokenizer(), **arguments)


def test_the_runner_brings_the_model_to_lm_eval(monkeypatch, capsys):
    """Releases that look for no entry points find it by its name all the same."""
    assert get_model("river") is RiverLM
    monkeypatch.setattr(sys, "argv", ["lm-eval", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("river_compile.evaluation", run_name="__main__")
    assert "Language Model Evaluation Harness" in capsys.readouterr().out
