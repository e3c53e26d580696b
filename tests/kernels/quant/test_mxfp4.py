"""MXFP4 stacks: the values of transformers' conversion, recovered from 16 bits, and as a parameter."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from river_compile.kernels.quant.layouts import pack_lossless_stack
from river_compile.kernels.quant.mxfp4 import Mxfp4Stack, check_mxfp4, find_mxfp4, mxfp4_parts, unpack_mxfp4
from tests.support.examples import examples


def drawn(*shape: int, seed: int, scales: tuple[int, int] = (110, 130)) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns blocks and scales of ``[..., N, groups]``."""
    g = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (*shape, 16), generator=g, dtype=torch.uint8)
    return blocks, torch.randint(*scales, shape, generator=g, dtype=torch.uint8)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int16), b.contiguous().view(torch.int16))


@pytest.mark.parametrize("scales", [(0, 5), (110, 130), (250, 255)])
def test_values_are_those_of_transformers(scales):
    """Subnormal and infinite ones too."""
    blocks, numbers = drawn(3, 6, 4, seed=1, scales=scales)
    ours = Mxfp4Stack(blocks, numbers).dequantize()
    theirs = convert_moe_packed_tensors(blocks, numbers, dtype=torch.bfloat16)
    assert ours.shape == (3, 128, 6)
    assert same_bits(ours, theirs)
    assert same_bits(unpack_mxfp4(blocks, numbers).mT, theirs)


@given(n=st.integers(1, 20), groups=st.integers(1, 4), seed=st.integers(0, 1 << 20), largest=st.sampled_from((1, 3, 7)))
@examples(40)
def test_a_matrix_in_16_bits_has_its_blocks_again(n, groups, seed, largest):
    """Groups without the largest numbers too, which have several scales, and zeros of both signs."""
    blocks, scales = drawn(n, groups, seed=seed)
    blocks &= 0x88 | largest * 0x11
    weight = unpack_mxfp4(blocks, scales)
    found = find_mxfp4(weight)
    assert found is not None
    assert same_bits(unpack_mxfp4(*found), weight)


@pytest.mark.parametrize("change", [1.0625, 2.0**9, 2.0**-9, float("nan"), float("inf")])
def test_a_matrix_with_one_other_value_has_none(change):
    blocks, scales = drawn(40, 3, seed=2)
    weight = unpack_mxfp4(blocks, scales)
    weight[17, 33] = (weight[17, 32:64].abs().max() * change).bfloat16()
    assert find_mxfp4(weight) is None
    assert find_mxfp4(weight[:, :40]) is None
    assert find_mxfp4(weight.float()) is None


@pytest.mark.parametrize("transposed", [False, True])
def test_a_stack_takes_a_quarter(transposed):
    stack = Mxfp4Stack(*drawn(3, 20, 4, seed=3))
    dense = stack.dequantize() if transposed else stack.dequantize().mT.contiguous()
    packed = pack_lossless_stack(dense, transposed=transposed)
    assert packed.layout == "mxfp4"
    assert packed.qweight.nbytes + packed.scale_zero.nbytes == dense.nbytes * 17 // 64
    assert same_bits(packed.dequantize(torch.bfloat16).view(3, 20, 128).mT, stack.dequantize())
    dense[1, 5, 7] = 3.3
    assert pack_lossless_stack(dense, transposed=transposed).layout == "12bit"


def test_a_parameter_shares_its_bytes_with_what_is_packed():
    blocks, scales = drawn(2, 8, 2, seed=4)
    parameter = torch.nn.Parameter(Mxfp4Stack(blocks, scales), requires_grad=False)
    packed = pack_lossless_stack(parameter, transposed=True)
    assert packed.qweight.data_ptr() == blocks.data_ptr()
    assert packed.scale_zero.data_ptr() == scales.data_ptr()
    assert (packed.experts, packed.out_features, packed.in_features) == (2, 8, 64)


def test_operations_read_the_values():
    stack = Mxfp4Stack(*drawn(4, 8, 2, seed=5))
    dense, x = stack.dequantize(), torch.randn(3, 64).bfloat16()
    assert torch.equal(x @ stack[2], x @ dense[2])
    chosen = torch.tensor([3, 0, 3])
    assert torch.equal(stack[chosen], dense[chosen])
    assert torch.equal(torch.bmm(x[:, None], stack[chosen]), torch.bmm(x[:, None], dense[chosen]))
    assert torch.equal(stack.float(), dense.float())
    assert (stack.shape, stack.dtype, stack.device) == (dense.shape, dense.dtype, dense.device)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), lambda x: x.detach()])
def test_copies_stay_in_4_bits(copied):
    stack = torch.nn.Parameter(Mxfp4Stack(*drawn(4, 8, 2, seed=6)), requires_grad=False)
    parts = mxfp4_parts(copied(stack))
    assert parts is not None
    assert all(map(torch.equal, parts, mxfp4_parts(stack)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b, s: (b[..., :8], s), r"blocks \(2, 8, 2, 8\) and scales \(2, 8, 2\), and MXFP4 has"),
        (lambda b, s: (b, s[:, :4]), r"scales \(2, 4, 2\)"),
        (lambda b, s: (b.int(), s), "blocks in torch.int32"),
        (
            lambda b, s: (b, torch.where(torch.arange(2) == 1, 255, s).to(torch.uint8)),
            "scale 255, NaN, in group 1 of row 0 of expert 0",
        ),
    ],
)
def test_damage_is_named(change, message):
    with pytest.raises(ValueError, match=f"proj has .*{message}"):
        check_mxfp4("proj", *change(*drawn(2, 8, 2, seed=7)))
