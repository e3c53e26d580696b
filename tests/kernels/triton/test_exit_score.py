"""The fused exit score against float64, and inputs without an exit."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from river_compile.kernels.triton import operators  # noqa: F401  (registers kernels)
from river_compile.kernels.triton.cache import ExitScoreSpec
from tests.kernels.checks import check_exit_score
from tests.support.examples import examples


@given(
    st.integers(1, 9),
    st.sampled_from((1, 7, 64, 577, 4099)),
    st.sampled_from(("float32", "float16", "bfloat16")),
    st.sampled_from((0.0, 0.5, 1.0)),
    st.integers(0, 2**20),
)
@examples(50)
def test_fused_score(rows, features, dtype, nearness, seed):
    check_exit_score(ExitScoreSpec(rows, features, dtype), nearness, seed)


@pytest.mark.parametrize("row", [0, 2])
@pytest.mark.parametrize("spoiled", ["nan", "infinite", "zero"])
def test_a_row_without_a_similarity_never_exits(row, spoiled):
    hidden = torch.ones(3, 1, 8)
    hidden[row] = {"nan": math.nan, "infinite": math.inf, "zero": 0.0}[spoiled]
    previous, threshold = torch.ones(3, 1, 8), torch.tensor(-2.0)
    score = torch.ops.river.exit_score(hidden, previous)
    assert math.isnan(score.item())
    assert not score > threshold
    _, fused = torch.ops.river.residual_score(hidden, torch.zeros(3, 1, 8), previous)
    assert math.isnan(fused.item())


def test_plain_and_fused_scores_agree():
    torch.manual_seed(0)
    update, residual, previous = (torch.randn(2, 3, 40, dtype=torch.bfloat16) for _ in range(3))
    hidden, score = torch.ops.river.residual_score(update, residual, previous)
    plain = torch.ops.river.exit_score(hidden, previous)
    assert (score.shape, plain.shape, score.dtype, plain.dtype) == ((), (), torch.float32, torch.float32)
    torch.testing.assert_close(score, plain, atol=1e-6, rtol=0)


def test_a_spec_without_rows_is_refused():
    with pytest.raises(ValueError, match="rows=0"):
        ExitScoreSpec(0, 8)
