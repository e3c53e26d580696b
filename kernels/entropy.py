"""How sure a model is of the next token, and how far another one is from it, by their logits, in plain torch.

The compiler fuses the entropy into the end of the head, where the logits are still in the processor's cache.

Not handled: temperatures and other processing that generation applies to the logits afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor


def largest_entropy(logits: Tensor) -> Tensor:
    """Returns the largest entropy over rows of softmax(logits) at the last position, a float32 scalar, in nats.

    With z the logits less their maximum, the entropy is ``log(sum e^z) - sum(z e^z) / sum(e^z)``; a logit of -inf adds
    nothing to it. A row with a NaN makes the result NaN.

    Args:
        logits: ``[B, T, V]``, floating point.
    """
    last = logits[:, -1].to(torch.float32)
    shifted = last - last.amax(-1, keepdim=True)
    weights = shifted.exp()
    total = weights.sum(-1)
    # (0 * -inf would be NaN: a token that cannot come counts with a finite number times zero)
    spread = (weights * shifted.clamp(min=-1e4)).sum(-1)
    return (total.log() - spread / total).amax()


def token_kl(reference: Tensor, other: Tensor) -> Tensor:
    """Returns KL(reference || other) in nats of each row of logits ``[tokens, V]``."""
    p, q = reference.float().log_softmax(-1), other.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)
