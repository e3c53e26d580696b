"""12-bit packed bfloat16 weights: any weight is recovered bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from river_compile.kernels.quant import lossless
from tests.support.examples import examples

KINDS = ("normal", "bits", "zeros", "minus_zero", "one_exponent", "subnormal", "not_finite", "dequantized")


def matrix(n: int, k: int, kind: str, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    normal = (torch.randn(n, k, generator=g) * 0.02).bfloat16()
    if kind == "bits":
        return torch.randint(-(2**15), 2**15, (n, k), generator=g).to(torch.int16).view(torch.bfloat16)
    if kind == "zeros":
        return torch.zeros_like(normal)
    if kind == "minus_zero":
        return torch.where(torch.rand(n, k, generator=g) < 0.3, torch.tensor(-0.0).bfloat16(), normal)
    if kind == "one_exponent":
        return (torch.rand(n, k, generator=g) + 1).bfloat16()
    if kind == "subnormal":
        return (normal.view(torch.int16) & -0x7F81).view(torch.bfloat16)
    if kind == "not_finite":
        special = torch.tensor([torch.inf, -torch.inf, torch.nan]).bfloat16()
        return torch.where(torch.rand(n, k, generator=g) < 0.1, special[torch.randint(3, (n, k), generator=g)], normal)
    if kind == "dequantized":
        return (torch.randint(-8, 8, (n, k), generator=g) * 0.013).bfloat16()
    return normal


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int16)


@given(st.integers(1, 70), st.integers(1, 300), st.sampled_from(KINDS), st.integers(0, 2**20))
@examples(60)
def test_every_matrix_comes_back_to_the_bit(n, k, kind, seed):
    weight = matrix(n, k, kind, seed)
    units, side = lossless.pack_12bit(weight)
    assert torch.equal(bits(lossless.unpack_12bit(units, side, n, k)), bits(weight))
    first = side[4 : 5 + units.shape[0]]
    assert len(side) >= 5 + units.shape[0] + 2 * first[-1]
    assert first[-1] / weight.numel() == pytest.approx(
        lossless.patched_share(lossless.count_upper_bytes(weight)), abs=1e-6
    )


def test_patches_outside_of_their_matrix_are_noticed():
    n, k = 16, 64
    weight = torch.ones(n, k).bfloat16()
    weight[:, 3] = torch.logspace(-30, 30, n).bfloat16()
    weight[:, 9] = -weight[:, 3]
    side, first = lossless.pack_12bit(weight)[1], slice(4, 5 + n // lossless.FOUR)
    assert lossless.has_valid_patches(side, n, k)
    assert side[first][-1] > 10
    for place, value in ((first.start, 1), (first.stop - 2, -1), (first.stop - 1, 10**6), (first.stop, 4 * k)):
        wrong = side.clone()
        wrong[place] = value
        assert not lossless.has_valid_patches(wrong, n, k)


def test_patches_that_do_not_ascend_are_noticed():
    """Kernels take them unit by unit: one of an earlier unit would be written below the memory of a later one."""
    n, k = 16, 256
    weight = torch.ones(n, k).bfloat16()
    weight[:, ::50] = (torch.randn(n, 6, generator=torch.Generator().manual_seed(0)) * 30).exp().bfloat16()
    side, fours = lossless.pack_12bit(weight)[1], n // lossless.FOUR
    first, begin = side[4 : 5 + fours], 5 + fours
    assert lossless.has_valid_patches(side, n, k), "a four's first patch may lie before the last one of another"
    assert (first.diff() > 4).all()
    for four in range(fours):
        swapped, twice = side.clone(), side.clone()
        places = swapped[begin + 2 * first[four] : begin + 2 * first[four + 1] : 2]
        places[-2:] = places[-2:].flip(0)
        twice[begin + 2 * first[four]] = twice[begin + 2 * first[four] + 2]
        assert not lossless.has_valid_patches(swapped, n, k)
        assert not lossless.has_valid_patches(twice, n, k)


def test_trained_like_weights_take_12_bits_and_have_few_patches():
    weight = matrix(512, 1024, "normal", 0)
    units, side = lossless.pack_12bit(weight)
    assert units.nbytes * 8 == 12 * weight.numel()
    assert 0 < lossless.patched_share(lossless.count_upper_bytes(weight)) < 5e-4
    assert 8 * side.nbytes < 0.7 * weight.numel(), "room for 1 % of patches, which is memory where it is written alone"
    assert lossless.patched_share(lossless.count_upper_bytes(matrix(512, 1024, "bits", 0))) > 0.9


@pytest.mark.parametrize("weight", [torch.zeros(3, 4), torch.zeros(3, dtype=torch.bfloat16)])
def test_what_is_no_matrix_of_bfloat16_is_refused(weight):
    with pytest.raises(ValueError, match="12-bit packing takes a bfloat16 weight"):
        lossless.pack_12bit(weight)
