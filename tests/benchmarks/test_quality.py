"""The quality benchmark on a tiny model: every number that it prints comes from a run, and the parts add up."""

from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks import texts
from benchmarks.quality import entries, run
from benchmarks.quality.plots import draw, plot
from tests.support.families import VOCABULARY, make
from tests.support.lowerings import OPERATORS

BASE = {"kernels": OPERATORS, "group_size": 32}


class Letters:
    """A tokenizer with a token for each character."""

    chat_template = None

    def __call__(self, text, return_tensors=None):
        ids = [1 + ord(character) % (VOCABULARY - 1) for character in text]
        return {"input_ids": torch.tensor([ids]) if return_tensors else ids}


def measured(base, *more):
    arguments = ["--texts", "2", "--tokens", "5", "--calibration-texts", "0", "--no-progress", "--thresholds", "0.5"]
    options = run._parse([*arguments, "--quantizers", "rtn", *more])
    found = run.measure(make("llama", layers=3), Letters(), options, base)
    return json.loads(json.dumps(found)) | {"seconds": 0.0}


@pytest.fixture(scope="module")
def outcome():
    return measured(BASE)


@pytest.mark.slow
def test_never_exit_is_the_model_and_four_bits_are_not(outcome):
    backbone, four_bits, river = outcome["rows"]
    for kind in ("own", "held_out"):
        assert (backbone[kind]["kl"], backbone[kind]["agreement"]) == (0, 1)
        assert four_bits[kind]["kl"] > 1e-4
    assert (backbone["match"], backbone["depth"], backbone["time"]) == (5, 3, 1)
    assert (four_bits["depth"], four_bits["rule"]) == (0, [None, 0])
    assert 2 <= river["depth"] <= 3
    assert [row["name"] for row in outcome["rows"]] == ["backbone", "everything 4-bit, rtn", "River, threshold 0.5"]


def test_entries_of_executed_blocks_are_the_backbones(outcome):
    found = outcome["entries"]
    for depth, keys, values in zip(found["depths"], found["keys"], found["values"], strict=True):
        for cosines in (keys, values):
            assert cosines[:depth] == pytest.approx([1] * depth, abs=1e-6)
            assert all(0.5 < cosine < 1 - 1e-5 for cosine in cosines[depth:])
    assert len(found["similarity"]["mean"]) == 2
    assert all(-1 <= rank <= 1 for rank in found["correlation"]["rank"])


def test_all_that_was_measured_is_shown(outcome, capsys):
    run.show(outcome)
    shown = capsys.readouterr().out
    assert all(
        word in shown for word in ("everything 4-bit, rtn", "River, threshold 0.5", "Twins' entries after depth")
    )


def test_the_entries_have_their_pictures(outcome, tmp_path):
    assert plot({"one": {name: value for name, value in outcome.items() if name != "entries"}}, tmp_path) == []
    paths = plot({"one": outcome}, tmp_path)
    assert [path.name for path in paths] == ["quality_entries.png", "quality_similarity.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_the_pictures_hold_what_was_measured(outcome):
    """Cosines and similarities are as measured; run blocks are left out."""
    drawn, found = draw({"one": outcome}), outcome["entries"]
    for panel, kind in zip(drawn["entries"].axes[:2], ("keys", "values"), strict=True):
        (image,) = panel.get_images()
        for row, depth, cosines in zip(image.get_array(), found["depths"], found[kind], strict=True):
            assert row.mask[:depth].all() or torch.tensor(row.filled(math.nan)[:depth]).isnan().all()
            assert list(row[depth:]) == pytest.approx(cosines[depth:])
    means = drawn["similarity"].axes[0].get_lines()[0].get_ydata()
    assert list(means) == found["similarity"]["mean"]


def test_models_are_drawn_one_below_the_other(outcome):
    """Each with its name and with as many panels as it has alone."""
    alone, both = draw({"one": outcome}), draw({"one": outcome, "two": outcome})
    for name, figure in both.items():
        assert len(figure.axes) == 2 * len(alone[name].axes)
        assert [part.get_suptitle() for part in figure.subfigs] == ["one", "two"]
        assert figure.get_figheight() == 2 * alone[name].get_figheight()


def test_the_exact_match_ends_at_the_first_difference():
    assert texts.exact_match([[0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]) == 2


def test_own_text_is_what_generate_writes():
    model, ids = make("llama", layers=2), torch.tensor([[5, 9, 2]])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert torch.equal(texts.greedy(model, ids, 9), expected)


def test_ranks_correlate_whatever_the_scale():
    a = torch.tensor([0.1, 0.5, 0.2, 0.9])
    assert entries.rank_correlation(a, a.exp() * 100) == pytest.approx(1)
    assert entries.rank_correlation(a, -a) == pytest.approx(-1)


def test_quick_measures_little():
    options = run._parse(["--quick"])
    assert (options.texts, options.tokens, options.calibration_texts) == (2, 8, 0)
