"""A full window's entries one slot further up: the kernel against a copy, in any order of its programs."""

import random
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from river_compile.kernels import ops  # noqa: F401  registers torch.ops.river
from river_compile.kernels.triton.loader import compile_for
from river_compile.kernels.triton.shift import ShiftSpec
from tests.kernels.checks import check_shift
from tests.kernels.harness import in_order
from tests.support.examples import examples


@given(
    st.integers(1, 2),
    st.integers(1, 3),
    st.sampled_from((1, 16, 40, 64)),
    st.sampled_from((1, 2, 3, 8, 9, 31, 64)),
    st.sampled_from(("float32", "float16", "bfloat16")),
    st.sampled_from((1, 4, 16, 1024)),
    st.integers(0, 2**20),
)
@examples(60)
def test_every_entry_moves_up_by_one(batch, kv_heads, head_dim, slots, dtype, block, seed):
    """Many more slots than are moved at once, and fewer; programs take their turns in any order."""
    with in_order(random.Random(seed).shuffle):
        check_shift(ShiftSpec(batch, kv_heads, kv_heads, head_dim, slots, dtype=dtype, block=block), seed)


def test_a_window_in_a_wider_tensor():
    torch.manual_seed(0)
    wide = [torch.randn(2, 9, 3, 40).transpose(1, 2)[:, 1:] for _ in range(2)]
    before = [cache.clone() for cache in wide]
    assert torch.ops.river.shift(*wide).tolist() == [8]
    for cache, was in zip(wide, before, strict=True):
        assert torch.equal(cache[:, :, :-1], was[:, :, 1:])
        assert torch.equal(cache[:, :, -1], was[:, :, -1])


@pytest.mark.parametrize(("target", "arch"), [("cuda", 80), ("cuda", 90), ("hip", "gfx942")])
def test_a_block_is_read_before_any_of_it_is_written(target, arch):
    """Which no interpreter shows: it has no threads. A store follows a barrier behind the load of what it stores."""
    (compiled,) = compile_for(ShiftSpec(1, 8, 8, 128, 4096), target, arch)
    load, store = r"ld\.global\.v4|global_load_dwordx4", r"st\.global\.v4|global_store_dwordx4"
    pattern = rf"(?P<load>{load})|(?P<store>{store})|(?P<barrier>bar\.sync|s_barrier)"
    loads = stores = ready = 0
    for found in re.finditer(pattern, compiled.asm["ptx" if target == "cuda" else "amdgcn"]):
        loads += found.lastgroup == "load"
        stores += found.lastgroup == "store"
        ready = loads if found.lastgroup == "barrier" else ready
        assert stores <= ready
    assert stores > 0


def test_what_is_refused():
    with pytest.raises(ValueError, match="block=3"):
        ShiftSpec(1, 1, 1, 8, 8, block=3)
    with pytest.raises(ValueError, match="one shape and stride"):
        torch.ops.river.shift(torch.randn(1, 1, 4, 8), torch.randn(1, 1, 5, 8))
