"""kv_fill in Triton's interpreter against float64: one changed slot, rotation, qk-norm, odd sizes."""

import pytest
from hypothesis import given

from river_compile.kernels.triton.cache import KvFillSpec
from tests.kernels.cases import kv_cases
from tests.kernels.checks import check_kv_fill
from tests.support.examples import examples


@pytest.mark.core
@given(kv_cases())
@examples(80)
def test_query_and_slot(case):
    check_kv_fill(*case)


@pytest.mark.parametrize("slot", [-1, 4, 1000])
def test_a_slot_outside_of_the_cache_writes_nothing(slot):
    check_kv_fill(KvFillSpec(2, 3, 1, 64, 4, rotary_dim=64), slot)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotary_dim": 7}, "rotary_dim=7"),
        ({"rotary_dim": 66}, "rotary_dim=66"),
        ({"rotary_rows": 3}, "rotary_rows=3"),
        ({"head_norm": "layer"}, "head_norm='layer'"),
        ({"cache_strides": (1, 2)}, "cache_strides"),
        ({"slots": 0}, "slots=0"),
    ],
)
def test_what_a_spec_refuses(changes, message):
    fields = {"batch": 2, "heads": 2, "kv_heads": 1, "head_dim": 64, "slots": 4}
    with pytest.raises(ValueError, match=message):
        KvFillSpec(**{**fields, **changes})
