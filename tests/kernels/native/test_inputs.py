"""Inputs of a step: rows of the embedding against torch's, rotary tables against float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from river_compile.kernels.native import load
from river_compile.kernels.native.load import Tape
from tests.kernels.native.running import DTYPES, called, native
from tests.support.examples import examples

pytestmark = pytest.mark.usefixtures("_loaded")

#: Errors of float32: half a unit of the last place of a cosine, and as much of its product with the scale, and room for
#: a library that is not correctly rounded.
CLOSE = {torch.float32: 4e-7, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture(scope="module")
def _loaded():
    load.load()


@examples(30)
@given(
    rows=st.integers(1, 70),
    features=st.integers(1, 90),
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 999),
)
def test_rows_of_the_embedding_are_those_of_torch(rows, features, sizes, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    table = torch.randn(rows, features, generator=g).to(dtype)
    ids = torch.randint(rows, sizes, generator=g)
    assert torch.equal(called(native.embed, ids, table), torch.nn.functional.embedding(ids, table))


@pytest.mark.parametrize("wrong", [-1, 5, 2**40])
def test_an_id_without_a_row_is_an_error_of_its_own_step(wrong):
    """Of the call, and of the replay; the next one is right."""
    table, ids = torch.randn(5, 3), torch.tensor([[1, 4]])
    with pytest.raises(RuntimeError, match="a token's id is no row of the embedding"):
        native.embed(torch.tensor([[0, wrong]]), table)
    tape = Tape()
    with tape.recording():
        out = native.embed(ids, table)
    ids[0, 1] = wrong
    with pytest.raises(RuntimeError, match="a token's id is no row of the embedding"):
        tape.replay()
    ids[0, 1] = 2
    tape.replay()
    assert torch.equal(out[0], table[[1, 2]])


@examples(40)
@given(
    half=st.integers(1, 64),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    farthest=st.sampled_from([1, 300, 131072]),
    scale=st.sampled_from([1.0, 0.7, 1.3]),
    sine=st.booleans(),
    once=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    given=st.sampled_from(DTYPES),
    seed=st.integers(0, 999),
)
def test_tables_are_cosines_and_sines_of_angles_in_float32(
    half, sizes, farthest, scale, sine, once, dtype, given, seed
):
    """The second half repeats the first, if it is there; angles are computed in float32, as in models."""
    g = torch.Generator().manual_seed(seed)
    positions = torch.randint(farthest, sizes, generator=g)
    frequencies = (10000.0 ** -torch.rand(half, generator=g)).to(given)
    found = called(native.turns, positions, frequencies, scale, sine, torch.zeros(1, dtype=dtype), once)
    assert found.dtype == dtype
    angles = (positions[..., None].float() * frequencies.float()).double()
    expected = (angles.sin() if sine else angles.cos()) * scale
    expected = expected if once else torch.cat((expected, expected), -1)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2 * CLOSE[dtype])


def test_positions_that_lie_apart_are_taken_but_not_recorded():
    positions, frequencies, like = torch.arange(12).reshape(6, 2)[:, 0], torch.ones(2), torch.zeros(1)
    found = native.turns(positions, frequencies, 1.0, False, like)
    assert torch.equal(found, native.turns(positions.contiguous(), frequencies, 1.0, False, like))
    with Tape().recording(), pytest.raises(RuntimeError, match="contiguous to be recorded"):
        native.turns(positions, frequencies, 1.0, False, like)
