"""Operators on tensors without elements: empty outputs, or an error where there is no output to return."""

import pytest
import torch

from river_compile.kernels.native import load
from tests.kernels.native.running import DTYPES, called, dense, native

pytestmark = pytest.mark.usefixtures("restored", "_loaded")


@pytest.fixture
def _loaded():
    load.load()


def caches(batch=2, heads=2, slots=5, features=8) -> list[torch.Tensor]:
    return [torch.ones(batch, heads, slots, features) for _ in range(2)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("batch", "positions", "heads", "kv_heads", "features"),
    [(2, 0, 4, 2, 8), (0, 3, 4, 2, 8), (2, 3, 0, 2, 8), (2, 3, 0, 0, 8), (2, 3, 4, 2, 0), (2, 40, 0, 2, 8)],
)
def test_attention_of_nothing_is_empty(batch, positions, heads, kv_heads, features, causal):
    q = torch.ones(batch, positions, heads, features)
    held = caches(batch, kv_heads, features=features)
    assert native.attention(q, *held, None, 1.0, 0.0, causal).shape == q.shape
    if positions:
        assert native.decode_attention(q[:, 0], *held, None, 1.0, 0.0).shape == q[:, 0].shape


@pytest.mark.parametrize("positions", [1, 3, 40])
def test_attention_over_no_slots_is_zero(positions):
    q = torch.ones(2, positions, 4, 8)
    y = native.attention(q, *caches(slots=0), None, 1.0, 0.0, False)
    assert torch.equal(y, torch.zeros_like(q))


def test_heads_share_no_heads():
    with pytest.raises(RuntimeError, match="multiple of their heads"):
        native.decode_attention(torch.ones(2, 4, 8), *caches(heads=0), None, 1.0, 0.0)


@pytest.mark.parametrize(("batch", "positions"), [(0, 3), (2, 0)])
def test_no_positions_fill_no_slots(batch, positions):
    held = caches(batch)
    q = native.kv_fill(
        torch.ones(batch, positions, 8 * 8), None, None, None, None, torch.arange(positions), *held, "none", 0.0, False
    )
    assert q.shape == (batch, positions, 4, 8)
    assert all(torch.equal(*pair) for pair in zip(held, caches(batch), strict=True))


@pytest.mark.parametrize("sizes", [{"heads": 0}, {"features": 0}])
def test_a_cache_without_heads_or_features_takes_nothing(sizes):
    with pytest.raises(RuntimeError, match="must have heads with features"):
        native.kv_fill(torch.ones(2, 1, 64), None, None, None, None, torch.arange(1), *caches(**sizes), "none", 0.0, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 100])
def test_a_product_needs_features_to_read(dtype, rows):
    """As those of packed weights do."""
    with pytest.raises(RuntimeError, match="features to read"):
        dense(torch.ones(rows, 0, dtype=dtype), torch.ones(3, 0, dtype=dtype), torch.ones(3, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "out_features"), [(0, 3), (1, 0), (0, 0), (100, 0)])
def test_a_product_of_nothing_is_empty(dtype, rows, out_features):
    x, weight = torch.ones(rows, 5, dtype=dtype), torch.ones(out_features, 5, dtype=dtype)
    assert dense(x, weight).shape == (rows, out_features)


@pytest.mark.parametrize("norm", ["rms", "rms_plus_one", "layer"])
@pytest.mark.parametrize(("rows", "features"), [(0, 5), (3, 0), (0, 0)])
def test_a_norm_of_nothing_is_empty(norm, rows, features):
    y = called(native.norm, torch.ones(rows, features), norm, torch.ones(features), as_given=(0, 2))
    assert y.shape == (rows, features)


@pytest.mark.parametrize(("rows", "vocabulary"), [(0, 7), (3, 0)])
def test_no_logits_are_computed_again(rows, vocabulary):
    y = native.rescore(torch.ones(rows, vocabulary), torch.ones(rows, 4), torch.ones(vocabulary, 4), None)
    assert y.shape == (rows, vocabulary)


def test_what_has_no_value_is_an_error():
    """The score of no rows, an entropy of no logits, logits of no features."""
    for wrong in (
        lambda: native.exit_score(torch.ones(0, 4), torch.ones(0, 4)),
        lambda: native.exit_score(torch.ones(3, 0), torch.ones(3, 0)),
        lambda: native.largest_entropy(torch.ones(0, 1, 4)),
        lambda: native.largest_entropy(torch.ones(2, 0, 4)),
        lambda: native.rescore(torch.ones(2, 3), torch.ones(2, 0), torch.ones(3, 0), None, "rms", torch.ones(0)),
    ):
        with pytest.raises(RuntimeError, match=r"must not be empty|, not empty|features to read"):
            wrong()


def test_choices_rows_and_tables_of_nothing_are_empty():
    assert native.choices(torch.ones(0, 4), True).shape == (0, 2)
    assert native.embed(torch.ones(2, 0, dtype=torch.int64), torch.ones(3, 4)).shape == (2, 0, 4)
    like = torch.ones(1)
    assert native.turns(torch.ones(0, dtype=torch.int64), torch.ones(4), 1.0, True, like).shape == (0, 8)
    assert native.turns(torch.ones(3, dtype=torch.int64), torch.ones(0), 1.0, True, like).shape == (3, 0)
    native.copy(torch.ones(0), torch.ones(0))
