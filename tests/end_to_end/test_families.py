"""The zoo of tiny models is fit to test with: every family builds, repeats itself, and generates varied text."""

import pytest
import torch

from tests.support.families import FAMILIES, HIDDEN, each, make, prompt

NEW_TOKENS = 12


def generate(model, ids, **options):
    """Returns the new tokens of a greedy generation ``[batch, NEW_TOKENS]``."""
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, **options)
    return out[:, ids.shape[1] :]


@pytest.mark.parametrize("name", each(FAMILIES))
def test_static_and_dynamic_caches_generate_the_same_varied_text(name):
    """Both caches give the same text, longer than any sliding window, and the text depends on what came before."""
    model = FAMILIES[name]()
    ids = prompt(batch=2)
    dynamic = generate(model, ids)
    static = generate(model, ids, cache_implementation="static", disable_compile=True)
    assert dynamic.shape == (2, NEW_TOKENS)
    assert torch.equal(dynamic, static)
    assert len(dynamic.unique()) > 3
    assert not torch.equal(dynamic[0], dynamic[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_models_repeat_and_their_logits_are_not_degenerate(name):
    """Equal seeds give equal logits, other seeds give others; logits are finite, spread and peaked at no one token."""
    ids = prompt(batch=2)
    with torch.no_grad():
        logits, again, other = (make(name, seed=seed)(ids).logits for seed in (0, 0, 1))
    assert torch.equal(logits, again)
    assert not torch.allclose(logits, other)
    assert logits.isfinite().all()
    assert 0.1 < logits.std(-1).mean() < 10
    assert len(logits.argmax(-1).unique()) > 4


@pytest.mark.parametrize("name", FAMILIES)
def test_every_matrix_has_groups_of_32_and_no_vector_is_plain(name):
    """Groups of 32 divide every matrix; no bias is all zero and no norm all one, so a lost one changes the result."""
    model = FAMILIES[name]()
    for path, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert len(parameter.unique()) > 1, path
        elif "router" not in path and "gate.weight" not in path:
            assert parameter.shape[-1] % 32 == 0, path
    assert model.get_input_embeddings().weight.shape[-1] == HIDDEN


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_hold_the_rounded_weights(dtype):
    for exact, rounded in zip(make("llama").parameters(), make("llama", dtype).parameters(), strict=True):
        assert torch.equal(exact.to(dtype), rounded)
