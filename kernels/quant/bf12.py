"""Matrices of bfloat16 in 12 bits a weight, bit for bit, for the C++ kernels.

A weight's lower byte (the exponent's lowest bit and the mantissa) is kept as it is. Its upper byte, the sign and the
rest of the exponent, is one of 16 that are chosen for the matrix, the most frequent ones, by 4 bits. Trained weights
have few others: 0.02 % in SmolLM2, which are listed apart, as patches. The exponents' entropy is about 2.6 bits, so
that a code of variable length would save one bit more, and could not be read at the memory's speed.

    units       uint8 [N' / 4, K' / 64, 6, 64], N' = N rounded up to 16 and K' = K to 64: of four output features and 64
                input features the numbers of upper bytes of the first two output features (in the low and the high
                nibble), of the other two, and the lower bytes of each. Byte 16 l + j of a line is input feature
                8 l + j, or 24 + 8 l + j for j >= 8: so vectors of any length interleave them to the weights in order.
    side        int32: the 16 upper bytes, by ascending magnitude [4]; the number of each four's first patch
                [N' / 4 + 1]; patches [P, 2], ascending: 4 k + n for input feature k and output feature n of the four,
                and the weight's bits. The units have number 0 and a lower byte of 0 there: a small magnitude, which
                leaves no trace in a sum that adds the difference.

Generated kernels (layout "12bit_triton") read the same tensors on a GPU.

Not handled: other dtypes (float16 has 10 bits of mantissa and would save one bit), and packing without a C++ compiler.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import platform
import time
from pathlib import Path

import torch
from torch import Tensor

from river_compile.kernels.files import appearing, in_cache
from river_compile.kernels.native import load, packing
from river_compile.kernels.native.isa import chosen

log = logging.getLogger("river_compile.kernels.quant.bf12")

LAYOUT = "12bit"  # of `ops.linear` for the C++ kernels
GENERATED = "12bit_triton"  # for the generated ones
LAYOUTS = (LAYOUT, GENERATED)
UNIT = 64  # input features of a unit
UNIT_BYTES = 6 * UNIT
FOUR = 4  # output features of a unit
BLOCK = 16  # output features of a block of the C++ kernels
MOST_PATCHED = 0.01  # of a matrix: beyond, patches cost more than they save
_PALETTE = 16
# Of what `gain` measures: square matrices, 96 MiB in 16 bits, as many times.
_MEASURED, _MATRICES, _ROUNDS = 4096, 3, 5


def count(weight: Tensor) -> Tensor:
    """Returns how many weights of a bfloat16 matrix have each upper byte, int64 ``[256]``."""
    return packing.count_upper(weight.detach().contiguous())


def patched_share(counts: Tensor) -> float:
    """Returns which share of a matrix with these upper bytes would be patches."""
    return 1 - counts.topk(_PALETTE).values.sum().item() / max(1, counts.sum().item())


def pack(weight: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns units and side of a bfloat16 matrix ``[N, K]`` on the CPU (see the module's docstring).

    Args:
        weight: the matrix.
        counts: what `count` says of it, if that is known.

    Raises:
        ValueError: it is no matrix of bfloat16 on the CPU.
    """
    if weight.dim() != 2 or weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        raise ValueError(
            f"12 bits are for matrices of bfloat16 on the CPU, not {weight.dtype} {tuple(weight.shape)} on "
            f"{weight.device}"
        )
    weight = weight.detach().contiguous()
    n, k = weight.shape
    counts = count(weight) if counts is None else counts
    palette = counts.topk(_PALETTE).indices
    palette = palette[(palette % 128 * 2 + palette // 128).argsort()].to(torch.uint8)
    patches = int(weight.numel() - counts[palette.long()].sum())
    shape, length = shapes(n, k, patches)
    units, side = torch.empty(shape, dtype=torch.uint8), torch.zeros(length, dtype=torch.int32)
    fours = len(units)
    side[:4] = palette.view(torch.int32)
    packing.pack_bf12(weight, palette, units, side[4 : 5 + fours], side[5 + fours :])
    return units, side


def shapes(n: int, k: int, patches: int = 0) -> tuple[tuple[int, ...], tuple[int]]:
    """Returns the shapes of units and side of a matrix ``[N, K]``.

    There is room for as many patches as a matrix may have at least, so that weights that change can be packed in place:
    memory that is not written costs nothing.
    """
    fours, room = -(-n // BLOCK) * BLOCK // FOUR, max(patches, int(MOST_PATCHED * n * k))
    return (fours, -(-k // UNIT), 6, UNIT), (4 + fours + 1 + 2 * room,)


def is_sound(side: Tensor, n: int, k: int) -> bool:
    """Tells whether the patches of a matrix ``[N, K]`` are in its bounds; kernels do not look."""
    fours = shapes(n, k)[0][0]
    first, patches = side[4 : 5 + fours], side[5 + fours :].view(-1, 2)
    if first[0] != 0 or (first.diff() < 0).any() or first[-1] > len(patches):
        return False
    places = patches[: int(first[-1]), 0]
    return bool(((places >= 0) & (places < FOUR * k)).all())


def unpack(units: Tensor, side: Tensor, n: int, k: int) -> Tensor:
    """Returns the bfloat16 matrix ``[N, K]``."""
    fours, across = units.shape[:2]
    codes, lower = units[:, :, :2], units[:, :, 2:]
    codes = torch.stack([codes & 15, codes >> 4], dim=3).flatten(2, 3)
    upper = side[:4].view(torch.uint8)[codes.long()]
    bits = lower.to(torch.int32) | upper.to(torch.int32) << 8  # [fours, across, 4, 64]
    in_order = bits.unflatten(-1, (4, 2, 8)).transpose(-3, -2).flatten(-3)
    weights = in_order.transpose(1, 2).reshape(fours, FOUR, across * UNIT)
    first, patches = side[4 : 5 + fours].long(), side[5 + fours :].view(-1, 2)[: int(side[4 + fours])]
    of = torch.repeat_interleave(torch.arange(fours), first.diff())
    weights[of, patches[:, 0].long() % FOUR, patches[:, 0].long() // FOUR] = patches[:, 1]
    return weights.reshape(fours * FOUR, -1)[:n, :k].to(torch.int16).contiguous().view(torch.bfloat16)


@functools.cache
def gain() -> float:
    """Returns how many times as fast as in 16 bits a product of one row is in 12, on this machine with its threads.

    Measured once, on weights that no cache holds, and kept in the cache folder; 0 where there are no such kernels.
    """
    isa, threads = chosen().name, torch.get_num_threads()
    if isa == "portable" or not packing.available():
        return 0.0
    name = f"native/12bit_{isa}_{threads}_{hashlib.sha256(_processor().encode()).hexdigest()[:8]}.json"
    text = in_cache(name, _is_number, _measure).read_text(encoding="utf-8")
    return float(json.loads(text))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line for line in lines if line.startswith("model name")), platform.processor())


def _is_number(file: Path) -> bool:
    try:
        return isinstance(json.loads(file.read_text(encoding="utf-8")), float)
    except (OSError, ValueError):
        return False


@torch.inference_mode()
def _measure(file: Path) -> None:
    ops, size = load.load(), _MEASURED
    generator = torch.Generator().manual_seed(0)  # (the user's own stays where it is)
    weight = (torch.randn(size, size, generator=generator) * 0.02).bfloat16()
    packed = pack(weight)
    x = torch.ones(1, size, dtype=torch.bfloat16)
    several = [(weight.clone(), *(part.clone() for part in packed)) for _ in range(_MATRICES)]
    best = [math.inf, math.inf]
    for _ in range(_ROUNDS):
        for way in range(2):
            start = time.perf_counter()
            for in_16_bits, units, side in several:
                ops.linear(x, units, side, None, size, 0) if way else ops.dense(x, [in_16_bits], [])
            best[way] = min(best[way], time.perf_counter() - start)
    log.info("a product in 12 bits is %.2f times as fast as in 16", best[0] / best[1])
    with appearing(file) as scratch:
        scratch.write_text(json.dumps(best[0] / best[1]), encoding="utf-8")
