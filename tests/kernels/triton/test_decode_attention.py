"""decode_attention in Triton's interpreter against float64; masked slots hold NaN.

The interpreter runs programs in order. A GPU's order is arbitrary, so some tests permute them.
"""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from river_compile.kernels.triton.cache import DecodeAttentionSpec, KvFillSpec
from tests.kernels.cases import attend_cases, attention_cases
from tests.kernels.checks import attend_buffers, attention_buffers, check_attend, check_attention
from tests.kernels.harness import in_order, run_guarded
from tests.support.examples import examples


@pytest.mark.core
@given(attention_cases())
@examples(80)
@pytest.mark.slow
def test_one_query_position(case):
    check_attention(*case)


@pytest.mark.parametrize("mask_dtype", ["bool", "float16"])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("sinks_dtype", [None, "float32"])
def test_a_row_without_any_slot_gives_zero(splits, mask_dtype, sinks_dtype):
    how = {"mask": True, "mask_dtype": mask_dtype, "sinks_dtype": sinks_dtype, "splits": splits, "block": 16}
    check_attention(DecodeAttentionSpec(2, 2, 1, 64, 40, 0.125, **how), padding=40)


@pytest.mark.parametrize("splits", [1, 3])
def test_sinks_at_the_limits(splits):
    """Minus infinity is no sink, to the bit; one far above all scores leaves nothing; NaN spoils its own head."""
    spec = DecodeAttentionSpec(2, 4, 2, 16, 40, 0.25, dtype="float32", splits=splits, block=16)
    buffers = attention_buffers(spec)
    without = run_guarded(spec, **buffers)["out"]
    sinks = torch.tensor([-math.inf, 1e30, math.nan, -1e30])
    out = run_guarded(dataclasses.replace(spec, sinks_dtype="float32"), **buffers, sinks=sinks)["out"]
    assert torch.equal(out[:, ::3], without[:, ::3])
    assert not out[:, 1].any()
    assert out[:, 2].isnan().all()


@given(attention_cases(), st.randoms(use_true_random=False))
@examples(15)
def test_whichever_program_comes_last_combines(case, random):
    """In another order every program sees other counts; the bits are the same."""
    spec, padding, seed = case
    spec = dataclasses.replace(spec, splits=max(2, spec.splits))
    buffers = attention_buffers(spec, padding, seed)
    expected = run_guarded(spec, **buffers)["out"]
    with in_order(random.shuffle):
        found = run_guarded(spec, **buffers)["out"]
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.core
@given(attend_cases())
@examples(80)
def test_one_position_is_made_written_and_attends(case):
    check_attend(*case)


@pytest.mark.parametrize("splits", [1, 2, 3])
@pytest.mark.parametrize("slot", [-1, 0, 15, 16, 31, 32, 33, 39, 40])
def test_the_new_slot_at_borders_of_blocks(slot, splits):
    """Later slots are masked, as in a decode step; -1 and 40 lie outside."""
    fill = KvFillSpec(1, 4, 2, 16, 40, dtype="float32", rotary_dim=16, rotary_dtype="float32")
    spec = DecodeAttentionSpec(1, 4, 2, 16, 40, 0.25, dtype="float32", mask=True, splits=splits, block=16, fill=fill)
    for advance in (False, True):
        check_attend(dataclasses.replace(spec, advance=advance), slot, window=max(slot, 0) + 1)
    check_attend(dataclasses.replace(spec, mask=False), slot)
    check_attend(spec, slot, padding=40)  # the new slot takes no part either, and is written all the same


@given(attend_cases(), st.randoms(use_true_random=False))
@examples(15)
@pytest.mark.slow
def test_a_fill_in_any_order_of_the_programs(case, random):
    """No program reads the new slot or the counter after another wrote it."""
    spec, slot, padding, seed, window = case
    spec = dataclasses.replace(spec, splits=max(2, spec.splits), advance=True)
    buffers = attend_buffers(spec, slot, padding, seed, window, "cpu")
    expected = run_guarded(spec, **buffers)
    with in_order(random.shuffle):
        found = run_guarded(spec, **buffers)
    for name in ("out", "k_cache", "v_cache", "slot"):
        assert torch.equal(*(buffer[name].contiguous().view(torch.uint8) for buffer in (found, expected))), name


@pytest.mark.parametrize("mask_dtype", ["bool", "float32"])
@pytest.mark.parametrize("padding", [15, 16, 17, 31, 32, 63, 64])
def test_blocks_without_a_slot_that_takes_part(padding, mask_dtype):
    """Masked blocks anywhere, with borders at and near those of blocks and splits."""
    for splits in (1, 2, 5):
        spec = DecodeAttentionSpec(
            1, 2, 1, 16, 80, 0.25, dtype="float32", mask=True, mask_dtype=mask_dtype, splits=splits
        )
        for window in (80, 17, 1):
            check_attention(dataclasses.replace(spec, block=16), padding, window=window)


def test_head_dim_256():
    check_attention(DecodeAttentionSpec(1, 4, 1, 256, 40, 0.0625, mask=True, splits=2), padding=7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_heads": 3}, "kv_heads=3"),
        ({"softcap": -1.0}, "softcap=-1.0"),
        ({"mask_dtype": "int8"}, "mask_dtype='int8'"),
        ({"block": 24}, "block=24"),
        ({"splits": 0}, "splits=0"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"sinks_dtype": "int8"}, "sinks_dtype='int8'"),
        ({"cache_strides": (5,)}, "cache_strides"),
        ({"fill": KvFillSpec(1, 4, 2, 64, 9)}, "is for another cache"),
        ({"advance": True}, "advance=True needs a fill"),
    ],
)
def test_what_a_spec_refuses(changes, message):
    fields = {"batch": 1, "heads": 4, "kv_heads": 2, "head_dim": 64, "slots": 8, "scale": 1.0}
    with pytest.raises(ValueError, match=message):
        DecodeAttentionSpec(**{**fields, **changes})
