"""The kernels around the cache where the number of positions is open, in Triton's interpreter.

What makes exact mode exact on a GPU: a position has the same bits whichever others run beside it.
"""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from river_compile.kernels.triton.decode_attention import DecodeAttentionSpec
from river_compile.kernels.triton.kv_fill import KvFillSpec
from tests.kernels import reference
from tests.kernels.cases import attention_cases, kv_cases
from tests.kernels.checks import KV, filling, mask_buffers
from tests.kernels.harness import assert_close, poisoned, run_guarded
from tests.support.examples import examples


@st.composite
def several_cases(draw):
    """A spec of attention with open positions, how many there are, and a seed."""
    spec, _, seed = draw(attention_cases(most_slots=80))
    shared = draw(st.sampled_from((0, 1)))
    spec = dataclasses.replace(spec, positions=None, mask=True, mask_rows=shared, advance=draw(st.booleans()))
    return spec, draw(st.integers(1, 9)), seed


def buffers_of(spec: DecodeAttentionSpec, positions: int, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The buffers of a pass of so many positions, and which slots each sees [B, T, S]; others' slots hold NaN."""
    g = torch.Generator().manual_seed(seed)
    dtype, b = getattr(torch, spec.dtype), spec.batch
    live = torch.rand(spec.mask_rows or b, positions, spec.slots, generator=g) < torch.rand(1, generator=g)
    live &= torch.rand(live.shape[:2], generator=g)[..., None] < 0.9  # (some position sees no slot)
    seen = live.expand(b, -1, -1)
    q = torch.randn(b * positions, spec.heads, spec.head_dim, generator=g).to(dtype)
    shape = (b, spec.kv_heads, spec.slots, spec.head_dim)
    k, v = (torch.randn(shape, generator=g).to(dtype) for _ in KV)
    caches = {n: c.masked_fill(~seen.any(1)[:, None, :, None], float("nan")) for n, c in zip(KV, (k, v), strict=True)}
    counter = {"slot": torch.tensor([7], dtype=getattr(torch, spec.index_dtype))} if spec.advance else {}
    buffers = {"q": q, **caches, **mask_buffers(spec, live, g), **counter, "out": poisoned(q.shape, dtype)}
    return buffers, live


@given(several_cases())
@examples(60)
def test_each_position_attends_to_its_own_slots(case):
    spec, positions, seed = case
    buffers, live = buffers_of(spec, positions, seed)
    result = run_guarded(spec, positions, **buffers)
    k, v = (buffers[name].nan_to_num() for name in KV)
    seen, mask = live.expand(spec.batch, -1, -1), buffers["mask"]
    added = torch.zeros(()) if mask.dtype == torch.bool else mask.masked_fill(~live, 0.0)
    expected = reference.attention_of_several(
        buffers["q"].unflatten(0, (spec.batch, positions)),
        k,
        v,
        mask=seen,
        added=added.expand(seen.shape),
        scale=spec.scale,
        softcap=spec.softcap,
    )
    assert_close(result["out"], expected.flatten(0, 1), v.double().abs().amax().clamp_min(1.0))
    if spec.advance:
        assert int(result["slot"]) == 7 + positions


@given(several_cases(), st.data())
@examples(40)
def test_a_position_has_the_same_bits_whichever_others_run_beside_it(case, data):
    spec, positions, seed = case
    buffers, _ = buffers_of(spec, positions, seed)
    whole = run_guarded(spec, positions, **buffers)["out"].unflatten(0, (spec.batch, positions))
    first = data.draw(st.integers(0, positions - 1))
    count = data.draw(st.integers(1, positions - first))
    some = slice(first, first + count)
    q, mask = (buffers[name] for name in ("q", "mask"))
    few = {**buffers, "q": q.unflatten(0, (spec.batch, positions))[:, some].flatten(0, 1), "mask": mask[:, some]}
    few["out"] = poisoned(few["q"].shape, q.dtype)
    # (What the others alone see is data that is there, and here it is what nobody may read.)
    seen = (few["mask"] if spec.mask_dtype == "bool" else few["mask"] > torch.finfo(q.dtype).min / 4).any(1)
    for name in KV:
        few[name] = few[name].masked_fill(~seen.expand(spec.batch, -1)[:, None, :, None], float("nan"))
    found = run_guarded(spec, count, **few)["out"].unflatten(0, (spec.batch, count))
    assert torch.equal(found.view(torch.uint8), whole[:, some].contiguous().view(torch.uint8))


@given(kv_cases(), st.integers(1, 5), st.booleans())
@examples(60)
def test_every_position_is_made_and_written_as_it_is_alone(case, positions, counts):
    """The first slot may be any, and those after the last slot of the cache write nothing."""
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
    with pytest.raises(ValueError, match="say how many"):
        DecodeAttentionSpec(**SHAPE, scale=1.0, positions=None).buffers()
