"""Breaks generated kernels and shows that the checks notice."""

import dataclasses
import re

import pytest

from river_compile.kernels.triton import loader
from river_compile.kernels.triton.cache import DecodeAttentionSpec, ExitScoreSpec, KvFillSpec
from river_compile.kernels.triton.linear import LinearSpec, LinearTile
from tests.kernels.checks import (
    check_attend,
    check_attention,
    check_bits_of_positions,
    check_bits_of_rows,
    check_experts,
    check_kv_fill,
    check_linear,
    check_nan_never_exits,
)
from tests.support.examples import slow_but

ROW = LinearSpec(1, 300, 21, LinearTile(8, 128), dtype="float32")
ROWS = LinearSpec(3, 300, 21, LinearTile(16, 128, 16), dtype="float32")
GROUPS = LinearSpec(1, 300, 21, LinearTile(16, 128, 8), dtype="float16")
GROUPS_ROWS = LinearSpec(3, 300, 21, LinearTile(16, 128, 8), dtype="float16", norm="rms")
TWELVE = LinearSpec(1, 300, 21, LinearTile(8, 128), weights="bf12", group_size=0)
PATCHED = dataclasses.replace(TWELVE, in_features=5, out_features=70)
PATCHED_ROWS = dataclasses.replace(PATCHED, rows=None, tile=LinearTile(64, 128, 16))
STACK = dataclasses.replace(ROW, rows=3, experts=4)
STACKS = dataclasses.replace(ROWS, rows=None, experts=4)
DENSE = LinearSpec(None, 300, 21, LinearTile(16, 64, 16, split_k=2), weights="dense", group_size=0, dtype="float32")
FILL = KvFillSpec(2, 2, 1, 48, 6, dtype="float32", rotary_dim=48, rotary_dtype="float32")
ATTENTION = DecodeAttentionSpec(2, 4, 2, 64, 70, 0.125, dtype="float32", mask=True, splits=2, block=16)
ATTEND = DecodeAttentionSpec(
    2, 2, 1, 48, 70, 0.125, dtype="float32", mask=True, splits=2, block=16, advance=True,
    fill=KvFillSpec(2, 2, 1, 48, 70, dtype="float32", rotary_dim=48, rotary_dtype="float32", head_norm="rms"),
)  # fmt: skip
POSITIONS = dataclasses.replace(ATTENTION, positions=None)

# Mutation -> (check of the family, pattern in the source, replacement).
MUTATIONS = {
    "group off by one": (lambda: check_linear(ROW), r"(scale_zero_ptr .*?) g\b", r"\1 g + 1"),
    "group off by one, rows": (lambda: check_linear(ROWS, 3), r"(scale_zero_ptr .*?) g\b", r"\1 g + 1"),
    "group off by one, groups": (lambda: check_linear(GROUPS), r"(scale_zero_ptr .*?) g\b", r"\1 g + 1"),
    "swapped nibbles": (lambda: check_linear(ROW), r"with_bits\(y_word, 0,", "with_bits(y_word >> 16, 0,"),
    "swapped nibbles, rows": (lambda: check_linear(ROWS, 3), r"with_bits\(y_word, 0,", "with_bits(y_word >> 16, 0,"),
    "swapped nibbles, groups": (lambda: check_linear(GROUPS), r"pair\(y_half, 1,", "pair(y_half, 2,"),
    "features in another order": (lambda: check_linear(GROUPS), r"\(0, 2, 1, 3\)", "(0, 2, 3, 1)"),
    "features in another order, rows": (
        lambda: check_linear(GROUPS_ROWS, 3), r"\(0, 1, 3, 2, 4\)", "(0, 1, 3, 4, 2)"
    ),
    "zero for another offset": (lambda: check_linear(GROUPS), r"1032\.0", "1031.0"),
    "sum of half a group": (lambda: check_linear(GROUPS), r"tl\.dot\(ones, x,", "tl.dot(ones * 0.5, x,"),
    "upper byte of another number": (lambda: check_linear(TWELVE, values="constant"), r"code % 4", "code % 2"),
    "feature of another word": (lambda: check_linear(TWELVE, values="constant"), r"// 2 \* 24", "// 2 * 32"),
    "patches of another four": (lambda: check_linear(PATCHED, values="constant"), r">= ends", "> ends"),
    "patches lost, rows": (lambda: check_linear(PATCHED_ROWS, 3, "constant"), r"patch < last\)\[", "patch < 0)["),
    "what patches replace stays": (
        lambda: check_linear(PATCHED, values="constant"), r"\(weight - patched\)", "weight"
    ),
    "what patches replace stays, rows": (
        lambda: check_linear(PATCHED_ROWS, 3, "constant"), r"-patched", "0.0 * patched"
    ),
    "expert off by one": (lambda: check_experts(STACK, [2, 0, 2]), r"(qweight_ptr \+=) expert", r"\1 (3 - expert)"),
    "expert off by one, rows": (
        lambda: check_experts(STACKS, [2, 0, 2]), r"(qweight_ptr \+=) expert", r"\1 (3 - expert)"
    ),
    "expert past the end": (lambda: check_experts(STACK, [2, 4, 2]), r"expert < 4", "expert < 5"),
    "wrong slot": (lambda: check_kv_fill(FILL, 3), r"tl\.load\(slot_ptr\)", "(tl.load(slot_ptr) + 1)"),
    "slot past the end": (lambda: check_kv_fill(FILL, 6), r"slot < 6\b", "slot < 7"),
    "missing mask of rows": (lambda: check_linear(ROW), r"(tl\.store\(y_ptr .*), mask=n < 21\)", r"\1)"),
    "missing mask of features": (lambda: check_linear(ROW), r", mask=k < 300, other=0\.0", ""),
    "missing mask of features, groups": (lambda: check_linear(GROUPS), r", mask=k < 300, other=0\.0", ""),
    "missing mask of columns": (  # eight rows of eight, which the guard zone has room for
        lambda: check_linear(dataclasses.replace(GROUPS, out_features=8)), r"\(column < 1\) & ", ""
    ),
    "missing mask of slots": (lambda: check_attention(ATTENTION, 30), r"slot < (70|38)\b", "slot >= 0"),
    "missing padding": (lambda: check_attention(ATTENTION, 30), r"live = live & ", "padding = "),
    "float16 accumulation": (lambda: check_linear(ROW), r"y \+= y_scale", "y += y.to(tl.float16) - y + y_scale"),
    "float16 accumulation, rows": (
        lambda: check_linear(ROWS, 3), r"(tl\.dot\(.*) y, input", r"\1 y.to(tl.float16).to(tl.float32), input"
    ),
    "scores by position": (
        lambda: check_attention(ATTENTION, 30), r"\* 0\.125", "* 0.125 + 1e-3 * slot[None, :]"
    ),
    "combined too early": (
        lambda: check_attention(dataclasses.replace(ATTENTION, splits=3), 30), r"group, 1\) == 2:", "group, 1) == 1:"
    ),
    "a counter that is not set back": (
        lambda: check_attention(ATTENTION, 30), r"tl\.store\(arrived_ptr \+ group, 0\)", "head = head"
    ),
    "a block that is left out": (
        lambda: check_attention(ATTENTION, 30), r"axis=0\) > 0:", "axis=0) > 0 and start > 32:"
    ),
    "the new slot twice": (lambda: check_attend(ATTEND, 40), r"& \(slot != skipped\)", ""),
    "the new slot by nobody": (lambda: check_attend(ATTEND, 40), r"% 2 == split", "% 2 == split + 2"),
    "an angle of the partner": (lambda: check_attend(ATTEND, 40), r"-sin, sin", "sin, -sin"),
    "a counter that advances early": (
        lambda: check_attend(ATTEND, 40), r"(batch = .*)", r"\1\n    tl.store(slot_ptr, tl.load(slot_ptr) + 1)"
    ),
    "a NaN that exits": (  # (a GPU's minimum skips NaN, that of some interpreters does not)
        lambda: check_nan_never_exits(ExitScoreSpec(3, 50), 1),
        r"tl\.minimum\(lowest, similarity\)\n +invalid \+= .*", "tl.where(similarity < lowest, similarity, lowest)",
    ),
    "a split by the number of rows": (  # of few, the second part begins a step earlier: right, but for the rounding
        lambda: check_bits_of_rows(DENSE, 6, slice(1, 3)), r"( +)for step in range\(3\)",
        r"\1few, part = tl.where(rows < 4, 1, 0), tl.program_id(2)"
        r"\n\1for step in range(-few * part, 3 - few * (1 - part))",
    ),
    "a row that reads its neighbour's": (
        lambda: check_bits_of_rows(DENSE, 6, slice(1, 3)), r"m \* 300", "(m ^ 1) * 300"
    ),
    "one largest score for all positions": (  # right, but for the rounding
        lambda: check_bits_of_positions(POSITIONS, 6, slice(1, 3)),
        r"tl\.max\(score, axis=1\)", "tl.max(tl.max(score, axis=1), axis=0)",
    ),
}  # fmt: skip
# These show that bits are compared although the tests' own dot adds in one order.
QUICK = ("a split by the number of rows", "a row that reads its neighbour's")


@pytest.mark.parametrize("name", slow_but(QUICK, MUTATIONS))
def test_a_broken_kernel_is_noticed(name, monkeypatch):
    check, old, new = MUTATIONS[name]
    check()
    render = loader.render

    def broken(spec):
        source = render(spec)
        mutated, count = re.subn(old, new, source)
        assert count, f"the generator no longer writes {old!r}"
        return mutated

    monkeypatch.setattr(loader, "render", broken)
    loader.load_for.cache_clear()
    try:
        with pytest.raises(AssertionError) as caught:
            check()
    finally:
        loader.load_for.cache_clear()
    assert "no longer writes" not in str(caught.value)
