"""Kernels of stacked weights in Triton's interpreter against float64, and the sorting of rows."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from river_compile.kernels.triton.calls_linear import rows_by_expert
from river_compile.kernels.triton.linear import LinearSpec, LinearTile, form_of, untiled
from river_compile.kernels.triton.tiles import best_tile
from tests.kernels.checks import VALUES, check_experts
from tests.support.examples import examples


@st.composite
def choices(draw, most):
    """Draws the number of experts, and each row's choice: none, one twice, or none at all."""
    experts = draw(st.integers(1, 6))
    return experts, draw(st.lists(st.integers(-1, experts), min_size=1, max_size=most))


@st.composite
def expert_cases(draw, most, by_row):
    experts, expert = draw(choices(most))
    group = draw(st.sampled_from((32, 64, 128)))
    dtype = draw(st.sampled_from(("float32", "float16", "bfloat16")))
    form = form_of("w4", group, dtype, by_row)
    k, n = draw(st.integers(1, 300)), draw(st.integers(1, 40))
    depth = group * draw(st.sampled_from((1, 2, 4))) if by_row else draw(st.sampled_from((128, 256)))
    split = draw(st.integers(1, min(3, -(-k // depth))))
    block_m = {"row": 1, "groups": 8 if by_row else 16, "dot": 16}[form]
    tile = LinearTile(draw(st.sampled_from((16, 32))), depth, block_m, split)
    gated = draw(st.booleans())
    rows = len(expert) if by_row else None
    spec = LinearSpec(rows, k, n, tile, group_size=group, dtype=dtype, gated=gated, experts=experts)
    # The form "dot" rounds weights to float16, which holds the tiniest with few bits.
    values = [value for value in VALUES if (form, dtype, value) != ("dot", "float16", "tiny")]
    return spec, expert, draw(st.sampled_from(values)), draw(st.integers(0, 2**20))


@given(expert_cases(6, by_row=True))
@examples(12)
def test_one_row_after_another(case):
    check_experts(*case)


@given(expert_cases(30, by_row=False))
@examples(12)
def test_blocks_of_rows_of_one_expert(case):
    check_experts(*case)


@given(choices(70), st.sampled_from((16, 32)))
@examples(60)
def test_every_row_lies_in_a_block_of_its_expert(choice, block_m):
    """Each row once, with as many blocks as the launch has."""
    experts, expert = choice
    spec = LinearSpec(None, 64, 8, LinearTile(16, 128, block_m), experts=experts)
    found = rows_by_expert(torch.tensor(expert), experts, spec.blocks(len(expert)), block_m)
    row, owner = found["row"].reshape(-1, block_m).tolist(), found["expert"].tolist()
    placed = {r: e for block, e in zip(row, owner, strict=True) for r in block if r < len(expert)}
    assert sorted(r for block in row for r in block if r < len(expert)) == list(range(len(expert)))
    assert [placed[r] for r in range(len(expert))] == [e if 0 <= e < experts else experts for e in expert]


def test_a_token_moves_the_bytes_of_its_experts_alone():
    """Eight of 128 weights of 1,536 x 2,048, with rows and expert numbers."""
    spec = best_tile(untiled(8, 2048, 1536, experts=128), "sm_90")
    assert spec.tile.split_k == 1
    weights = 8 * (1536 * 2048 // 2 + 1536 * 2048 // 64 * 4)
    assert spec.cost().bytes == weights + 8 * (2048 + 1536) * 2 + 8 * 8
    few = dataclasses.replace(spec, experts=4)
    assert few.cost().bytes == spec.cost().bytes - weights // 2


@pytest.mark.parametrize("changes", [{"norm": "rms"}, {"bias": True}, {"residual": True}])
def test_what_a_stack_does_not_go_with(changes):
    with pytest.raises(ValueError, match="experts=4 goes with 4-bit weights, without norm, bias and residual"):
        LinearSpec(2, 64, 8, LinearTile(16, 64, 8), experts=4, **changes)
