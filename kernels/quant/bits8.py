"""Matrices of 8 bits a weight with float32 scales, whose values are integers or floats of 8 bits times these.

    qweight     int8 or float8_e4m3fn [N, K]
    scale       float32 [N, 1], or of integers [N, K / 32]

They come from models that were quantized before: from torchao's weight-only tensors, which are read as they are, and
from matrices of floats that a file with such weights was loaded to (GGUF's Q8_0, compressed-tensors'). Of these each
value is a number of 8 bits times the scale of its row, or of its 128, 64 or 32 neighbours, rounded to the matrix's
dtype. The numbers come back as they were, and scales so that every product rounds to the matrix's value.

Not handled: float8 of other kinds, zero points, scales of other groups, a scale of which no integer comes near to 127,
and values that were rounded twice, such as in float16 and then in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LAYOUT = "8bit"
GROUP = 32
_SHARING = (128, 64, GROUP)  # features that may have one scale, where a row has several
#: By kind, which magnitude the largest number of a scale may have, the likeliest first. (Whoever rounds with an eye on
#: the other weights meets the scale's end only nearly.)
_LARGEST = {torch.int8: (127, 128, *range(126, 99, -1)), torch.float8_e4m3fn: (448,)}
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
_TRIED = 8  # rows by which other kinds and groups are left alone
_AT_ONCE = 1 << 17  # weights, so that what is made of them stays in a cache
_SOME = 256  # of a row, which mostly tell its scale
_NARROWED = (2, 8)  # times that bounds of a scale are; where that was not enough
_NAN = 0x7F  # the magnitude of float8_e4m3fn that is no number


def held_by(tensor: object) -> tuple[Tensor, Tensor] | None:
    """Returns qweight and scale of a weight-only tensor of torchao ``[N, K]``, real or fake, None of others.

    Nothing is copied. Activations that are quantized too, and other scales than one for each row, are others.
    """
    qweight, scale = getattr(tensor, "qdata", None), getattr(tensor, "scale", None)
    if not isinstance(qweight, Tensor) or not isinstance(scale, Tensor) or qweight.dim() != 2:
        return None
    plain = getattr(tensor, "act_quant_kwargs", None) is None and qweight.is_contiguous()
    fits = qweight.dtype in (torch.int8, torch.float8_e4m3fn) and scale.shape == (len(qweight), 1)
    return (qweight, scale) if plain and fits else None


def pack(weights: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
    """Returns qweight and scale of matrices ``[N_i, K]``, one below the other, None if they are not of one such kind.

    They are copies. What is read of torchao must have no zero points, and no value that is no number.
    """
    parts = [_of_torchao(weight) or _of_floats(weight) for weight in weights]
    found = [part for part in parts if part is not None]
    if len(found) < len(parts) or len({(q.dtype, scale.shape[1]) for q, scale in found}) > 1:
        return None
    qweights, scales = zip(*found, strict=True)
    joined = torch.cat([q.view(torch.int8) for q in qweights])
    return joined.view(qweights[0].dtype), torch.cat(scales)


def _of_torchao(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    held, zero = held_by(tensor), getattr(tensor, "zero_point", None)
    if held is None or (isinstance(zero, Tensor) and bool(zero.any())):
        return None
    qweight, scale = (part.detach() for part in held)
    if qweight.dtype != torch.int8 and bool(((qweight.view(torch.uint8) & _NAN) == _NAN).any()):
        return None
    return qweight, scale.float()


def _of_floats(weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """Reads a matrix of floats whose values are numbers of 8 bits times scales, rounded."""
    if weight.dtype not in _BITS or held_by(weight) is not None:
        return None
    n, k = weight.shape
    some = weight[:: max(1, n // _TRIED)]
    parts = [group for group in _SHARING if k % group == 0 and k > group]
    for kind, group in [*((kind, k) for kind in _LARGEST), *((torch.int8, group) for group in parts)]:
        found = _read(some, kind, group) and _read(weight, kind, group)
        if found is not None:
            return found
    return None


def _read(weight: Tensor, kind: torch.dtype, group: int) -> tuple[Tensor, Tensor] | None:
    """Reads a matrix of numbers of a kind with a scale for each `group` of a row, None if it is none."""
    n, k = weight.shape
    qweight, scales = torch.empty(n, k, dtype=kind), torch.empty(n, k // group)
    rows = max(1, _AT_ONCE // k)
    for start in range(0, n, rows):
        grouped = weight.detach()[start : start + rows].reshape(-1, group)
        scale = _scales(grouped, kind)
        if scale is None:
            return None
        qweight[start : start + rows] = _numbers(grouped, scale, kind).to(kind).view(-1, k)
        scales[start : start + rows] = scale.view(-1, k // group)
    return qweight, scales if group == k else scales.repeat_interleave(group // GROUP, 1)


def _scales(grouped: Tensor, kind: torch.dtype) -> Tensor | None:
    """Returns a scale for each row, float32 ``[M, 1]``, that gives it numbers of a kind; None if a row has none."""
    scales, largest = torch.zeros(len(grouped), 1), grouped.abs().amax(1, keepdim=True)
    left = largest.squeeze(1).nonzero().squeeze(1)
    for thorough in (False, True):
        for number in _LARGEST[kind]:
            if not len(left):
                return scales
            rows = grouped if len(left) == len(grouped) else grouped[left]
            scale = _guessed(rows if thorough else rows[:, :_SOME], largest[left], number, kind, thorough)
            fits = ((_numbers(rows, scale, kind) * scale).to(rows.dtype) == rows).all(1)
            scales[left[fits]] = scale[fits]
            left = left[~fits]
    return None if len(left) else scales


def _guessed(some: Tensor, largest: Tensor, number: int, kind: torch.dtype, thorough: bool) -> Tensor:
    """Returns the scale that each row would have, float32 ``[M, 1]``, if its largest magnitude were this number's.

    A value is what all lie nearer to than to its neighbours that are rounded to it. So a value whose number is known
    says between which bounds the scale lies. The largest one's bounds tell the numbers of small values, and these, of
    which the bounds are others, those of more. Among what they leave, a scale is likely one of bfloat16 or of float16.
    `thorough`: the bounds are so near to each other in the end that they tell all numbers.
    """
    lower, upper = _rounded_to(largest)
    least, most = lower / number, upper / number
    lower, upper = _rounded_to(some.abs())
    for left in reversed(range(_NARROWED[thorough])):
        numbers, last = _within(lower / most, upper / least, kind)
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


def _rounded_to(magnitudes: Tensor) -> tuple[Tensor, Tensor]:
    """Returns between which bounds all is rounded to these numbers."""
    wide = torch.float64 if magnitudes.dtype == torch.float32 else torch.float32
    bits = magnitudes.view(_BITS[magnitudes.dtype])
    below, value, above = ((bits + step).view(magnitudes.dtype).to(wide) for step in (-1, 0, 1))
    # (What lies in the middle is rounded to the even neighbour.)
    beyond = (bits & 1).to(wide) * (2 * torch.finfo(wide).eps)
    return (below + value) / 2 * (1 + beyond), (value + above) / 2 * (1 - beyond)


def _numbers(grouped: Tensor, scale: Tensor, kind: torch.dtype) -> Tensor:
    """Returns the numbers of a kind that come nearest to values with a scale for each row, float32."""
    numbers = _nearest(grouped.float() / scale.where(scale > 0, 1.0), kind)
    return numbers.clamp_(-128, 127) if kind == torch.int8 else numbers


def _within(least: Tensor, most: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns the first and the last number of a kind between bounds; without one the first is greater."""
    if kind == torch.int8:
        return least.ceil(), most.floor()
    return _nearest(least, kind), _nearest(most, kind)  # (which are too near to each other to be both)


def _nearest(values: Tensor, kind: torch.dtype) -> Tensor:
    return values.round() if kind == torch.int8 else values.float().to(kind).to(values.dtype)


def dequantize(qweight: Tensor, scale: Tensor) -> Tensor:
    """Returns the matrix ``[N, K]`` in float32."""
    values = qweight.to(torch.float32)
    return (values.unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(-1)).flatten(1)
