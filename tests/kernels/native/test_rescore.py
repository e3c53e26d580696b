"""Recomputed largest logits against float64, in C++ on every instruction set and in PyTorch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from river_compile.kernels import ops
from river_compile.kernels.native import load
from tests.kernels.native.running import DTYPES, ISAS, called, native

pytestmark = pytest.mark.usefixtures("restored")
BLOCK, BLOCKS = 64, 256  # of logits; the C++ kernels choose blocks by their largest


def drawn(seed: int, rows: int, features: int, vocabulary: int, dtype: torch.dtype, norm: str, bias: bool) -> tuple:
    """Returns arguments of the operator, and all logits recomputed in float64."""
    g = torch.Generator().manual_seed(seed)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    x, weight, norm_weight = values(rows, features), values(vocabulary, features), values(features)
    added = values(vocabulary) if bias else None
    h = x.double()
    if norm == "rms":
        h = torch.nn.functional.rms_norm(h, h.shape[-1:], norm_weight.double(), 1e-6)
    anew = h @ weight.double().T + (0 if added is None else added.double())
    logits = (anew + torch.randn(anew.shape, generator=g)).to(dtype)
    return (logits, x, weight, added, norm, norm_weight if norm == "rms" else None, None, 1e-6), anew


def check(y: torch.Tensor, logits: torch.Tensor, anew: torch.Tensor, least: torch.Tensor) -> None:
    """Checks that all logits from `least` ``[M, 1]`` on are recomputed, and no others."""
    chosen = logits >= least
    assert torch.equal(y[~chosen], logits[~chosen])
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[y.dtype]
    size = anew.abs().amax().item()
    torch.testing.assert_close(y[chosen].double(), anew[chosen], rtol=tolerance, atol=tolerance * size / 4)


def least_of_blocks(logits: torch.Tensor) -> torch.Tensor:
    """Returns the 256th largest of the maxima of blocks of 64, the definition."""
    padding = -logits.shape[-1] % BLOCK
    largest = torch.nn.functional.pad(logits, (0, padding), value=-torch.inf).unflatten(-1, (-1, BLOCK)).amax(-1)
    if largest.shape[-1] <= BLOCKS:
        return torch.full_like(largest[:, :1], -torch.inf)
    return largest.topk(BLOCKS, dim=-1).values[:, -1:]


@ISAS
@given(
    st.integers(0, 2**31),
    st.sampled_from([1, 2, 5]),
    st.sampled_from([32, 100, 300]),
    st.sampled_from([50, 1000, 20_001]),
    st.sampled_from(DTYPES),
    st.sampled_from(["none", "rms"]),
    st.booleans(),
    st.integers(1, 4),
)
def test_the_largest_are_exact_and_the_others_stay(isa, seed, rows, features, vocabulary, dtype, norm, bias, threads):
    arguments, anew = drawn(seed, rows, features, vocabulary, dtype, norm, bias)
    load.load(isa)
    torch.set_num_threads(threads)
    check(called(native.rescore, *arguments), arguments[0], anew, least_of_blocks(arguments[0]))


@given(st.integers(0, 2**31), st.sampled_from([50, 1000]), st.sampled_from(DTYPES), st.booleans())
def test_in_pytorch_as_many_as_are_asked_for(seed, vocabulary, dtype, bias):
    arguments, anew = drawn(seed, 2, 32, vocabulary, dtype, "rms", bias)
    y = torch.ops.river.rescore(*arguments)
    changed = y != arguments[0]
    assert (changed.sum(-1) <= ops.RESCORED).all()
    least = arguments[0].topk(min(ops.RESCORED, vocabulary)).values[:, -1:]
    certain = arguments[0] > least  # (of equal ones any may be chosen)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    size = tolerance * anew.abs().amax().item()
    torch.testing.assert_close(y[certain].double(), anew[certain], rtol=tolerance, atol=size)


def test_other_shapes_are_refused():
    load.load()
    (logits, x, weight, *rest), _ = drawn(0, 2, 32, 100, torch.float32, "none", False)
    for wrong in ((logits[:, 1:], x, weight), (logits, x[:, 1:], weight), (logits.double(), x, weight)):
        with pytest.raises(RuntimeError, match=r"(logits|weight) must"):
            native.rescore(*wrong, *rest)


@pytest.mark.timeout(60, method="thread")
@pytest.mark.parametrize("threads", [1, 2])
def test_more_rows_than_a_phase_has_parts(threads):
    """A phase of 2^16 parts or more would never end."""
    load.load()
    torch.set_num_threads(threads)
    x, weight = torch.arange(70_000.0).unsqueeze(1), torch.tensor([[1.0], [2.0]])
    y = native.rescore(torch.zeros(70_000, 2), x, weight, None)
    assert torch.equal(y, x @ weight.T)
