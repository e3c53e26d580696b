"""A model whose channels were shuffled is the same function of other matrices."""

import pytest
import torch

from benchmarks.shuffled import shuffle_channels
from tests.support.families import make, prompt


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_shuffled_model_gives_the_same_logits(family):
    """Up to roundings in float32; and no row of any matrix is what it was."""
    model = make(family, layers=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):  # (as trained, not all ones or zeros)
                parameter.add_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)))
    ids, before = prompt(7, 2), {name: weight.clone() for name, weight in model.named_parameters()}
    with torch.no_grad():
        expected = model(ids).logits
        shuffle_channels(model)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-3, atol=1e-4)
    changed = dict(model.named_parameters())
    for name in before:
        if changed[name].ndim == 2:
            assert not (changed[name] == before[name]).all(-1).any(), name


def test_the_seed_says_which_order():
    one, same, other = (make("llama", layers=1) for _ in range(3))
    for model, seed in ((one, 1), (same, 1), (other, 2)):
        shuffle_channels(model, seed)
    weights = [model.base_model.layers[0].mlp.down_proj.weight for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "gemma2"])
def test_other_architectures_are_refused_unchanged(family):
    model = make(family, layers=1)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with pytest.raises(ValueError, match="cannot be shuffled"):
        shuffle_channels(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
