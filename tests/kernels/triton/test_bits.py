"""NVIDIA's instructions in generated sources, which the interpreter cannot run, computed bit by bit."""

import re

import numpy
import pytest
import torch

from river_compile.kernels.quant.grid import QuantizedWeight
from river_compile.kernels.quant.layouts import pack
from river_compile.kernels.triton.linear import LinearSpec, LinearTile
from river_compile.kernels.triton.spec import render

_LOP3 = re.compile(r"lop3\.b32 \$0, (?:t|\$1), (0x\w+), (0x\w+), (0x\w+);")


def lop3(a: numpy.ndarray, b: int, c: int, table: int) -> numpy.ndarray:
    """PTX's `lop3`: bit i of the result is the table's bit numbered by bits i of a, b and c."""
    result = numpy.zeros_like(a)
    for row in range(8):
        if table >> row & 1:
            bits = [value if row >> place & 1 else ~value for value, place in ((a, 2), (numpy.uint32(b), 1))]
            result |= bits[0] & bits[1] & (numpy.uint32(c) if row & 1 else ~numpy.uint32(c))
    return result


def constants(spec: LinearSpec, name: str) -> list[tuple[int, tuple[int, int, int]]]:
    """Returns the shift and the three numbers of `lop3` in each of four constants of a source."""
    found = []
    for p in range(4):
        (text,) = re.findall(rf'^{name}_{p} = tl\.constexpr\("(.*)"\)$', render(spec), re.MULTILINE)
        shift = re.search(r"shr\.u32 t, \$1, (\d+);", text)
        found.append((int(shift[1]) if shift else 0, tuple(int(x, 0) for x in _LOP3.search(text).groups())))
    return found


def packed_words() -> tuple[numpy.ndarray, torch.Tensor]:
    """Returns words in the layout "triton", and their grid: features 0 to 7 of each word."""
    q = torch.randint(0, 16, (4, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = pack(QuantizedWeight(q, torch.ones(4, 2), torch.zeros(4, 2), 64), "triton")
    return packed.qweight.numpy().view(numpy.uint32), q.unflatten(1, (-1, 8)).float()


@pytest.mark.parametrize(("dtype", "base"), [("bfloat16", 128), ("float16", 1024)])
def test_a_pair_of_weights_is_made_exactly(dtype, base):
    words, q = packed_words()
    spec = LinearSpec(1, 128, 16, LinearTile(16, 128, 8), dtype=dtype)
    for p, (shift, numbers) in enumerate(constants(spec, "PAIR")):
        halves = torch.from_numpy(lop3(words >> shift, *numbers).view(numpy.int16)).view(getattr(torch, dtype))
        assert torch.equal(halves.float().unflatten(1, (-1, 2)), base + q[..., 2 * p : 2 * p + 2])


def test_a_single_weight_is_made_exactly():
    words, q = packed_words()
    spec = LinearSpec(1, 128, 16, LinearTile(16, 128), dtype="float32")
    for p, (_, numbers) in enumerate(constants(spec, "BITS")):
        for h in range(2):
            made = torch.from_numpy(lop3(words >> 16 * h, *numbers).view(numpy.float32))
            assert torch.equal(made, 2**23 + 16**p * q[..., 2 * p + h])
