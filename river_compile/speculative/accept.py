"""Accepts a drafted token or chooses another, by the backbone's scores: the rule that keeps exact mode exact.

Greedy: the backbone's best token; the draft agrees where it is that token. Sampling: speculative rejection sampling
(Leviathan, Kalman, Matias, "Fast Inference from Transformers via Speculative Decoding", arXiv 2211.17192; Chen et al.,
"Accelerating Large Language Model Decoding with Speculative Sampling", arXiv 2302.01318), whose tokens have exactly the
distribution of the backbone's scores, whatever proposed them.

Shapes: B rows, V vocabulary entries. Not handled: drafts of several tokens at once, which the loop accepts one by one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Selection(NamedTuple):
    """The next token of each row ``[B]``, and where the drafted token was kept ``[B]`` (bool)."""

    tokens: Tensor
    agreed: Tensor


def select(scores_BV: Tensor, drafted_B: Tensor | None, proposal_BV: Tensor | None, do_sample: bool) -> Selection:
    """Chooses the next token of every row.

    Args:
        scores_BV: the backbone's processed scores, as plain generation would use them.
        drafted_B: the drafted tokens, None after the last one (then no row agrees).
        proposal_BV: the probabilities that `drafted_B` was drawn from; None where it was not drawn (a copied
            token), which is the same as a proposal with all its mass on that token.
        do_sample: draw from the scores' softmax instead of taking their maximum.
    """
    if do_sample and drafted_B is not None:
        return _accept_or_redraw(scores_BV.softmax(-1), drafted_B, proposal_BV)
    tokens = _draw(scores_BV.softmax(-1)) if do_sample else scores_BV.argmax(-1)
    agreed = torch.zeros_like(tokens, dtype=torch.bool) if drafted_B is None else tokens == drafted_B
    return Selection(tokens, agreed)


def _accept_or_redraw(target_BV: Tensor, drafted_B: Tensor, proposal_BV: Tensor | None) -> Selection:
    """Keeps a draft d with probability min(1, p(d) / q(d)), else draws from the positive part of p - q."""
    drafted_B1 = drafted_B[:, None]
    if proposal_BV is None:
        proposal_BV = torch.zeros_like(target_BV).scatter_(1, drafted_B1, 1.0)
    p_B, q_B = (x.gather(1, drafted_B1)[:, 0] for x in (target_BV, proposal_BV))
    agreed_B = torch.rand_like(p_B) * q_B < p_B
    rest_BV = (target_BV - proposal_BV).clamp_(min=0)
    # Where rounding leaves nothing of p - q, the two are equal and the draft was kept.
    rest_BV = torch.where(rest_BV.sum(-1, keepdim=True) > 0, rest_BV, target_BV)
    return Selection(torch.where(agreed_B, drafted_B, _draw(rest_BV)), agreed_B)


def _draw(weights_BV: Tensor) -> Tensor:
    return torch.multinomial(weights_BV, num_samples=1)[:, 0]
