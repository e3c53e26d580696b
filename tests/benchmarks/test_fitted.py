"""The benchmark of a fitted exit criterion: its features on a text worked out by hand, its model, and a tiny run."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import fitted
from tests.support.families import make, prompt


def test_features_know_the_text_before_a_token_and_nothing_after_it():
    ids = [5, 6, 7, 5, 6, 9]
    logs = torch.tensor([[0.5, 0.25, 0.25] + [0.0] * 7, [0.0] * 8 + [0.75, 0.25]]).log()
    found = fitted.features(ids, logs.nan_to_num(neginf=-50.0), [True, False])
    (entropy, margin, surprise, *rest), second = found.tolist()
    assert entropy == pytest.approx(1.5 * math.log(2))
    assert margin == pytest.approx(math.log(2))
    assert surprise == 15, "6 was all but impossible"
    assert rest[:3] == [pytest.approx(entropy)] * 3
    # The twins gave it; "6" and "5 6" stood before; 6 followed 5 then too; twice 6 among five tokens.
    assert rest[3:] == pytest.approx([1, 1 / 16, 2, 1, math.log(2), math.log(16), math.log(5)])
    assert second[2] == pytest.approx(math.log(4))
    assert second[6:] == pytest.approx([0, 1 / 16, 0, 0, 0, math.log(19), math.log(6)]), "7 followed 6 before"
    assert torch.equal(found[0], fitted.features(ids[:-1], logs[:1].nan_to_num(neginf=-50.0), [True])[0])


def scripted(count: int, tokens: int = 40) -> list[dict[str, torch.Tensor]]:
    """Returns texts whose third feature alone tells what a token loses."""
    draws = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        x = torch.randn(tokens, 4, generator=draws)
        found.append({"kl": x[:, 2].exp(), "features": x})
    return found


def test_a_fitted_order_finds_what_tells_on_texts_that_it_has_not_seen():
    shares = fitted.compare(scripted(12))
    assert shares["fitted"] == pytest.approx(shares["oracle"], abs=0.02)
    for name in ("chance", "confidence"):
        assert shares[name][2] > shares["oracle"][2] + 0.2, name


def test_nothing_is_learned_from_the_texts_that_are_tested():
    texts = scripted(12)
    for text in texts:  # each text has its own feature that would give its losses away
        text["features"] = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    marks = torch.eye(12)
    for text, mark in zip(texts, marks, strict=True):
        text["features"] = torch.cat([text["features"], mark * text["kl"][:, None]], 1)
    assert fitted.compare(texts)["fitted"][2] > fitted.compare(texts)["oracle"][2] + 0.2


@pytest.mark.slow
def test_a_tiny_model_is_measured_by_kind_of_text(monkeypatch):
    monkeypatch.setattr(fitted, "TOKENS", 8)
    kinds = {"one": [prompt(11, seed=seed) for seed in range(4)], "other": [prompt(11, seed=9) for _ in range(4)]}
    base = {"kernels": "eager", "group_size": 32, "quantizer": "rtn"}
    with torch.inference_mode():
        found = fitted.measure(make("llama", layers=3), kinds, False, base)
    assert found.keys() == kinds.keys()
    for shares in found.values():
        assert shares["kl"][0] > 1e-5
        assert all(least <= other + 1e-6 for least, other in zip(shares["oracle"], shares["fitted"], strict=True))
        assert shares["oracle"] == sorted(shares["oracle"], reverse=True)
