"""What logits choose, in C++ on every instruction set: the entropy against float64, the best token as torch has it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from river_compile.kernels.native import load
from river_compile.kernels.ops import MASKED_LOGIT
from tests.kernels.native.running import DTYPES, ISAS, called, native

pytestmark = pytest.mark.usefixtures("restored")


@ISAS
@given(
    st.integers(0, 2**31),
    st.integers(1, 3),
    st.integers(1, 2),
    st.sampled_from([1, 50, 2048, 20_001]),
    st.sampled_from(DTYPES),
    st.sampled_from([0.01, 1.0, 30.0]),
    st.integers(0, 40),
    st.sampled_from([-torch.inf, MASKED_LOGIT]),
    st.integers(1, 4),
)
def test_is_that_of_the_least_sure_row(isa, seed, rows, positions, vocabulary, dtype, scale, impossible, low, threads):
    """At the last position, with masked logits in the first chunk and in others."""
    load.load(isa)
    torch.set_num_threads(threads)
    g = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(rows, positions, vocabulary, generator=g)).to(dtype)
    impossible = min(impossible, vocabulary - 1) if seed % 2 else (vocabulary - 1) * impossible // 40
    logits[:, :, :impossible] = low
    expected = torch.special.entr(logits[:, -1].double().softmax(-1)).sum(-1).amax()
    assert called(native.largest_entropy, logits).item() == pytest.approx(expected.item(), abs=2e-5)


def test_other_shapes_are_refused():
    load.load()
    with pytest.raises(RuntimeError, match=r"be \[B, T, V\]"):
        native.largest_entropy(torch.zeros(3, 4))


@ISAS
@given(
    st.integers(0, 2**31),
    st.integers(1, 3),
    st.sampled_from([1, 17, 2048, 2049, 9000]),
    st.sampled_from(DTYPES),
    st.sampled_from([1, 4, 1000]),
    st.lists(st.integers(0, 8999), max_size=3),
    st.integers(1, 3),
)
def test_the_first_of_the_best_tokens_is_chosen(isa, seed, rows, vocabulary, dtype, values, bad, threads):
    """Few values, so that many are the best; some NaN, which torch takes for the best; rows apart in memory."""
    load.load(isa)
    torch.set_num_threads(threads)
    g = torch.Generator().manual_seed(seed)
    logits = torch.randint(values, (rows, 2, vocabulary), generator=g).to(dtype)[:, seed % 2]
    logits[-1, [place % vocabulary for place in bad]] = torch.nan
    found = called(native.choices, logits, True)
    assert found[:, 0].tolist() == load.best_tokens(logits).tolist() == logits.argmax(-1).tolist()
    expected = [native.largest_entropy(row[None, None]).item() for row in logits]
    assert found[:, 1].tolist() == pytest.approx(expected, rel=0, abs=0, nan_ok=True)


def test_choices_are_the_same_in_torch():
    logits = torch.randn(2, 700, generator=torch.Generator().manual_seed(0)).double()  # (a dtype that C++ lacks)
    load.load()
    found = load.choices(logits)
    assert torch.equal(found[:, 0], logits.argmax(-1).double())
    assert torch.equal(load.best_tokens(logits), logits.argmax(-1))
    assert found[:, 1].tolist() == pytest.approx(load.choices(logits.float())[:, 1].tolist(), abs=1e-5)


def test_other_logits_are_refused():
    load.load()
    with pytest.raises(RuntimeError, match=r"be \[N, V\]"):
        native.choices(torch.zeros(4), True)
