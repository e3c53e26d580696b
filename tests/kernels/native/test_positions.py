"""C++ attention of several positions on a static cache: few as each alone, many against float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from river_compile.kernels.native import load
from tests.kernels import reference
from tests.kernels.cases import CHUNK, NATIVE_DIMS, inputs, masks, sinks_of
from tests.kernels.harness import assert_close
from tests.kernels.native.running import DTYPES, ISAS, Cache, called, native
from tests.support.examples import examples

pytestmark = pytest.mark.usefixtures("restored")


@ISAS
@pytest.mark.parametrize("causal", [False, True])
@given(
    data=st.data(),
    batch=st.integers(1, 3),
    positions=st.integers(2, 16),
    slots=st.sampled_from((24, CHUNK + 40)),
    dtype=st.sampled_from(DTYPES),
)
@examples(6)
def test_few_positions_attend_as_each_does_alone(isa, causal, data, batch, positions, slots, dtype):
    load.load(isa)
    seed, softcap = data.draw(st.integers(0, 2**20)), data.draw(st.sampled_from((0.0, 3.0)))
    q = torch.randn(batch, positions, 6, 24, generator=torch.Generator().manual_seed(seed)).to(dtype)
    _, k, v = inputs(batch, 6, 2, slots, 24, dtype, seed)
    of_each = data.draw(st.booleans())
    mask = torch.stack([data.draw(masks(batch if of_each else 1, slots)) for _ in range(positions)], 1)[:, None]
    if causal:
        mask = torch.ones(1, 1, positions, slots, dtype=torch.bool).tril()
    sinks = sinks_of(6, seed, dtype) if data.draw(st.booleans()) else None
    out = native.attention(q, k, v, None if causal else mask, 0.25, softcap, causal, sinks)
    for i in range(positions):
        row = mask[:, 0, i].expand(batch, slots).contiguous()
        alone = native.decode_attention(q[:, i].contiguous(), k, v, row, 0.25, softcap, sinks)
        assert torch.equal(out[:, i], alone)


@st.composite
def masks_of_many(draw, batch: int, positions: int, slots: int) -> torch.Tensor:
    """Draws ``[batch, T, S]``: any slots, or a prompt's: filled, causal, perhaps a window or padding."""
    if draw(st.booleans()):
        return torch.stack([draw(masks(batch, slots)) for _ in range(positions)], 1)
    held = draw(st.integers(0, slots))  # before the first position
    last, slot = torch.arange(positions)[:, None] + held, torch.arange(slots)
    live = (slot <= last) & (slot > last - draw(st.sampled_from((1, 20, slots))))
    return live & (slot >= draw(st.integers(0, slots)) * torch.arange(batch)[:, None, None])


@ISAS
@given(
    data=st.data(),
    batch=st.integers(1, 2),
    heads=st.sampled_from(((1, 1), (4, 2), (6, 2), (9, 1), (3, 3), (34, 2))),
    positions=st.sampled_from((17, 32, 49, 70)),
    slots=st.sampled_from((1, 7, 64, 65, 200)),
    dim=st.sampled_from(NATIVE_DIMS),
    kind=st.sampled_from(("none", "causal", "bool", "-inf", "least", "noise")),
    layout=st.tuples(st.sampled_from((0, 3)), st.booleans()),
    threads=st.integers(1, 3),
)
@examples(25)
def test_many_positions(isa, data, batch, heads, positions, slots, dim, kind, layout, threads):
    """Partial blocks, groups of 1 to 17 heads, every kind of mask, perhaps sinks; unread slots hold NaN."""
    load.load(isa)
    torch.set_num_threads(threads)
    dtype, softcap = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from((0.0, 0.0, 3.0)))
    seed, of = data.draw(st.integers(0, 2**20)), batch if data.draw(st.booleans()) else 1
    q = torch.randn(batch, positions, heads[0], dim, generator=torch.Generator().manual_seed(seed)).to(dtype)
    _, k, v = inputs(batch, *heads, slots, dim, dtype, seed)
    live = torch.ones(of, positions, slots, dtype=torch.bool)
    live = {"none": live, "causal": live.tril()}.get(kind)
    live = data.draw(masks_of_many(of, positions, slots)) if live is None else live
    mask, added = {"none": None, "causal": None}.get(kind, live), torch.zeros(live.shape)
    if kind in ("-inf", "least", "noise"):
        mask_dtype = data.draw(st.sampled_from(DTYPES))
        added = torch.randn(live.shape, generator=torch.Generator().manual_seed(seed)) * (kind == "noise")
        least = -math.inf if kind == "-inf" else torch.finfo(mask_dtype).min
        mask, added = added.to(mask_dtype).masked_fill(~live, least), added.to(mask_dtype)
    live, added = (x.expand(batch, positions, slots) for x in (live, added))
    unread = ~live.any(1)[:, None, :, None]
    spoiled = (Cache(cache.masked_fill(unread, math.nan), *layout).tensor for cache in (k, v))
    scale = dim**-0.5
    rows = None if mask is None else mask[:, None]
    sinks = sinks_of(heads[0], seed, data.draw(st.sampled_from(DTYPES))) if data.draw(st.booleans()) else None
    out = called(native.attention, q, *spoiled, rows, scale, softcap, kind == "causal", sinks)
    how = {"scale": scale, "softcap": softcap, "sinks": sinks}
    expected = reference.cache_attention(q, k, v, mask=live, added=added, **how)
    assert_close(out, expected, v.double().abs().amax().expand(expected.shape))
    assert not out[~live.any(-1)].any()


@ISAS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("capacity", [80, 300])
def test_the_bits_of_a_prompt_depend_on_neither_capacity_nor_batch_nor_threads(isa, dtype, capacity):
    """Nor on padding: the second sequence starts at slot 37."""
    load.load(isa)
    q, k, v = (torch.randn(1, 70, n, 24, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (6, 2, 3))
    k, v = (cache[:, :, :2].transpose(1, 2).contiguous() for cache in (k, v))
    sinks = sinks_of(6, 0, dtype)
    torch.set_num_threads(1)
    alone = native.attention(q, k, v, None, 0.3, 0.0, True, sinks)
    caches = [torch.full((2, 2, capacity + 37, 24), math.nan, dtype=dtype) for _ in range(2)]
    mask = torch.zeros(2, 1, 70, capacity + 37, dtype=torch.bool)
    for row, first in enumerate((0, 37)):
        mask[row, 0, :, first : first + 70] = torch.ones(70, 70, dtype=torch.bool).tril()
        for cache, entries in zip(caches, (k, v), strict=True):
            cache[row, :, first : first + 70] = entries[0]
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        out = native.attention(q.expand(2, -1, -1, -1), *caches, mask, 0.3, 0.0, False, sinks)
        assert torch.equal(out, alone.expand(2, -1, -1, -1))


@ISAS
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_reaches_the_positions_that_read_it(isa, dtype):
    load.load(isa)
    q, k, v = (torch.randn(1, 96, 2, 16, generator=torch.Generator().manual_seed(n)).to(dtype) for n in range(3))
    k, v = (cache.transpose(1, 2).contiguous() for cache in (k, v))
    clean = native.attention(q, k, v, None, 0.25, 0.0, True)
    q[0, 3, 1, 5] = k[0, 0, 50, 2] = math.nan
    out = native.attention(q, k, v, None, 0.25, 0.0, True)
    spoiled = torch.zeros(out.shape, dtype=torch.bool)
    spoiled[0, 3, 1] = spoiled[0, 50:, 0] = True
    assert torch.equal(out.isnan(), spoiled)
    assert torch.equal(out[~spoiled], clean[~spoiled])


@ISAS
@pytest.mark.parametrize("dtype", DTYPES)
def test_sinks_of_a_prompt_at_the_limits(isa, dtype):
    """As of one position; a position without a slot gives 0."""
    load.load(isa)
    q, k, v = (torch.randn(1, 40, n, 24, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (4, 2, 3))
    k, v = (cache[:, :, :2].transpose(1, 2).contiguous() for cache in (k, v))
    mask = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril(-1)
    without = native.attention(q, k, v, mask, 0.3, 0.0, False)
    sinks = torch.tensor([-math.inf, 1e30, math.nan, -1e30])
    out = called(native.attention, q, k, v, mask, 0.3, 0.0, False, sinks)
    assert torch.equal(out[:, :, ::3], without[:, :, ::3])
    assert out[:, :, 1].float().abs().max() < 1e-30
    assert out[:, 1:, 2].isnan().all()
    assert not out[:, 0, ::3].any()
