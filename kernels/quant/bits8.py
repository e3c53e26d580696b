"""Matrices of 8 bits a weight with float32 scales, whose values are integers or floats of 8 bits times these.

    qweight     int8 or float8_e4m3fn [N, K]
    scale       float32 [N, 1], or of integers [N, K / 32]

They come from models that were quantized before: from torchao's weight-only tensors, and from float32 matrices that a
file in GGUF's Q8_0 was loaded to, of which each value is an integer of 8 bits times the scale of its 32 neighbours.
Both are read without loss.

Not handled: float8 of other kinds, zero points, and scales of other groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LAYOUT = "8bit"
GROUP = 32
_MOST = 127  # every group of Q8_0 has an integer of this magnitude
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
    """Reads a float32 matrix whose groups of 32 are integers times scales, of which the largest is 127."""
    if weight.dtype != torch.float32 or weight.shape[1] % GROUP or held_by(weight) is not None:
        return None
    grouped = weight.detach().unflatten(1, (-1, GROUP))
    scale = grouped.abs().amax(-1, keepdim=True) / _MOST
    q = (grouped / scale.where(scale > 0, 1.0)).round_()
    if not torch.equal(q * scale, grouped):
        return None
    return q.to(torch.int8).flatten(1), scale.squeeze(-1).contiguous()


def dequantize(qweight: Tensor, scale: Tensor) -> Tensor:
    """Returns the matrix ``[N, K]`` in float32."""
    values = qweight.to(torch.float32)
    return (values.unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(-1)).flatten(1)
