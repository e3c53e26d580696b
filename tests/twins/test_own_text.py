"""The default twins know the model without a text: it samples one, the same every time, and says what they lose."""

from __future__ import annotations

import json
from itertools import accumulate

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, DynamicCache, LlamaForCausalLM

from river_compile import RiverWarning, accelerate, collect_statistics, report, save_twins
from river_compile.backend import river
from river_compile.kernels.portable import token_kl
from river_compile.record import find_record, record_of
from river_compile.twins import own_text
from river_compile.twins.file import FILE
from river_compile.twins.making import Statistics
from river_compile.twins.observe import default_texts
from river_compile.twins.own_text import LOSS_SEED, TwinLoss, estimate_loss, package_ids, sample
from river_compile.twins.pack import TwinWeights
from tests.support.decoding import decode, new_cache
from tests.support.examples import slow
from tests.support.families import VOCABULARY, make, prompt
from tests.support.lowerings import OPERATORS
from tests.support.tokenizers import save_tiny_llama
from tests.support.traced import TracedStep, dequantized

OPTIONS = {"kernels": OPERATORS, "group_size": 32, "threshold": -1.0}


def started(family="llama", **options):
    """Returns a model whose twins the default options packed, in a call through Dynamo."""
    model = make(family, layers=2)
    model.compile(backend=river, options={**OPTIONS, **options})
    decode(model, new_cache(model, "static"), [0])
    return model


def packed_by_default(family="llama", step=None, **options):
    """Does what `started` does with a step that was traced before, of which Dynamo would tell whose it is."""
    step = TracedStep(family) if step is None else step
    record_of(step.model.parameters()).of(Statistics).own.attach(step.model)
    step.run(**options)
    return step.model


def bytes_of(model):
    return {site.name: [tensor.clone() for tensor in site.tensors] for site in report(model).packed}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(x, y) for name in a for x, y in zip(a[name], b[name], strict=True))


def statistics_of(model):
    accelerate(model, "fast", compile_cache=False, kernels=OPERATORS)
    ids = torch.tensor([[5, 6, 7]])
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    (source,) = {twin.statistics for twin in report(model).packed}
    return source


def test_a_model_with_a_tokenizer_in_its_folder_reads_the_packages_texts(tmp_path):
    folder = save_tiny_llama(tmp_path)
    assert statistics_of(LlamaForCausalLM.from_pretrained(folder)) == "1024 tokens of the package's texts"
    ids = package_ids(LlamaForCausalLM.from_pretrained(folder))
    text = AutoTokenizer.from_pretrained(folder).decode(ids.flatten())
    assert default_texts()[0][:40] in text
    assert default_texts()[-1][-40:] in text


@pytest.mark.parametrize(
    "what", [slow("no folder"), slow("no tokenizer"), "a tokenizer that fails", "one with other tokens"]
)
def test_others_read_text_that_they_sample(what, tmp_path):
    folder = tmp_path if what == "no folder" else save_tiny_llama(tmp_path)
    if what == "no tokenizer":
        for file in tmp_path.glob("tokenizer*"):
            file.unlink()
    elif what == "a tokenizer that fails":
        (tmp_path / "tokenizer.json").write_text("{")
    model = make("llama", layers=2) if what == "no folder" else LlamaForCausalLM.from_pretrained(folder)
    if what == "one with other tokens":
        model.resize_token_embeddings(60)
    assert package_ids(model) is None
    assert "tokens that the model sampled" in statistics_of(model)


@pytest.mark.slow
def test_the_same_weights_give_the_same_twins():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = started()
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers follow as if nothing was drawn
    torch.manual_seed(2)
    twins = bytes_of(first)
    assert same(twins, bytes_of(started()))
    assert same(twins, bytes_of(packed_by_default()))
    assert not same(twins, bytes_of(packed_by_default(quantizer="hqq")))


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "qwen3_moe", "gemma3"])
def test_what_the_report_says(family):
    found = report((started if family == "gpt2" else packed_by_default)(family), estimate_loss=True)
    loss, text, entries = found.record.of(TwinWeights).loss.value, str(found), found.to_dict()
    assert {p.quantizer for p in found.packed} == {"gptq"}
    assert f"{len(found.packed)} matrices were calibrated on 128 tokens that the model sampled" in text
    assert f"loss         KL {loss.kl:.3f}" in text
    assert entries["twin_loss"]["kl"] == loss.kl > 0
    assert {m["statistics"] for m in entries["matrices"]} == {"128 tokens that the model sampled"}


def test_what_was_observed_goes_first():
    step = TracedStep()
    collect_statistics(step.model, [prompt(40, 2)], progress=False)
    model = packed_by_default(step=step)
    assert {p.statistics for p in report(model).packed} == {"80 observed tokens"}
    assert find_record(model).of(Statistics).own.seconds == 0


def test_a_model_that_cannot_write_takes_hqq_and_says_so(monkeypatch):
    def fails(*_):
        raise TypeError("no text from me")

    monkeypatch.setattr(own_text, "sample", fails)
    model = packed_by_default()
    assert same(bytes_of(model), bytes_of(packed_by_default(quantizer="hqq")))
    assert {p.asked for p in report(model).packed} == {"gptq"}
    reason = "took quantizer='hqq': the model wrote no text of its own (TypeError: no text from me)"
    assert reason in str(report(model))
    assert report(model).to_dict()["own_text_refused"] == "TypeError: no text from me"
    assert report(model, estimate_loss=True).record.of(TwinWeights).loss.value is None


def test_a_body_without_a_head_cannot_write():
    model = make("llama", layers=2).model
    model.compile(backend=river, options=OPTIONS)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for tokens in (9, 1):
            model(input_ids=prompt(tokens), cache=cache, use_cache=True)
    assert {p.quantizer for p in report(model).packed} == {"hqq"}
    assert "the model wrote no text of its own (AttributeError" in str(report(model))


@pytest.mark.slow
def test_weights_that_changed_write_anew():
    """Their twins are those of a start with these weights."""
    model, other = started(), make("llama", layers=2, seed=7)
    assert report(model, estimate_loss=True).record.of(TwinWeights).loss.value is not None
    model.load_state_dict(other.state_dict())
    with pytest.warns(RiverWarning, match="^RC048: The weights changed after their 4-bit twins were packed"):
        decode(model, new_cache(model, "static"), [0])
    other.compile(backend=river, options=OPTIONS)
    decode(other, new_cache(other, "static"), [0])
    assert same(bytes_of(model), bytes_of(other))
    assert report(model).record.of(TwinWeights).loss.value is None  # of other weights


def test_an_artifact_says_what_its_twins_knew(tmp_path):
    first = packed_by_default()
    save_twins(first, tmp_path / "twins")
    with safe_open(tmp_path / "twins" / FILE, "pt") as file:
        matrices = json.loads(file.metadata()["matrices"])
    assert {(m["asked"], m["quantizer"], m["statistics"]) for m in matrices} == {
        ("gptq", "gptq", "128 tokens that the model sampled")
    }
    second = packed_by_default(twins=tmp_path / "twins")
    assert same(bytes_of(first), bytes_of(second))
    assert {p.statistics for p in report(second).packed} == {"128 tokens that the model sampled"}
    assert find_record(second).of(Statistics).own.seconds == 0


def test_an_artifact_keeps_what_took_the_place_of_statistics(tmp_path, monkeypatch):
    monkeypatch.setattr(own_text, "sample", lambda *_: 1 / 0)
    first = packed_by_default()
    save_twins(first, tmp_path / "twins")
    second = packed_by_default(twins=tmp_path / "twins")
    assert same(bytes_of(first), bytes_of(second))
    assert {(p.asked, p.quantizer, p.statistics) for p in report(second).packed} == {("gptq", "hqq", "")}


def test_sampled_text_is_the_models():
    """Token by token with a cache it is what passes over all tokens so far give for the same draws."""
    model = make("llama", layers=2)
    ids = sample(model, 3, 6, seed=5)
    draws = torch.Generator().manual_seed(5)
    expected = torch.randint(VOCABULARY, (3, 1), generator=draws)
    with torch.no_grad():
        for _ in range(5):
            chances = model(input_ids=expected).logits[:, -1].softmax(-1).tolist()
            points = torch.rand(3, 1, generator=draws)[:, 0].tolist()
            drawn = [
                [next(i for i, up_to in enumerate(accumulate(c)) if up_to > p)]
                for c, p in zip(chances, points, strict=True)
            ]
            expected = torch.cat([expected, torch.tensor(drawn)], dim=1)
    assert torch.equal(ids, expected)
    assert torch.equal(ids, sample(model, 3, 6, seed=5))
    assert not torch.equal(ids, sample(model, 3, 6, seed=6))


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "mixtral", "llama4"])
def test_the_loss_is_that_of_all_twins_together(family):
    """Falcon multiplies by transposed parameters, GPT-2 stores them transposed, others stack experts."""
    step = TracedStep(family)
    step.run(quantizer="rtn")
    sites = report(step.model).packed
    loss = estimate_loss(step.model, sites)
    ids = sample(step.model, 32, 4, LOSS_SEED)
    other = make(family, layers=2)
    other.load_state_dict(dequantized(other, sites), strict=False)
    with torch.no_grad():
        p, q = (model(input_ids=ids).logits.flatten(0, 1) for model in (step.model, other))
    assert loss.tokens == 128
    assert loss.kl == pytest.approx(token_kl(p, q).mean().item(), rel=1e-3)
    assert loss.agreement == (p.argmax(-1) == q.argmax(-1)).float().mean().item()
    assert loss.kl > 0


def test_a_large_loss_is_warned_of():
    model = packed_by_default()
    report_before = str(report(model))
    assert "WARNING" not in report_before
    object.__setattr__(report(model, estimate_loss=True).record.of(TwinWeights).loss.value, "kl", 3.0)
    assert "KL 3.000" in str(report(model))
    assert "WARNING" in str(report(model))
    assert TwinLoss(3.0, 0.5, 10).large
