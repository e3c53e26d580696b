"""Quantized twins of every family: the same slots and counters, executed blocks untouched, and what is reported."""

from __future__ import annotations

import functools

import pytest
import torch

from river_compile import report
from river_compile.backend import river
from tests.support.decoding import cache_state, decode, new_cache
from tests.support.families import REFUSED, REWRITTEN, each, make
from tests.support.lowerings import OPERATORS

OPTIONS = {"kernels": OPERATORS, "quantizer": "rtn", "group_size": 32, "first_exit": 1}


@functools.cache
def twin_run(name: str) -> dict[str, object]:
    """Decodes one token that leaves after the first block, with 4-bit twins, and one that runs at full depth."""
    model = make(name, layers=2)
    plain, river_cache = new_cache(model, "static"), new_cache(model, "static")
    model.compile(backend=river, options=OPTIONS)
    expected = decode(model, plain, [model.config.num_hidden_layers], plain_prompt=True)
    actual = decode(model, river_cache, [1], plain_prompt=True)
    return {
        "logits": (expected[-1], actual[-1]),
        "caches": (cache_state(plain), cache_state(river_cache)),
        "report": report(model).to_dict(),
    }


@pytest.mark.parametrize("name", each(REWRITTEN))
def test_an_exit_fills_the_same_slots(name):
    """Lengths and written slots are the plain model's; the executed block's entries are its very bits."""
    run = twin_run(name)
    for layer, (plain, twin) in enumerate(zip(*run["caches"], strict=True)):
        assert plain[2] == twin[2]
        for a, b in zip(plain[:2], twin[:2], strict=True):
            written = [(t != 0).any(-1).any(1) for t in (a, b)]
            assert torch.equal(*written), f"slots of layer {layer}"
            if layer < 1:
                assert torch.equal(a, b), f"entries of layer {layer}"


@pytest.mark.parametrize("name", each(REWRITTEN))
def test_four_bit_twins_are_close_to_their_blocks(name):
    """The logits after a quantized exit point the way of the plain model's, but are not its bits."""
    expected, actual = (logits.flatten().double() for logits in twin_run(name)["logits"])
    assert not torch.equal(expected, actual)
    assert torch.nn.functional.cosine_similarity(expected, actual, dim=0) > 0.9


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.slow
def test_other_families_are_refused_with_a_reason(name):
    """What is not rewritten says why, and runs as the plain model."""
    run = twin_run(name)
    refusals = [g["refusal"] for g in run["report"]["graphs"]]
    assert refusals
    assert all(refusal.startswith(REFUSED[name]) for refusal in refusals)
    assert torch.equal(*run["logits"])
