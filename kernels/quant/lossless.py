"""Lossless layouts: 12-bit packed bfloat16 weights, and weights of 8-bit integers or floats with float32 scales.

Not handled: in 12 bits other dtypes (float16 would save one bit), and packing without a C++ compiler. Not handled in 8
bits: other kinds of float8, zero-points, scales of other groups, scales whose largest integer is far below 127, and
values rounded twice, such as to float16 and then to bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from river_compile.kernels.native import load as native

LAYOUT_12BIT = "12bit"  # for the C++ kernels
LAYOUT_12BIT_TRITON = "12bit_triton"  # the same tensors, for the generated kernels
LAYOUTS_12BIT = (LAYOUT_12BIT, LAYOUT_12BIT_TRITON)
LAYOUT_8BIT = "8bit"

# 12 bits: a weight's lower byte (the exponent's lowest bit and the mantissa) stays. Its upper byte, the sign and the
# rest of the exponent, becomes the 4-bit number of one of the weight's 16 most frequent upper bytes. Other upper bytes
# (0.02 % of the weights of SmolLM2) are patches in a list. The entropy of exponents is about 2.6 bits: a code of
# variable length would save one bit more, but could not be decoded at memory speed.
#
#   units   uint8 [N' / 4, K' / 64, 6, 64], N' = N rounded up to 16 and K' = K to 64. For four output and 64 input
#           features: numbers of upper bytes of the first two output features (low and high nibble), of the other two,
#           and the lower bytes of each. Byte 16 l + j of a line is input feature 8 l + j, or 24 + 8 l + j for j >= 8,
#           so that vectors of any length interleave them to the weights in order.
#   side    int32: the 16 upper bytes by ascending magnitude [4]; the number of each four's first patch [N' / 4 + 1].
#           Then patches [P, 2], ascending: 4 k + n for input feature k and output feature n of the four, and the
#           weight's bits. The units have number 0 and lower byte 0 there, a magnitude too small to matter in a sum that
#           adds the rest.
UNIT = 64  # input features of a unit
UNIT_BYTES = 6 * UNIT
FOUR = 4  # output features of a unit
BLOCK = 16  # output features of a block of the C++ kernels
MAX_PATCHED_SHARE = 0.01  # of a weight: with more, patches cost more than they save
_PALETTE = 16

# 8 bits: qweight int8 or float8_e4m3fn [N, K] and scale float32 [N, 1], or for integers [N, K / 32]. They come from
# torchao's weight-only tensors, and from floats loaded from quantized files (GGUF's Q8_0, compressed-tensors). Each
# value is an 8-bit number times the scale of its row, or of its 128, 64 or 32 neighbors, rounded to the weight's
# dtype. The numbers are recovered exactly, and the scales so that every value rounds to the weight's.
GROUP_8BIT = 32
_SHARING = (128, 64, GROUP_8BIT)  # features that may share a scale, if a row has several
# The magnitudes that a group's largest number may have, likeliest first. Quantizers that look at the other weights only
# come close to the end of the range.
_LARGEST = {torch.int8: (127, 128, *range(126, 99, -1)), torch.float8_e4m3fn: (448,)}
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
_SAMPLED_ROWS = 8  # decide whether to try a kind and group on the whole weight
_CHUNK = 1 << 17  # weights, so that intermediate tensors stay in a cache
_SAMPLED_COLUMNS = 256  # usually enough to find a row's scale
_NARROWED = (2, 8)  # times that bounds of a scale are narrowed; the second if the first was not enough
_NAN = 0x7F  # the magnitude of float8_e4m3fn that is no number


def pack_12bit(weight: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return units and side of a bfloat16 weight ``[N, K]`` on the CPU (else ValueError); `counts` if known."""
    if weight.dim() != 2 or weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        raise ValueError(
            f"12-bit packing takes a bfloat16 weight on the CPU, not {weight.dtype} {tuple(weight.shape)} on "
            f"{weight.device}"
        )
    weight = weight.detach().contiguous()
    n, k = weight.shape
    counts = count_upper_bytes(weight) if counts is None else counts
    palette = counts.topk(_PALETTE).indices
    palette = palette[(palette % 128 * 2 + palette // 128).argsort()].to(torch.uint8)
    patches = int(weight.numel() - counts[palette.long()].sum())
    shape, length = shapes_12bit(n, k, patches)
    units, side = torch.empty(shape, dtype=torch.uint8), torch.zeros(length, dtype=torch.int32)
    fours = len(units)
    side[:4] = palette.view(torch.int32)
    native.pack_bf12(weight, palette, units, side[4 : 5 + fours], side[5 + fours :])
    return units, side


def unpack_12bit(units: Tensor, side: Tensor, n: int, k: int) -> Tensor:
    """Return the bfloat16 weight ``[N, K]``."""
    fours, across = units.shape[:2]
    codes, lower = units[:, :, :2], units[:, :, 2:]
    codes = torch.stack([codes & 15, codes >> 4], dim=3).flatten(2, 3)
    upper = side[:4].view(torch.uint8)[codes.long()]
    bits = lower.to(torch.int32) | upper.to(torch.int32) << 8  # [fours, across, 4, 64]
    in_order = bits.unflatten(-1, (4, 2, 8)).transpose(-3, -2).flatten(-3)
    weights = in_order.transpose(1, 2).reshape(fours, FOUR, across * UNIT)
    first, patches = side[4 : 5 + fours].long(), side[5 + fours :].view(-1, 2)[: int(side[4 + fours])]
    owner = torch.repeat_interleave(torch.arange(fours), first.diff())
    weights[owner, patches[:, 0].long() % FOUR, patches[:, 0].long() // FOUR] = patches[:, 1]
    return weights.reshape(fours * FOUR, -1)[:n, :k].to(torch.int16).contiguous().view(torch.bfloat16)


def count_upper_bytes(weight: Tensor) -> Tensor:
    """Count each upper byte of a bfloat16 weight, int64 ``[256]``."""
    return native.count_upper(weight.detach().contiguous())


def patched_share(counts: Tensor) -> float:
    """Return the share of weights that would be patches, from `count_upper_bytes`."""
    return 1 - counts.topk(_PALETTE).values.sum().item() / max(1, counts.sum().item())


def shapes_12bit(n: int, k: int, patches: int = 0) -> tuple[tuple[int, ...], tuple[int]]:
    """Return the shapes of units and side, with space for at least MAX_PATCHED_SHARE of patches."""
    # Changed weights can be repacked in place then. Memory that is not written costs nothing.
    fours, space = -(-n // BLOCK) * BLOCK // FOUR, max(patches, int(MAX_PATCHED_SHARE * n * k))
    return (fours, -(-k // UNIT), 6, UNIT), (4 + fours + 1 + 2 * space,)


def has_valid_patches(side: Tensor, n: int, k: int) -> bool:
    """Whether the patches of a weight ``[N, K]`` lie inside it and ascend in each four; kernels do not check."""
    # NumPy, on one thread: with hundreds of weights, torch's threads would wait for each other at every one.
    fours = shapes_12bit(n, k)[0][0]
    first, patches = side[4 : 5 + fours].numpy(), side[5 + fours :].view(-1, 2).numpy()
    lengths = np.diff(first)
    if first[0] != 0 or (lengths < 0).any() or first[-1] > len(patches):
        return False
    places = patches[: first[-1], 0]
    if not ((places >= 0) & (places < FOUR * k)).all():
        return False
    in_all = np.repeat(np.arange(fours, dtype=np.int64) * (FOUR * k), lengths) + places
    return bool((in_all[1:] > in_all[:-1]).all())


def pack_8bit(weights: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
    """Copy weights ``[N_i, K]``, one below the other, to qweight and scale; None unless all are of one 8-bit kind."""
    parts = [_from_torchao(weight) or _from_floats(weight) for weight in weights]
    found = [part for part in parts if part is not None]
    if len(found) < len(parts) or len({(q.dtype, scale.shape[1]) for q, scale in found}) > 1:
        return None
    qweights, scales = zip(*found, strict=True)
    joined = torch.cat([q.view(torch.int8) for q in qweights])
    return joined.view(qweights[0].dtype), torch.cat(scales)


def dequantize_8bit(qweight: Tensor, scale: Tensor) -> Tensor:
    """Return the weight ``[N, K]`` in float32."""
    values = qweight.to(torch.float32)
    return (values.unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(-1)).flatten(1)


def torchao_parts(tensor: object) -> tuple[Tensor, Tensor] | None:
    """Return qweight and scale of torchao's weight-only tensor (real or fake), not copied; None for others."""
    qweight, scale = getattr(tensor, "qdata", None), getattr(tensor, "scale", None)
    if not isinstance(qweight, Tensor) or not isinstance(scale, Tensor) or qweight.dim() != 2:
        return None
    weight_only = getattr(tensor, "act_quant_kwargs", None) is None and qweight.is_contiguous()
    supported = qweight.dtype in (torch.int8, torch.float8_e4m3fn) and scale.shape == (len(qweight), 1)
    return (qweight, scale) if weight_only and supported else None


def _from_torchao(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    parts, zero = torchao_parts(tensor), getattr(tensor, "zero_point", None)
    if parts is None or (isinstance(zero, Tensor) and bool(zero.any())):
        return None
    qweight, scale = (part.detach() for part in parts)
    if qweight.dtype != torch.int8 and bool(((qweight.view(torch.uint8) & _NAN) == _NAN).any()):
        return None
    return qweight, scale.float()


def _from_floats(weight: Tensor) -> tuple[Tensor, Tensor] | None:
    if weight.dtype not in _BITS or torchao_parts(weight) is not None:
        return None
    n, k = weight.shape
    some = weight[:: max(1, n // _SAMPLED_ROWS)]
    groups = [group for group in _SHARING if k % group == 0 and k > group]
    for kind, group in [*((kind, k) for kind in _LARGEST), *((torch.int8, group) for group in groups)]:
        found = _recover(some, kind, group) and _recover(weight, kind, group)
        if found is not None:
            return found
    return None


def _recover(weight: Tensor, kind: torch.dtype, group: int) -> tuple[Tensor, Tensor] | None:
    """Return numbers of a dtype and a scale for each `group` of a row, None if the weight is not of that form."""
    n, k = weight.shape
    qweight, scales = torch.empty(n, k, dtype=kind), torch.empty(n, k // group)
    rows = max(1, _CHUNK // k)
    for start in range(0, n, rows):
        grouped = weight.detach()[start : start + rows].reshape(-1, group)
        scale = _scales(grouped, kind)
        if scale is None:
            return None
        qweight[start : start + rows] = _numbers(grouped, scale, kind).to(kind).view(-1, k)
        scales[start : start + rows] = scale.view(-1, k // group)
    return qweight, scales if group == k else scales.repeat_interleave(group // GROUP_8BIT, 1)


def _scales(grouped: Tensor, kind: torch.dtype) -> Tensor | None:
    """Return a scale for each row, float32 ``[M, 1]``, that gives it numbers of a dtype; None if a row has none."""
    scales, largest = torch.zeros(len(grouped), 1), grouped.abs().amax(1, keepdim=True)
    left = largest.squeeze(1).nonzero().squeeze(1)
    for thorough in (False, True):
        for number in _LARGEST[kind]:
            if not len(left):
                return scales
            rows = grouped if len(left) == len(grouped) else grouped[left]
            scale = _guess_scale(
                rows if thorough else rows[:, :_SAMPLED_COLUMNS], largest[left], number, kind, thorough
            )
            exact = ((_numbers(rows, scale, kind) * scale).to(rows.dtype) == rows).all(1)
            scales[left[exact]] = scale[exact]
            left = left[~exact]
    return None if len(left) else scales


def _guess_scale(some: Tensor, largest: Tensor, number: int, kind: torch.dtype, thorough: bool) -> Tensor:
    """Return each row's scale, float32 ``[M, 1]``, on the premise that its largest magnitude is `number`."""
    # A value is the rounding of an interval, so a value with a known number bounds the scale. The largest value's
    # bounds tell the numbers of small values, whose bounds tell those of more. Among the scales left, one of bfloat16
    # or float16 is likely. With `thorough` the bounds end so close that they tell all numbers.
    lower, upper = _rounding_interval(largest)
    least, most = lower / number, upper / number
    lower, upper = _rounding_interval(some.abs())
    for left in reversed(range(_NARROWED[thorough])):
        numbers, last = _numbers_within(lower / most, upper / least, kind)
        if thorough and not left:
            numbers = last = _nearest((lower + upper) / (least + most), kind)
        known = (numbers == last) & (numbers > 0)
        least = torch.maximum(least, (lower / numbers).where(known, 0.0).amax(1, keepdim=True))
        most = torch.minimum(most, (upper / numbers).where(known, math.inf).amin(1, keepdim=True))
    middle = (least + most) / 2
    scale = middle.float()
    for dtype in (torch.float16, torch.bfloat16):
        short = middle.to(dtype).to(middle.dtype)
        scale = torch.where((least <= short) & (short <= most), short.float(), scale)
    return scale


def _rounding_interval(magnitudes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bounds of the reals that round to each magnitude."""
    wide = torch.float64 if magnitudes.dtype == torch.float32 else torch.float32
    bits = magnitudes.view(_BITS[magnitudes.dtype])
    below, value, above = ((bits + step).view(magnitudes.dtype).to(wide) for step in (-1, 0, 1))
    # Ties round to the even neighbor.
    beyond = (bits & 1).to(wide) * (2 * torch.finfo(wide).eps)
    return (below + value) / 2 * (1 + beyond), (value + above) / 2 * (1 - beyond)


def _numbers(grouped: Tensor, scale: Tensor, kind: torch.dtype) -> Tensor:
    """Return the nearest numbers of a dtype, as float32, for values with a scale for each row."""
    numbers = _nearest(grouped.float() / scale.where(scale > 0, 1.0), kind)
    return numbers.clamp_(-128, 127) if kind == torch.int8 else numbers


def _numbers_within(least: Tensor, most: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the first and the last number of a dtype between bounds; first > last if there is none."""
    if kind == torch.int8:
        return least.ceil(), most.floor()
    return _nearest(least, kind), _nearest(most, kind)  # the bounds are too close for both to be numbers


def _nearest(values: Tensor, kind: torch.dtype) -> Tensor:
    return values.round() if kind == torch.int8 else values.float().to(kind).to(values.dtype)
