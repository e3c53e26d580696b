"""The linear kernels in Triton's interpreter against float64: shapes, dtypes, tiles, epilogues, extreme values."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from river_compile.kernels.triton.linear import ACTIVATIONS, NORMS, LinearSpec, LinearTile, form_of
from tests.kernels.checks import VALUES, check_bits_of_rows, check_linear
from tests.support.examples import examples

DTYPES = ("float32", "float16", "bfloat16")


def around(draw, k: int, norm: str) -> dict:
    """Draws epilogues, norm and strides of a linear with K input features."""
    return {
        "norm": norm,
        "norm_bias": norm == "layer" and draw(st.booleans()),
        "bias": draw(st.booleans()),
        "residual": draw(st.booleans()),
        "activation": draw(st.sampled_from(sorted(ACTIVATIONS))),
        "gated": draw(st.booleans()),
        "x_stride": k + draw(st.sampled_from((0, 5))),
    }


@st.composite
def linear_cases(draw, rows, weights, norms):
    """Draws a spec with an arbitrary tile, and the rows of the call."""
    m = draw(rows)
    dense = weights == "dense"
    group = 0 if dense else draw(st.sampled_from((32, 64, 128)))
    k, n = draw(st.integers(1, 300)), draw(st.integers(1, 70))
    dtype = draw(st.sampled_from(DTYPES))
    form = form_of(weights, group, dtype, m == 1)
    if form == "row":
        depth = group * draw(st.sampled_from((1, 2, 4)))
        tile = {"block_n": draw(st.sampled_from((1, 4, 16, 64))), "block_k": depth}
    elif form == "groups":
        depth = group * draw(st.sampled_from((1, 2, 4)))
        tile = {
            "block_n": draw(st.sampled_from((16, 32, 64))),
            "block_k": depth,
            "block_m": draw(st.sampled_from((8, 16))),
        }
    else:
        depth = draw(st.sampled_from((16, 64))) if dense else draw(st.sampled_from((128, 256)))
        tile = {
            "block_n": draw(st.sampled_from((16, 32))),
            "block_k": depth,
            "block_m": draw(st.sampled_from((16, 32))),
        }
    norm = draw(st.sampled_from(norms))
    steps = -(-k // depth)
    split = draw(st.integers(1, min(3, steps))) if norm == "none" else 1
    spec = LinearSpec(
        m if m <= 16 and not dense else None,
        k,
        n,
        LinearTile(**tile, split_k=split),
        weights=weights,
        group_size=group,
        dtype=dtype,
        **around(draw, k, norm),
    )
    return spec, m, draw(st.sampled_from(VALUES)), draw(st.integers(0, 2**20))


@pytest.mark.core
@given(linear_cases(st.just(1), "w4", NORMS))
@examples(20)
def test_one_row_of_4_bit_weights(case):
    check_linear(*case)


@pytest.mark.core
@given(linear_cases(st.integers(2, 33), "w4", NORMS))
@examples(30)
def test_rows_of_4_bit_weights(case):
    check_linear(*case)


@given(linear_cases(st.integers(1, 20), "dense", ("none", "rms")))
@examples(20)
def test_dense_weights(case):
    check_linear(*case)


@st.composite
def cases_in_12_bits(draw, rows):
    """Draws a spec of 12-bit weights with an arbitrary tile, and the rows of the call."""
    m, k, n = draw(rows), draw(st.integers(1, 300)), draw(st.integers(1, 70))
    norm = draw(st.sampled_from(NORMS))
    depth, others = 64 * draw(st.sampled_from((1, 2, 4))), around(draw, k, norm)
    spec = LinearSpec(
        1 if m == 1 else None,
        k,
        4 * n if others["gated"] else n,
        LinearTile(
            draw(st.sampled_from((4, 8, 32) if m == 1 else (64, 128))),
            depth,
            1 if m == 1 else 16,
            draw(st.integers(1, min(3, -(-k // depth)))) if norm == "none" else 1,
        ),
        weights="bf12",
        group_size=0,
        **others,
    )
    return spec, m, draw(st.sampled_from(VALUES)), draw(st.integers(0, 2**20))


@given(cases_in_12_bits(st.just(1)))
@examples(20)
def test_one_row_of_weights_in_12_bits(case):
    """Against the bfloat16 weight in float64, with patches."""
    check_linear(*case)


@given(cases_in_12_bits(st.integers(2, 20)))
@examples(20)
def test_rows_of_weights_in_12_bits(case):
    check_linear(*case)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tile": LinearTile(6 + 2, 96 + 32)}, None),
        ({"tile": LinearTile(2, 64)}, "block_n=2 .* at least 4"),
        ({"tile": LinearTile(4, 32)}, "whole units"),
        ({"rows": None, "tile": LinearTile(32, 64, 16)}, "block_n=32 .* at least 64"),
        ({"rows": 3, "tile": LinearTile(64, 64, 16)}, "rows=3: one kernel serves any number of rows"),
        ({"dtype": "float16"}, "float16"),
        ({"gated": True, "out_features": 30}, "out_features=30"),
    ],
)
def test_what_weights_in_12_bits_do_not_have_is_refused(fields, message):
    spec = {"rows": 1, "in_features": 128, "out_features": 32, "tile": LinearTile(4, 64)}
    spec |= {"weights": "bf12", "group_size": 0, **fields}
    with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
        LinearSpec(**spec)


@st.composite
def several_matrices(draw):
    """Draws a dense spec of a gated pair, or of a few weights whose rows a tile divides."""
    m, k = draw(st.sampled_from((1, 3, 16))), draw(st.integers(1, 300))
    gated, block_n = draw(st.booleans()), 16
    parts = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4)) if not gated else [draw(st.integers(1, 4))] * 2
    matrices = tuple(block_n * part for part in parts)
    bias, norm = draw(st.booleans()), draw(st.sampled_from(("none", "rms", "rms_plus_one", "layer")))
    spec = LinearSpec(
        None,
        k,
        matrices[0] if gated else sum(matrices),
        LinearTile(block_n, 64, 16, 1 if bias or norm != "none" else min(2, -(-k // 64))),
        weights="dense",
        group_size=0,
        dtype=draw(st.sampled_from(DTYPES)),
        norm=norm,
        bias=bias,
        residual=draw(st.booleans()),
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        gated=gated,
        matrices=matrices,
    )
    return spec, m, "normal", draw(st.integers(0, 2**20))


@given(several_matrices())
@examples(30)
def test_several_dense_matrices_are_one_product(case):
    check_linear(*case)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"matrices": (32,)}, r"matrices=\(32,\)"),
        ({"matrices": (16, 8)}, r"matrices=\(16, 8\)"),
        ({"matrices": (24, 8)}, "block_n=16"),
        ({"matrices": (16, 16), "weights": "w4", "group_size": 64}, "several dense weights"),
        ({"matrices": (48, 16), "gated": True}, "a gate and an up projection"),
        ({"matrices": (16, 16), "bias": True, "tile": LinearTile(16, 64, 16, split_k=2)}, "split_k=2"),
    ],
)
def test_matrices_that_do_not_fit_together_are_refused(fields, message):
    tile = LinearTile(16, 64, 16)
    spec = {"in_features": 128, "out_features": 32, "tile": tile, "weights": "dense", "group_size": 0}
    with pytest.raises(ValueError, match=message):
        LinearSpec(None, **{**spec, **fields})


@given(linear_cases(st.integers(2, 16), "dense", NORMS), st.data())
@examples(20)
def test_a_row_has_the_same_bits_whichever_others_run_beside_it(case, data):
    """For 16-bit weights and any number of rows; missing rows of a tile hold NaN."""
    spec, rows, _, seed = case
    first = data.draw(st.integers(0, rows - 1))
    check_bits_of_rows(spec, rows, slice(first, first + data.draw(st.integers(1, rows - first))), seed)


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_a_row_longer_than_a_block_of_statistics(norm):
    tile = LinearTile(16, 512, 16)
    check_linear(LinearSpec(3, 1100, 16, tile, dtype="float32", norm=norm), 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 17}, "rows=17"),
        ({"rows": 0}, "rows=0"),
        ({"in_features": 0}, "in_features=0"),
        ({"group_size": 48}, "group_size=48"),
        ({"dtype": "float64"}, "dtype='float64'"),
        ({"norm": "batch"}, "norm='batch'"),
        ({"activation": "swish"}, "activation='swish'"),
        ({"norm_bias": True}, "norm_bias=True"),
        ({"x_stride": 63}, "x_stride=63"),
        ({"tile": LinearTile(16, 32, 8)}, "block_k=32"),
        ({"tile": LinearTile(16, 64)}, "block_m=1"),
        ({"tile": LinearTile(8, 64, 8)}, "block_n=8"),
        ({"tile": LinearTile(8, 64, 16), "dtype": "float32"}, "block_m=16"),
        ({"tile": LinearTile(16, 64, 8, split_k=2)}, "split_k=2"),
        ({"in_features": 256, "tile": LinearTile(16, 64, 8, split_k=2), "norm": "rms"}, "split_k=2"),
        ({"rows": 2, "tile": LinearTile(16, 64, 16), "dtype": "float32"}, "block_k=64"),
        ({"rows": 2, "tile": LinearTile(8, 128, 16), "dtype": "float32"}, "block_n=8"),
    ],
)
def test_what_a_spec_refuses(changes, message):
    fields = {"rows": 1, "in_features": 64, "out_features": 8, "tile": LinearTile(16, 64, 8)}
    with pytest.raises(ValueError, match=message):
        LinearSpec(**{**fields, **changes})


def test_tile_sizes_are_powers_of_two():
    with pytest.raises(ValueError, match="block_n=3"):
        LinearTile(3, 64)
