"""Linears with a list of blocks of output features, on every instruction set and in PyTorch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from river_compile.kernels import ops
from river_compile.kernels.native import load
from river_compile.kernels.native.load import Tape
from tests.kernels.native.running import DTYPES, ISAS, called, linear, native
from tests.kernels.packing import pack_linear

pytestmark = pytest.mark.usefixtures("restored")


def blocks_of(n: int) -> int:
    return -(-n // ops.VOCAB_BLOCK)


def listed(blocks: list[int], n: int) -> torch.Tensor:
    """Returns the list for operators, with invalid numbers after its end."""
    numbers = [len(blocks), *sorted(blocks)]
    return torch.tensor(numbers + [1 << 20] * (1 + blocks_of(n) - len(numbers)), dtype=torch.int32)


@st.composite
def cases(draw):
    rows, n, k = draw(st.integers(1, 9)), draw(st.integers(1, 400)), draw(st.integers(1, 130))
    numbers = st.integers(0, blocks_of(n) - 1)
    blocks = draw(st.lists(numbers, min_size=1, unique=True))
    return rows, n, k, blocks, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2**20))


def drawn(case: tuple) -> tuple:
    """Returns activations, the packed weight, a bias, the list, and a mask of the listed features."""
    rows, n, k, blocks, dtype, seed = case
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=g)
    packed = pack_linear(weight, 32, "native", "rtn")
    x, bias = torch.randn(rows, k, generator=g).to(dtype), torch.randn(n, generator=g).to(dtype)
    is_wanted = torch.isin(torch.arange(n) // ops.VOCAB_BLOCK, torch.tensor(blocks))
    return x, packed, bias, listed(blocks, n), is_wanted


@ISAS
@given(cases(), st.integers(1, 4))
def test_wanted_features_have_the_bits_of_a_whole_product(isa, case, threads):
    x, packed, bias, vocab_blocks, is_wanted = drawn(case)
    load.load(isa)
    torch.set_num_threads(threads)
    y = called(linear, x, packed, bias, vocab_blocks=vocab_blocks)
    assert torch.equal(y[:, is_wanted], linear(x, packed, bias)[:, is_wanted])
    assert (y[:, ~is_wanted] == ops.MASKED_LOGIT).all()


@given(cases())
def test_pytorch_says_the_same(case):
    x, packed, bias, vocab_blocks, is_wanted = drawn(case)
    given_ = (x, packed.qweight, packed.scale_zero, bias, packed.out_features, 32, packed.layout)
    y = torch.ops.river.linear(*given_, vocab_blocks=vocab_blocks)
    assert torch.equal(y[:, is_wanted], torch.ops.river.linear(*given_)[:, is_wanted])
    assert (y[:, ~is_wanted] == ops.MASKED_LOGIT).all()


@ISAS
def test_a_replay_reads_the_list_anew(isa):
    x, packed, bias, vocab_blocks, _ = drawn((1, 100, 40, [2], torch.bfloat16, 0))
    load.load(isa)
    tape = recorded(lambda: linear(x, packed, bias, vocab_blocks=vocab_blocks))
    for blocks in ([0], [1, 6], list(range(7))):
        vocab_blocks.copy_(listed(blocks, 100))
        y = tape()
        assert torch.equal(y != ops.MASKED_LOGIT, torch.isin(torch.arange(100) // 16, torch.tensor(blocks))[None])


def recorded(call):
    """Records a call; returns a function that replays it and returns its output."""
    tape = Tape()
    with tape.recording():
        y = call()

    def replayed() -> torch.Tensor:
        tape.replay()
        return y

    return replayed


@ISAS
@pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
def test_no_logit_that_is_unwanted_is_computed_anew(isa, share):
    load.load(isa)
    g = torch.Generator().manual_seed(0)
    n, k = 40_000, 48
    weight, x = torch.randn(n, k, generator=g).bfloat16(), torch.randn(2, k, generator=g).bfloat16()
    blocks = [i for i in range(blocks_of(n)) if torch.rand((), generator=g) < share]
    is_wanted = torch.isin(torch.arange(n) // ops.VOCAB_BLOCK, torch.tensor(blocks))
    logits = torch.where(is_wanted, (x @ weight.T) + 0.1, ops.MASKED_LOGIT).bfloat16()
    for rescore in (native.rescore, torch.ops.river.rescore):
        y = rescore(logits, x, weight, None, "none", None, None, 1e-6)
        assert torch.equal(y[:, ~is_wanted], logits[:, ~is_wanted])
        best = logits.argmax(-1, keepdim=True)
        torch.testing.assert_close(y.gather(1, best), (x @ weight.T).gather(1, best), rtol=1e-2, atol=1e-2)


def test_lists_of_another_kind_are_refused():
    load.load()
    x, packed, bias, vocab_blocks, _ = drawn((1, 96, 40, [2], torch.bfloat16, 0))
    for wrong in (vocab_blocks.long(), vocab_blocks[1:]):
        with pytest.raises(RuntimeError, match="vocab_blocks must"):
            linear(x, packed, bias, vocab_blocks=wrong)
    with pytest.raises(RuntimeError, match="vocab_blocks must"):
        linear(x, packed, bias, gated=True, vocab_blocks=vocab_blocks)
    matrix = (packed.qweight, packed.scale_zero, bias, 96, 32, "native")
    with pytest.raises(ValueError, match="without gate and residual"):
        torch.ops.river.linear(x, *matrix, residual=torch.zeros(1, 96).bfloat16(), vocab_blocks=vocab_blocks)
