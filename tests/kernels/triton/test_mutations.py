"""Breaks generated kernels by hand and shows that the checks notice: the tests of the tests."""

import pytest

from river_compile.kernels.triton import loader
from river_compile.kernels.triton.decode_attention import DecodeAttentionSpec
from river_compile.kernels.triton.exit_score import ExitScoreSpec
from river_compile.kernels.triton.kv_fill import KvFillSpec
from river_compile.kernels.triton.linear import LinearSpec, LinearTile
from tests.kernels.checks import check_attention, check_kv_fill, check_linear, check_nan_never_exits

FLOAT32 = {"dtype": "float32", "out_dtype": "float32"}
ROW = LinearSpec(1, 300, 21, LinearTile(8, 128), **FLOAT32)
ROWS = LinearSpec(3, 300, 21, LinearTile(16, 128, 16), **FLOAT32)
FILL = KvFillSpec(2, 2, 1, 48, 6, dtype="float32", rotary_dim=48, rotary_dtype="float32")
ATTENTION = DecodeAttentionSpec(2, 4, 2, 64, 70, 0.125, dtype="float32", window=40, mask=True, splits=2, block=16)

#: NaN is neither above nor below a threshold.
NEGATED = ("score > tl.load(threshold_ptr)", "(score <= tl.load(threshold_ptr)) == 0")

#: What is broken -> (check of the family, text to replace, its replacement).
MUTATIONS = {
    "group off by one": (lambda: check_linear(ROW), "scale_zero_ptr + g", "scale_zero_ptr + g + 1"),
    "group off by one, rows": (lambda: check_linear(ROWS, 3), "scale_zero_ptr + g", "scale_zero_ptr + g + 1"),
    "swapped nibbles": (lambda: check_linear(ROW), "y_word & 0xf)", "y_word_high & 0xf)"),
    "swapped nibbles, rows": (lambda: check_linear(ROWS, 3), "y_word & 0xf)", "y_word_high & 0xf)"),
    "wrong slot": (lambda: check_kv_fill(FILL, 3), "tl.load(slot_ptr)", "(tl.load(slot_ptr) + 1)"),
    "slot past the end": (lambda: check_kv_fill(FILL, 6), "(slot < 6)", "(slot < 7)"),
    "missing mask of rows": (lambda: check_linear(ROW), "tl.float32), mask=n < 21)", "tl.float32))"),
    "missing mask of features": (lambda: check_linear(ROW), ", mask=k < 300, other=0.0", ""),
    "missing mask of slots": (lambda: check_attention(ATTENTION, 61, 30), "live = slot < length", "live = slot >= 0"),
    "missing padding": (lambda: check_attention(ATTENTION, 61, 30), "live = live & ", "padding = "),
    "window off by one": (lambda: check_attention(ATTENTION, 61, 30), "length - 40", "length - 41"),
    "float16 accumulation": (lambda: check_linear(ROW), "y += y_scale", "y += y.to(tl.float16) - y + y_scale"),
    "float16 accumulation, rows": (lambda: check_linear(ROWS, 3), "y, input", "y.to(tl.float16).to(tl.float32), input"),
    "scores by position": (lambda: check_attention(ATTENTION, 61, 30), "* 0.125", "* 0.125 + 1e-3 * slot[None, :]"),
    "a NaN that exits": (lambda: check_nan_never_exits(ExitScoreSpec(3, 50), 1), *NEGATED),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_noticed(name, monkeypatch):
    check, old, new = MUTATIONS[name]
    check()
    render = loader.render

    def broken(spec):
        source = render(spec)
        assert old in source, f"the generator no longer writes {old!r}"
        return source.replace(old, new)

    monkeypatch.setattr(loader, "render", broken)
    loader.load.cache_clear()
    try:
        with pytest.raises(AssertionError) as caught:
            check()
    finally:
        loader.load.cache_clear()
    assert "no longer writes" not in str(caught.value)
