"""C++ linears with 8-bit weights: torchao's tensors against float64, and those of Q8_0 against float32."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from river_compile.kernels.native import load
from river_compile.kernels.quant import lossless
from tests.kernels import reference
from tests.kernels.harness import assert_close
from tests.kernels.native.running import EACH_ISA, called, dense, native, same_bits
from tests.support.examples import examples

pytestmark = pytest.mark.usefixtures("restored")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOAT8 = torch.float8_e4m3fn


def weights(n: int, k: int, kind: torch.dtype, groups: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns random bytes with a few of the extreme magnitudes, and scales."""
    if kind == torch.int8:
        q = torch.randint(-128, 128, (n, k), generator=g).to(torch.int8)
    else:
        q = torch.randint(0, 127, (n, k), generator=g).to(torch.uint8)  # (127 is no number)
        q = (q | torch.randint(0, 2, (n, k), generator=g).to(torch.uint8) << 7).view(kind)
    return q, torch.rand(n, groups, generator=g) * 0.01 + 1e-4


def in_8_bits(x, qweight, scale, bias=None, **around):
    return native.linear(x, qweight, scale, bias, len(qweight), 0, **around)


@pytest.mark.parametrize("isa", EACH_ISA)
@given(
    m=st.one_of(st.integers(1, 20), st.integers(21, 100)),
    n=st.integers(1, 90),
    k=st.integers(1, 12),
    ragged=st.integers(0, 31),
    kind=st.sampled_from((torch.int8, FLOAT8)),
    grouped=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**20),
)
@examples(20)
def test_any_shape(isa, m, n, k, ragged, kind, grouped, dtype, threads, seed):
    load.load(isa)
    torch.set_num_threads(threads)
    g = torch.Generator().manual_seed(seed)
    grouped = grouped and kind == torch.int8
    k = 32 * k + (0 if grouped else ragged)
    qweight, scale = weights(n, k, kind, k // 32 if grouped else 1, g)
    x, bias = torch.randn(m, k, generator=g).to(dtype), torch.randn(n, generator=g).to(dtype)
    call = called if m <= 8 else lambda function, *arguments: function(*arguments)
    y = call(in_8_bits, x, qweight, scale, bias)
    exact = lossless.dequantize_8bit(qweight, scale).double()
    expected = reference.linear(x.double(), exact, bias=bias, residual=None, activation="none", gated=False)
    assert_close(y, expected, x.double().abs() @ exact.abs().T + bias.double().abs())
    rows = [in_8_bits(x[i : i + 1], qweight, scale, bias) for i in range(min(m, 3))]
    assert same_bits(torch.cat(rows), y[: len(rows)]), "a row's bits depend on the others"


@pytest.mark.parametrize("isa", EACH_ISA)
@pytest.mark.parametrize("m", [1, 3, 8])
def test_what_a_file_in_q8_0_gives_has_the_bits_of_the_float32_matrix(isa, m):
    """With norm, gate, bias and residual."""
    load.load(isa)
    g = torch.Generator().manual_seed(m)
    q = torch.randint(-127, 128, (192, 160), generator=g)
    q[:, ::32] = 127
    scale = (torch.rand(192, 5, generator=g) * 0.01).half().float()
    weight = lossless.dequantize_8bit(q.to(torch.int8), scale)
    x, bias = torch.randn(m, 160, generator=g), torch.randn(192, generator=g)
    around = {
        "residual": torch.randn(m, 96, generator=g),
        "norm": "rms",
        "norm_weight": torch.randn(160, generator=g),
        "activation": "silu",
        "gated": True,
    }
    assert same_bits(in_8_bits(x, *lossless.pack_8bit([weight]), bias, **around), dense(x, weight, bias, **around))


def test_tensors_that_do_not_fit_are_refused():
    load.load()
    g = torch.Generator().manual_seed(0)
    qweight, scale = weights(40, 96, torch.int8, 1, g)
    x = torch.ones(2, 96)
    with pytest.raises(RuntimeError, match="does not have these features"):
        in_8_bits(x[:, :64].contiguous(), qweight, scale)
    for wrong in (scale.double(), scale[:20], torch.ones(40, 2), scale.repeat(1, 3).T.contiguous().T):
        with pytest.raises(RuntimeError, match="scale_zero must be float32"):
            in_8_bits(x, qweight, wrong)
    with pytest.raises(RuntimeError, match="scale_zero must be float32"):
        in_8_bits(x, qweight.view(FLOAT8), torch.ones(40, 3))
