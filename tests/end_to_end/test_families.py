"""The zoo of tiny models is fit to test with: every family builds, repeats itself, and hides no lost weight."""

import pytest
import torch

from tests.support.families import FAMILIES, HIDDEN, make, prompt


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
