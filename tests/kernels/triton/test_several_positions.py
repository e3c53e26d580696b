"""Cache kernels with open positions in Triton's interpreter: a position's bits do not depend on the others."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from river_compile.kernels.triton.cache import DecodeAttentionSpec, KvFillSpec
from tests.kernels.cases import attention_cases, kv_cases
from tests.kernels.checks import KV, check_attention_of_several, check_bits_of_positions, filling
from tests.kernels.harness import poisoned, run_guarded
from tests.support.examples import examples


@st.composite
def several_cases(draw):
    """Draws a spec of attention with open positions, their number, and a seed."""
    spec, _, seed = draw(attention_cases(most_slots=80))
    shared = draw(st.sampled_from((0, 1)))
    spec = dataclasses.replace(spec, positions=None, mask=True, mask_rows=shared, advance=draw(st.booleans()))
    return spec, draw(st.integers(1, 9)), seed


@given(several_cases())
@examples(60)
def test_each_position_attends_to_its_own_slots(case):
    check_attention_of_several(*case)


@given(several_cases(), st.data())
@examples(40)
def test_a_position_has_the_same_bits_whichever_others_run_beside_it(case, data):
    spec, positions, seed = case
    first = data.draw(st.integers(0, positions - 1))
    some = slice(first, first + data.draw(st.integers(1, positions - first)))
    check_bits_of_positions(spec, positions, some, seed)


@given(kv_cases(), st.integers(1, 5), st.booleans())
@examples(60)
def test_every_position_is_made_and_written_as_it_is_alone(case, positions, counts):
    """From any first slot; positions after the last slot write nothing."""
    one, slot, seed = case
    shape = (one.batch, one.kv_heads, one.slots, one.head_dim)
    g = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, one.dtype)
    caches = {name: torch.randn(shape, generator=g).to(dtype) for name in KV}
    every = [filling(one, slot + t, torch.Generator().manual_seed(seed + t))[0] for t in range(positions)]
    norms = {name: every[0][name] for name in ("q_norm", "k_norm") if name in every[0]}
    alone, queries = dict(caches), []
    for given_ in every:
        empty = poisoned((one.batch, one.heads, one.head_dim), dtype)
        result = run_guarded(one, **{**given_, **norms}, **alone, q=empty)
        alone = {name: result[name] for name in KV}
        queries.append(result["q"])
    spec = dataclasses.replace(one, positions=None, counts=counts)
    together = {
        name: torch.stack([given_[name] for given_ in every], 1).flatten(0, 1)
        for name in ("qkv", "cos", "sin")
        if name in every[0]
    }
    slots = [slot] if counts else range(slot, slot + positions)
    together["slot"] = torch.tensor([*slots], dtype=getattr(torch, one.index_dtype))
    empty = poisoned((one.batch * positions, one.heads, one.head_dim), dtype)
    found = run_guarded(spec, positions, **together, **norms, **caches, q=empty)
    expected = {**alone, "q": torch.stack(queries, 1).flatten(0, 1)}
    for name, tensor in expected.items():
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


SHAPE = {"batch": 2, "heads": 4, "kv_heads": 2, "head_dim": 64, "slots": 8}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": 2}, "positions=2"),
        ({"fill": KvFillSpec(**SHAPE), "positions": None}, "is for another cache"),
        ({"mask": True, "mask_rows": 1}, "mask_rows=1 goes with positions=None"),
        ({"mask": True, "mask_rows": 3, "positions": None}, "mask_rows=3"),
        ({"positions": None, "index_dtype": "int8"}, "index_dtype='int8'"),
    ],
)
def test_what_a_spec_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        DecodeAttentionSpec(**SHAPE, scale=1.0, **changes)


def test_open_positions_are_counted_at_the_launch():
    with pytest.raises(ValueError, match="pass the number as rows"):
        DecodeAttentionSpec(**SHAPE, scale=1.0, positions=None).buffers()
