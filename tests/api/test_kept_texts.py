"""Texts that a model keeps between calls of generate: a prompt that begins with one has the text of a fresh prompt."""

import copy
import threading

import pytest
import torch

import river_compile
from river_compile.decoding import prefix_cache
from river_compile.decoding.prefix_cache import PrefixPool
from river_compile.kernels.native.load import any_rows
from river_compile.upstream.transformers import cache_of
from tests.support.decoding import Scores, left_padded
from tests.support.families import CONFIGS, make, prompt
from tests.support.lowerings import OPERATORS
from tests.support.recorder import recording

QUALITIES = {
    "exact": {"num_assistant_tokens": 3, "num_assistant_tokens_schedule": "constant"},
    "strict": {"strict": True, "num_assistant_tokens": 3, "num_assistant_tokens_schedule": "constant"},
    "fast": {"quality": "fast", "quantizer": "rtn"},
}
MANY = 17  # tokens that run of a prompt, at least, and that a text shares, at least


def accelerated(quality="exact", dtype=torch.float32, family="llama", config=None, **options):
    model = make(family, dtype, layers=2, config=config)
    return river_compile.accelerate(model, **QUALITIES[quality], compile_cache=False, group_size=32, **options)


@pytest.fixture
def eager():
    """Returns a model whose blocks run operator by operator, with the bits of the plain model."""
    with recording():
        yield lambda quality="exact", **more: accelerated(quality, kernels=OPERATORS, graphs=True, **more)


def generate(model, ids, tokens=8, **options):
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": tokens, "do_sample": False, **options}
    return model.generate(ids, **given)


def reused(model) -> int:
    """Returns how many tokens of prompts did not run so far."""
    return river_compile.report(model).record.of(PrefixPool).texts.reused


def ran(model, ids, **options):
    """Returns the text of a call, and how many tokens of its prompt did not run."""
    before = reused(model)
    text = generate(model, ids, **options)
    return text, reused(model) - before


def then(text, *seeds, length=20):
    """Returns a text with other tokens after it."""
    return torch.cat([text, *(prompt(length, 1, seed=seed) for seed in seeds)], dim=1)


@pytest.mark.slow
@pytest.mark.parametrize("quality", ["exact", "fast", "strict"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_text_is_a_fresh_prompts(quality, dtype):
    """On the C++ kernels: in 16 bits to the bit, scores too; float32 has a library's rounding, so strict takes none."""
    model, first = accelerated(quality, dtype), prompt(60, 1, seed=3)
    answered = generate(model, first)
    to_the_bit = any_rows(dtype)
    entries = answered.shape[1] - 1 if quality == "exact" and not to_the_bit else first.shape[1]
    prompts = {
        "the text itself": (answered, min(entries, answered.shape[1] - MANY)),
        "goes on": (then(answered, 1), entries),
        "goes on, a little": (then(answered, 1, length=1), min(entries, answered.shape[1] + 1 - MANY)),
        "parts in the middle": (then(first[:, :30], 2, 4), 30),
        "shares nothing": (prompt(70, 1, seed=9), 0),
        "is shorter": (first[:, :40], 40 - MANY),
        "is too short": (first[:, : 2 * MANY - 1], 0),
    }
    for name, (ids, expected) in prompts.items():
        scores = Scores(), Scores()
        river_compile.empty_cache(model)
        generate(model, first)
        text, found = ran(model, ids, logits_processor=[scores[0]])
        assert found == (0 if quality == "strict" and not to_the_bit else expected), name
        river_compile.empty_cache(model)
        assert torch.equal(text, generate(model, ids, logits_processor=[scores[1]])), name
        ours, fresh = (torch.cat(noted.steps) for noted in scores)
        assert torch.equal(ours, fresh) if to_the_bit else torch.allclose(ours, fresh, rtol=0, atol=1e-4), name


def test_a_conversation_goes_on_in_place(eager):
    """Turn by turn, beyond what the cache had room for, and the text is the plain model's."""
    model, plain, ids = eager(), make("llama", layers=2), prompt(40, 1)
    text = generate(model, ids)
    for turn in range(5):
        ids = then(text, turn, length=150)
        text, found = ran(model, ids)
        assert torch.equal(text, generate(plain, ids))
        assert found == ids.shape[1] - 151
    assert ids.shape[1] > 800
    assert f"{reused(model)} prompt tokens were reused" in str(river_compile.report(model))


def test_conversations_in_turn_have_their_texts_each(eager):
    """Four that share a beginning; a text that another one begins with is not kept as well."""
    model, system = eager("fast"), prompt(30, 1)
    talks = {talk: then(system, talk) for talk in range(4)}
    for turn in range(3):
        for talk, ids in talks.items():
            text, found = ran(model, ids)
            if turn == 0:
                assert found == (30 if talk else 0)
            else:
                assert found == ids.shape[1] - 28  # (of the answer's tokens some entries are twins')
            talks[talk] = then(text, 10 * turn + talk)
    kept = river_compile.report(model).record.of(PrefixPool).texts
    assert kept.texts == 4
    assert kept.tokens == sum(ids.shape[1] - 28 for ids in talks.values())


def test_saved_texts_are_bounded_and_the_oldest_goes(eager, monkeypatch):
    size = 2 * 2 * 2 * 16 * 4 * 60  # layers, keys and values, heads, features, bytes, tokens
    monkeypatch.setattr(prefix_cache, "_SAVED", 2 * size)
    model, texts = eager("fast"), [prompt(60, 1, seed=seed) for seed in range(4)]
    for ids in texts:
        generate(model, ids)
    kept = river_compile.report(model).record.of(PrefixPool).texts
    assert (kept.texts, kept.saved_bytes) == (3, 2 * size)
    assert [ran(model, texts[seed])[1] for seed in (2, 3, 1, 0)] == [60 - MANY, 60 - MANY, 0, 0]
    assert river_compile.empty_cache(model) > kept.saved_bytes
    assert river_compile.report(model).record.of(PrefixPool).texts.texts == 0
    assert ran(model, texts[0])[1] == 0


@pytest.fixture(scope="module")
def one():
    """A model for tests that change nothing of it."""
    with recording():
        yield accelerated(kernels=OPERATORS, graphs=True)


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "dynamic"},
        {"prefill_chunk_size": 32},
        {"attention_mask": torch.tensor([[0] * 5 + [1] * 55])},
        {"position_ids": torch.arange(1, 61)[None]},
        {"num_beams": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_calls_that_take_a_fresh_prompt(options, one):
    """Their text is the plain model's, and what was kept before stays, or is forgotten."""
    plain, ids = make("llama", layers=2), prompt(60, 1)
    text = generate(one, ids)
    before = reused(one)
    ours, theirs = (generate(model, ids, **options) for model in (one, plain))
    assert torch.equal(ours, theirs)
    assert reused(one) == before
    assert torch.equal(generate(one, ids), text)


def test_batches_take_fresh_prompts_and_texts_outlast_them(one):
    ids, (padded, mask) = prompt(60, 1), left_padded(2, 60)
    text = generate(one, ids)
    assert ran(one, padded, attention_mask=mask)[1] == 0
    again, found = ran(one, ids)
    assert torch.equal(again, text)
    assert found == 60 - MANY


def test_a_call_that_fails_leaves_no_text_behind(one):
    def fail(ids, scores):
        raise KeyboardInterrupt

    ids = prompt(60, 1)
    river_compile.empty_cache(one)
    text = generate(one, ids)
    with pytest.raises(KeyboardInterrupt):
        generate(one, then(text, 1), stopping_criteria=[fail])
    assert river_compile.report(one).record.of(PrefixPool).texts.texts == 0
    again, found = ran(one, ids)
    assert torch.equal(again, text)
    assert found == 0


def test_calls_at_the_same_time_share_no_entry(one):
    """One uses the prefix cache, the other one runs a fresh prompt; both texts are kept."""
    ids, inner = prompt(60, 1), []
    river_compile.empty_cache(one)
    text = generate(one, ids)

    def another(_, scores):
        if not inner:
            thread = threading.Thread(target=lambda: inner.append(generate(one, prompt(60, 1, seed=5))))
            thread.start()
            thread.join()
        return scores

    again, found = ran(one, ids, logits_processor=[another])
    assert torch.equal(again, text)
    assert found == 60 - MANY
    assert [ran(one, then(kept, 1))[1] > 60 for kept in (inner[0], text)] == [True, True]


def _attend(model):
    model.set_attn_implementation("eager")


def _scale_rope(model):
    model.model.rotary_emb.inv_freq *= 0.5


def _set_data(model):
    model.model.layers[1].mlp.up_proj.weight.data = model.model.layers[1].mlp.up_proj.weight.data * 1.5


def _write_through_data(model):
    model.model.layers[0].self_attn.k_proj.weight.data.mul_(1.5)


def _write_a_norm_through_data(model):
    model.model.layers[1].input_layernorm.weight.data.mul_(1.5)


@torch.no_grad()
def _write_one_element(model):
    model.model.layers[0].mlp.down_proj.weight[3, 5] += 8.0


def _load(model):
    model.load_state_dict(make("llama", seed=1, layers=2).state_dict())


def _hook(model):
    model.model.layers[0].register_forward_hook(lambda module, args, output: output * 1.5)


def _configure(model):
    model.model.layers[0].self_attn.scaling = 0.5


def _write_unseen_and_refresh(model):
    model.model.layers[0].mlp.down_proj.weight.data[3, 5] += 8.0
    river_compile.requantize(model)


CHANGES = [
    _attend, _scale_rope, _set_data, _write_through_data, _write_a_norm_through_data, _write_one_element, _load, _hook,
    _configure, _write_unseen_and_refresh,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_a_model_that_changes_takes_a_fresh_prompt(change, eager):
    """Its text is that of a plain model with the same change, also in later turns."""
    model, ids = eager(), prompt(60, 1)
    generate(model, ids)
    assert ran(model, ids)[1] == 60 - MANY
    change(model)
    text, found = ran(model, ids)
    assert found == 0
    plain = copy.deepcopy(model)  # (which is not compiled)
    assert torch.equal(text, generate(plain, ids))
    assert ran(model, ids)[1] == (0 if change is _hook else 60 - MANY)


def test_a_model_that_moves_takes_a_fresh_prompt(eager):
    model, ids = eager(), prompt(60, 1)
    generate(model, ids)
    model.bfloat16()
    text, found = ran(model, ids)
    assert found == 0
    river_compile.empty_cache(model)
    assert torch.equal(text, generate(model, ids))


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_texts_beyond_a_window_are_kept_too(family, eager):
    """Windows of 8 tokens, which are masks over all entries."""
    model, plain, text = eager(family=family), make(family, layers=2), prompt(40, 1)
    for turn, entries in enumerate([0, 47, 74]):
        text, found = ran(model, text)
        assert found == entries
        assert torch.equal(text, generate(plain, text[:, :-8]))
        text = then(text, turn, length=19)


def test_callers_who_get_the_cache_back_have_one_of_their_own(one):
    """Its entries are those of a plain call's, and the next prompt begins with the text all the same."""
    plain, ids = make("llama", layers=2), prompt(60, 1)
    river_compile.empty_cache(one)
    ours, theirs = (generate(model, ids, return_dict_in_generate=True) for model in (one, plain))
    assert torch.equal(ours.sequences, theirs.sequences)
    for layer, expected in zip(cache_of(ours).layers, cache_of(theirs).layers, strict=True):
        assert type(layer) is type(expected)
        torch.testing.assert_close(layer.keys, expected.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(layer.values, expected.values, atol=1e-4, rtol=1e-4)
        layer.keys.fill_(float("nan"))
    text, found = ran(one, then(ours.sequences, 1))
    assert found == 67
    assert torch.equal(text, generate(plain, then(theirs.sequences, 1)))


@pytest.mark.slow
def test_rotary_frequencies_that_follow_the_length_take_fresh_prompts(eager):
    """A token's entries are others in a longer text."""
    config = CONFIGS["llama"](2)
    config.max_position_embeddings = 64
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model, plain, ids = eager(config=config), make("llama", config=config), prompt(50, 1)
    for _ in range(2):
        text, found = ran(model, ids)
        assert torch.equal(text, generate(plain, ids))
        assert found == 0
        ids = then(text, 1, length=30)


def test_prompts_that_leave_the_backbone_are_fresh(eager):
    """All of a prompt's tokens leave together, as its least similar one says."""
    model, ids = eager("fast", prefill="exit"), prompt(60, 1)
    generate(model, ids)
    assert ran(model, ids)[1] == 0
