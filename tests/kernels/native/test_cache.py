"""C++ operators on the KV cache against float64: the checks of generated kernels, and some more.

Several positions are in test_positions.py. Every call also runs from a tape (`running.called`).
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from river_compile.kernels.native import load
from river_compile.kernels.triton.cache import DecodeAttentionSpec, KvFillSpec
from tests.kernels import reference
from tests.kernels.cases import CHUNK, NATIVE_DIMS, attention_cases, inputs, kv_cases, masks, sinks_of
from tests.kernels.checks import check_attention, check_kv_fill
from tests.kernels.harness import assert_rounded
from tests.kernels.native.running import DTYPES, ISAS, Cache, called, native, same_bits
from tests.support.examples import examples

pytestmark = pytest.mark.usefixtures("restored")


class Runs:
    """Runs a spec by the C++ operators, on caches with gaps or with slots before heads."""

    def __init__(self, gap: int, slots_first: bool) -> None:
        self._layout = gap, slots_first

    def kv_fill(self, spec: KvFillSpec, device: str, *, k_cache, v_cache, **given) -> dict[str, torch.Tensor]:
        caches = {"k_cache": Cache(k_cache, *self._layout), "v_cache": Cache(v_cache, *self._layout)}
        tables = (given.get(name) for name in ("q_norm", "k_norm", "cos", "sin", "slot"))
        written = (cache.tensor for cache in caches.values())
        how = (spec.head_norm, spec.eps, spec.interleaved, spec.half_tables)
        q = called(native.kv_fill, given["qkv"].flatten(1), *tables, *written, *how, as_given=(6, 7))
        for name, cache in caches.items():
            cache.check(name)
        return {"q": q} | {name: cache.tensor for name, cache in caches.items()}

    def attention(
        self, spec: DecodeAttentionSpec, device: str, *, q, k_cache, v_cache, out, mask=None, sinks=None
    ) -> dict[str, torch.Tensor]:
        caches = [Cache(cache, *self._layout).tensor for cache in (k_cache, v_cache)]
        return {"out": called(native.decode_attention, q, *caches, mask, spec.scale, spec.softcap, sinks)}


LAYOUTS = st.builds(Runs, st.sampled_from((0, 3)), st.booleans())


@ISAS
@given(case=kv_cases(NATIVE_DIMS), runs=LAYOUTS, threads=st.integers(1, 3))
@examples(12)
def test_query_and_slot(isa, case, runs, threads):
    load.load(isa)
    torch.set_num_threads(threads)
    check_kv_fill(*case, run=runs.kv_fill)


@ISAS
@given(st.integers(1, 3), st.sampled_from((1, 2, 5)), st.sampled_from((4, 16)), st.booleans(), st.sampled_from(DTYPES))
@examples(8)
def test_tables_of_one_angle_for_each_pair_turn_as_whole_ones(isa, batch, positions, half, interleaved, dtype):
    load.load(isa)
    g = torch.Generator().manual_seed(batch * positions)
    qkv = torch.randn(batch, positions, 5 * 32, generator=g).to(dtype)
    tables = torch.randn(2, batch, positions, half, generator=g).unbind()
    wide = [reference.whole_table(table, interleaved) for table in tables]
    slots, how = torch.arange(positions), ("none", 0.0, interleaved)
    found, expected = (torch.zeros(2, batch, 1, 9, 32, dtype=dtype) for _ in range(2))
    q = called(native.kv_fill, qkv, None, None, *tables, slots, *found, *how, True, as_given=(6, 7))
    assert torch.equal(q, native.kv_fill(qkv, None, None, *wide, slots, *expected, *how))
    assert torch.equal(found, expected)


@ISAS
@pytest.mark.parametrize("slot", [-1, 4, 1000])
def test_a_slot_outside_of_the_cache_writes_nothing(isa, slot):
    load.load(isa)
    check_kv_fill(KvFillSpec(2, 3, 1, 64, 4, rotary_dim=64), slot, run=Runs(3, True).kv_fill)


@ISAS
@given(case=attention_cases(most_slots=3 * CHUNK, dims=NATIVE_DIMS), runs=LAYOUTS, threads=st.integers(1, 3))
@examples(12)
def test_one_query_position(isa, case, runs, threads):
    """One chunk and several, groups of 1 to 17 heads; masked slots hold NaN."""
    load.load(isa)
    torch.set_num_threads(threads)
    check_attention(*case, run=runs.attention)


@ISAS
@given(
    st.data(), st.sampled_from(("bool", -math.inf, "least", "half")), st.sampled_from(DTYPES), st.sampled_from(DTYPES)
)
@examples(20)
def test_any_slots_may_be_left_out(isa, data, least, dtype, mask_dtype):
    """Masked by False, -inf, the least number or half of it; a fully masked row gives 0."""
    load.load(isa)
    batch, slots = data.draw(st.integers(1, 3)), data.draw(st.sampled_from((1, 7, CHUNK, CHUNK + 1, 700)))
    live, seed = data.draw(masks(batch, slots)), data.draw(st.integers(0, 2**20))
    q, k, v = inputs(batch, 4, 2, slots, 16, dtype, seed)
    unread = ~live[:, None, :, None]
    spoiled = (cache.masked_fill(unread, math.nan) for cache in (k, v))
    mask, added = live, None
    if least != "bool":
        lowest = {"least": torch.finfo(mask_dtype).min, "half": torch.finfo(mask_dtype).min / 2}.get(least, least)
        noise = torch.randn(batch, slots, generator=torch.Generator().manual_seed(seed))
        added = (noise * data.draw(st.integers(0, 1))).to(mask_dtype)
        mask = added.masked_fill(~live, lowest)
    out = called(native.decode_attention, q, *spoiled, mask, 0.25, 0.0)
    expected = reference.attention(q, k, v, scale=0.25, mask=live, added=added)
    assert_rounded(out, expected, v.double().abs().amax((1, 2, 3))[:, None, None].expand(expected.shape))
    assert not out[~live.any(1)].any()


@ISAS
@given(
    data=st.data(),
    batch=st.integers(1, 3),
    heads=st.sampled_from(((1, 1), (6, 2), (13, 1), (8, 4))),
    slots=st.sampled_from((1, 7, CHUNK, CHUNK + 1, 700)),
    dim=st.sampled_from(NATIVE_DIMS),
    dtype=st.sampled_from(DTYPES),
    sinks_dtype=st.sampled_from(DTYPES),
    threads=st.integers(1, 3),
)
@examples(15)
def test_a_sink_is_the_score_of_one_more_key_whose_value_is_zero(
    isa, data, batch, heads, slots, dim, dtype, sinks_dtype, threads
):
    """With a mask and without; a row without a slot gives 0, and unread slots hold NaN."""
    load.load(isa)
    torch.set_num_threads(threads)
    seed, softcap = data.draw(st.integers(0, 2**20)), data.draw(st.sampled_from((0.0, 3.0)))
    q, k, v = inputs(batch, *heads, slots, dim, dtype, seed)
    sinks = sinks_of(heads[0], seed, sinks_dtype)
    mask = data.draw(masks(batch, slots)) if data.draw(st.booleans()) else None
    live = torch.ones(batch, slots, dtype=torch.bool) if mask is None else mask
    spoiled = [cache.masked_fill(~live[:, None, :, None], math.nan) for cache in (k, v)]
    out = called(native.decode_attention, q, *spoiled, mask, dim**-0.5, softcap, sinks)
    expected = reference.attention(q, k, v, scale=dim**-0.5, softcap=softcap, mask=live, sinks=sinks)
    assert_rounded(out, expected, v.double().abs().amax((1, 2, 3))[:, None, None].expand(expected.shape))
    assert not out[~live.any(1)].any()


@ISAS
def test_sinks_at_the_limits(isa):
    """Minus infinity is no sink, to the bit; one far above all scores leaves nothing; NaN spoils its own head."""
    load.load(isa)
    for slots in (40, 2 * CHUNK):
        q, k, v = inputs(2, 4, 2, slots, 16, torch.float32)
        without = native.decode_attention(q, k, v, None, 0.25, 0.0)
        sinks = torch.tensor([-math.inf, 1e30, math.nan, -1e30])
        out = called(native.decode_attention, q, k, v, None, 0.25, 0.0, sinks)
        assert torch.equal(out[:, ::3], without[:, ::3])
        assert out[:, 1].abs().max() < 1e-30
        assert out[:, 2].isnan().all()


@ISAS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sinks", [None, torch.tensor([-3.0, 0.1, 0.7, 2.0, 5.0, 30.0])], ids=["", "sinks"])
def test_chunks_without_a_slot_change_nothing(isa, dtype, sinks):
    """A long cache with one unmasked chunk has the bits of that chunk's cache."""
    load.load(isa)
    q, k, v = inputs(2, 6, 2, 3 * CHUNK + 5, 24, dtype)
    for chunk in range(3):
        part = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
        live = torch.zeros(2, k.shape[2], dtype=torch.bool)
        live[0, part], live[1, part.start + 3 : part.stop - 9] = True, True
        long = called(native.decode_attention, q, k, v, live, 0.3, 0.0, sinks)
        short = called(native.decode_attention, q, k[:, :, part], v[:, :, part], live[:, part].clone(), 0.3, 0.0, sinks)
        assert torch.equal(long, short)


@ISAS
@pytest.mark.parametrize("padding", [1, 100, CHUNK + 3])
def test_padding_before_a_row_changes_no_bit(isa, padding):
    """As when a row of a batch moves to the right: its chunks move along."""
    load.load(isa)
    held, slots = CHUNK + 40, 3 * CHUNK
    q, k, v = inputs(1, 6, 2, slots, 24, torch.float32)
    live = torch.arange(slots)[None] < held
    moved = [cache.roll(padding, 2) for cache in (k, v)]
    first = native.decode_attention(q, k, v, live, 0.3, 0.0)
    assert torch.equal(native.decode_attention(q, *moved, live.roll(padding, 1), 0.3, 0.0), first)


@ISAS
@given(st.integers(1, 4), st.sampled_from((40, 2 * CHUNK + 30)), st.sampled_from(DTYPES), st.integers(0, 2**20))
@examples(4)
def test_a_sequences_bits_depend_on_neither_batch_nor_threads(isa, batch, slots, dtype, seed):
    load.load(isa)
    q, k, v = inputs(batch, 12, 3, slots, 64, dtype, seed)
    torch.set_num_threads(1)
    rows = [slice(i, i + 1) for i in range(batch)]
    sinks = sinks_of(12, seed, torch.float32)
    alone = torch.cat([called(native.decode_attention, q[i], k[i], v[i], None, 0.125, 5.0, sinks) for i in rows])
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        assert torch.equal(called(native.decode_attention, q, k, v, None, 0.125, 5.0, sinks), alone)


@ISAS
@pytest.mark.parametrize("slots", [40, 2 * CHUNK])
def test_nan_reaches_what_reads_it_and_nothing_else(isa, slots):
    load.load(isa)
    q, k, v = inputs(3, 4, 2, slots, 16, torch.float32)
    clean = called(native.decode_attention, q, k, v, None, 0.25, 0.0)
    q[0, 1, 3] = k[1, 1, slots - 1, 2] = v[2, 0, 5, 7] = math.nan
    out = called(native.decode_attention, q, k, v, None, 0.25, 0.0)
    spoiled = torch.zeros(out.shape, dtype=torch.bool)
    spoiled[0, 1] = spoiled[1, 2:] = spoiled[2, :2, 7] = True
    assert torch.equal(out.isnan(), spoiled)
    assert torch.equal(out[~spoiled], clean[~spoiled])
    mask = torch.zeros(3, slots)
    mask[1, 0] = math.nan
    masked = called(native.decode_attention, *inputs(3, 4, 2, slots, 16, torch.float32), mask, 0.25, 0.0)
    assert masked[1].isnan().all()
    assert torch.equal(masked[::2], clean[::2])


def test_a_mask_of_one_row_and_a_mask_that_is_part_of_a_larger_one():
    load.load()
    q, k, v = inputs(3, 4, 2, 40, 16, torch.float32)
    wide = torch.rand(3, 50, generator=torch.Generator().manual_seed(0)) < 0.5
    for mask in (wide[:1, :40].expand(3, 40), wide[:, 7:47]):
        out = called(native.decode_attention, q, k, v, mask, 0.25, 0.0)
        assert torch.equal(out, called(native.decode_attention, q, k, v, mask.clone(), 0.25, 0.0))


@ISAS
@given(st.integers(1, 3), st.integers(2, 5), st.booleans(), st.booleans(), st.sampled_from(DTYPES))
@examples(12)
def test_several_positions_are_written_as_each_is_alone(isa, batch, positions, of_each, normed, dtype):
    load.load(isa)
    g = torch.Generator().manual_seed(batch * positions)
    qkv = torch.randn(batch, positions, 5 * 16, generator=g).to(dtype)
    cos, sin = torch.randn(2, batch if of_each else 1, positions, 16, generator=g)
    slots = torch.randperm(9, generator=g)[:positions]
    slots[0] = 77  # (outside: written nowhere)
    weights = (torch.randn(2, 16, generator=g).to(dtype)).unbind() if normed else (None, None)
    how = ("rms" if normed else "none", 1e-6, False)
    at_once = [torch.full((batch, 1, 9, 16), math.nan, dtype=dtype) for _ in range(2)]
    in_turn = [torch.full((batch, 1, 9, 16), math.nan, dtype=dtype) for _ in range(2)]
    q = native.kv_fill(qkv, *weights, cos, sin, slots, *at_once, *how)
    for i in range(positions):
        tables = (cos[:, i : i + 1].contiguous(), sin[:, i : i + 1].contiguous())
        given = qkv[:, i : i + 1].contiguous()
        alone = native.kv_fill(given, *weights, *tables, slots[i : i + 1], *in_turn, *how)
        assert torch.equal(q[:, i], alone)
    assert all(map(same_bits, at_once, in_turn))
    assert at_once[0].isnan().sum() == batch * 16 * (9 - positions + 1)


@ISAS
def test_counters_and_copies(isa):
    load.load(isa)
    a, b = torch.tensor([2**40]), torch.tensor([[3]])
    total = native.add(a, b)
    assert (total.shape, total.item()) == ((1, 1), 2**40 + 3)
    total = native.add(torch.tensor(4), torch.tensor(5))
    assert (total.shape, total.item()) == ((), 9)
    for pair in ((torch.arange(4), torch.tensor(7)), (torch.tensor([7]), torch.arange(4))):
        assert torch.equal(native.add(*pair), torch.arange(7, 11))
    assert native.advance(a, -7) is None
    assert a.item() == 2**40 - 7
    for source in (torch.arange(11), torch.randn(3, 5).half(), torch.tensor([[True, False]]), torch.empty(0)):
        to = torch.zeros_like(source)
        native.copy(source, to)
        assert same_bits(source, to)


def sample_calls() -> dict[str, tuple]:
    q, k, v = inputs(2, 2, 1, 6, 16, torch.bfloat16)
    qkv, slot, tables = (
        torch.randn(2, 1, 64).bfloat16(),
        torch.tensor([3]),
        (torch.randn(1, 1, 16), torch.randn(1, 1, 16)),
    )
    return {
        "kv_fill": (qkv, None, None, *tables, slot, k, v, "none", 0.0, False, False),
        "decode_attention": (q, k, v, torch.ones(2, 6, dtype=torch.bool), 0.25, 0.0, torch.ones(2)),
        "attention": (torch.randn(2, 3, 2, 16).bfloat16(), k, v, torch.ones(1, 1, 3, 6), 0.25, 0.0, False, q[0, 0, :2]),
        "add": (slot, slot.clone()[None]),
        "advance": (slot, 1),
        "copy": (q, torch.empty_like(q)),
    }


@pytest.mark.parametrize("name", ["kv_fill", "decode_attention", "attention", "add", "advance", "copy"])
def test_fake_operators_give_the_real_ones_shapes_and_dtypes(name):
    load.load()
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(native, name).default, sample_calls()[name], test_utils=checks)


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("kv_fill", 0, torch.ones(2, 2, 64).bfloat16(), "qkv must be a position"),
        ("kv_fill", 0, torch.ones(2, 1, 32).bfloat16(), "qkv must be a position"),
        ("kv_fill", 0, torch.ones(2, 1, 64), "in their dtype"),
        ("kv_fill", 1, torch.ones(16).bfloat16(), "q_norm and k_norm must"),
        ("kv_fill", 8, "rms", "q_norm and k_norm must"),
        ("kv_fill", 8, "layer", "q_norm and k_norm must"),
        ("kv_fill", 8, "batch", "norm='batch' is not known"),
        ("kv_fill", 4, None, "cos and sin must go together"),
        ("kv_fill", 4, torch.ones(1, 1, 14), "cos and sin must have one shape"),
        ("kv_fill", 3, torch.ones(3, 1, 16), "cos and sin must have one shape"),
        ("kv_fill", 11, True, "cos and sin must have one shape"),
        ("kv_fill", 5, torch.tensor([1, 2]), "qkv must be a position"),
        ("kv_fill", 5, torch.tensor([1.0]), "slot must be int64 or int32"),
        ("kv_fill", 7, torch.ones(2, 1, 5, 16).bfloat16(), "one shape, stride and dtype"),
        ("kv_fill", 7, torch.ones(2, 1, 16, 6).bfloat16().mT, "one shape, stride and dtype"),
        ("decode_attention", 0, torch.ones(1, 2, 16).bfloat16(), "q must have"),
        ("decode_attention", 0, torch.ones(2, 2, 16), "q must have"),
        ("decode_attention", 0, torch.ones(2, 1, 2, 16).bfloat16(), "q must be"),
        ("decode_attention", 1, torch.ones(2, 1, 6, 16), "one shape, stride and dtype"),
        ("decode_attention", 3, torch.ones(2, 5, dtype=torch.bool), "mask must have"),
        ("decode_attention", 3, torch.ones(2, 6, dtype=torch.int64), "mask must be"),
        ("decode_attention", 6, torch.ones(3), "sinks must have a number for each query head"),
        ("decode_attention", 6, torch.ones(2, dtype=torch.int64), "sinks must be float32"),
        ("attention", 7, torch.ones(4)[::2], "sinks must have a number for each query head"),
        ("attention", 0, torch.ones(2, 2, 16).bfloat16(), "q must be"),
        ("attention", 3, torch.ones(3, 1, 3, 6), "mask must be"),
        ("attention", 3, torch.ones(1, 1, 2, 6), "mask must be"),
        ("attention", 6, True, "mask must not be given"),
        ("add", 0, torch.ones(2, 2, dtype=torch.int64), "a and b must be one number"),
        ("add", 1, torch.tensor([1.0]), "b must be int64"),
        ("advance", 0, torch.tensor([1], dtype=torch.int32), "counter must be int64"),
        ("advance", 0, torch.tensor([1, 2]), "counter must be one number"),
        ("copy", 1, torch.ones(2, 2, 16), "of one dtype and size"),
        ("copy", 1, torch.ones(2, 2, 15).bfloat16(), "of one dtype and size"),
    ],
)
def test_what_is_refused(name, place, value, message):
    load.load()
    arguments = list(sample_calls()[name])
    arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        getattr(native, name)(*arguments)
