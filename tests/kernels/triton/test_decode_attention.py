"""decode_attention in Triton's interpreter against float64: slots that take no part hold NaN and are never read."""

import pytest
from hypothesis import given

from river_compile.kernels.triton.decode_attention import DecodeAttentionSpec
from tests.kernels.cases import attention_cases
from tests.kernels.checks import check_attention
from tests.kernels.harness import examples


@pytest.mark.core
@given(attention_cases())
@examples(80)
def test_one_query_position(case):
    check_attention(*case)


@pytest.mark.parametrize("mask_dtype", ["bool", "float16"])
@pytest.mark.parametrize("splits", [1, 3])
def test_a_row_without_any_slot_gives_zero(splits, mask_dtype):
    spec = DecodeAttentionSpec(2, 2, 1, 64, 40, 0.125, mask=True, mask_dtype=mask_dtype, splits=splits, block=16)
    check_attention(spec, padding=40)


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
        ({"cache_strides": (5,)}, "cache_strides"),
    ],
)
def test_what_a_spec_refuses(changes, message):
    fields = {"batch": 1, "heads": 4, "kv_heads": 2, "head_dim": 64, "slots": 8, "scale": 1.0}
    with pytest.raises(ValueError, match=message):
        DecodeAttentionSpec(**{**fields, **changes})
