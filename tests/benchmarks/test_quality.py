"""The quality benchmark on a tiny model: every number that it prints comes from a run, and the parts add up."""

from __future__ import annotations

import pytest
import torch

from benchmarks import texts, twins
from benchmarks.quality import run
from tests.support.families import VOCABULARY, make
from tests.support.lowerings import OPERATORS

BASE = {"kernels": OPERATORS, "group_size": 32}


class Letters:
    """A tokenizer with a token for each character."""

    chat_template = None

    def __call__(self, text, return_tensors=None):
        ids = [1 + ord(character) % (VOCABULARY - 1) for character in text]
        return {"input_ids": torch.tensor([ids]) if return_tensors else ids}


@pytest.mark.slow
def test_full_depth_is_the_model_and_four_bits_are_not():
    arguments = ["--texts", "2", "--tokens", "5", "--no-progress", "--thresholds", "0.5", "--quantizers", "rtn", "hqq"]
    found = run.measure(make("llama", layers=3), Letters(), run._parse(arguments), BASE)
    names = [
        f"{what}, {name}{more}"
        for name in ("rtn", "hqq")
        for what, more in (("all 4-bit", ""), ("River", ", threshold 0.5"))
    ]
    assert [row["name"] for row in found] == ["full depth", *names]
    whole, four_bits, river, *others = found
    for kind in ("own", "held_out"):
        assert (whole[f"kl_{kind}"], whole[f"agreement_{kind}"]) == (0, 1)
        assert all(row[f"kl_{kind}"] > 1e-4 for row in (four_bits, others[0]))
    assert (whole["match"], whole["depth"], four_bits["depth"]) == (5, 3, 0)
    assert 2 <= river["depth"] <= 3


def test_the_exact_match_ends_at_the_first_difference():
    assert texts.exact_match([[0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]) == 2


def test_own_text_is_what_generate_writes():
    model, ids = make("llama", layers=2), torch.tensor([[5, 9, 2]])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert torch.equal(texts.greedy(model, ids, 9), expected)


@pytest.mark.slow
def test_quantizers_are_compared_with_full_depth():
    """Each with its own twins' bytes; those that know what the matrices read are nearer in no fewer bytes."""
    options = twins._parse(["--quantizer", "rtn", "--quantizer", "gptq, sampled text", "--group-size", "32"])
    model, ids = make("llama", layers=2), torch.arange(1, 13)[None]
    rows = twins.measure(model, Letters(), {"own": [texts.Answer(ids, 4)]}, options)
    assert [row["quantizer"] for row in rows] == ["rtn", "gptq, sampled text"]
    assert all(row["KL own"] > 1e-6 and 0 <= row["same own"] <= 1 for row in rows)
    assert rows[0]["MB"] == rows[1]["MB"] > 0
