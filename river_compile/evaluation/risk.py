"""Bounds the mean loss on unseen texts by losses measured on some texts.

"Learn then Test" (Angelopoulos et al. 2021, arXiv 2110.01052): with probability of at least the confidence, no
candidate that passes has a mean loss above the budget. Losses lie in [0, 1], and texts are independent draws.
Not handled: texts from another source than the measured ones, and losses that depend on each other.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence

# Shares of the largest bet that can lose everything; their wealths are averaged, which keeps the test valid.
_BETS = (0.1, 0.3, 0.5, 0.7, 0.9)


def p_value(losses: Sequence[float], budget: float) -> float:
    """Return a p-value for "the mean loss is at least `budget`": small if the losses speak against it.

    A betting p-value (Waudby-Smith and Ramdas 2024, arXiv 2010.09686), sharper than Hoeffding-Bentkus for losses that
    vary little. A gambler who bets a share c of the most he may on every loss being below the budget multiplies his
    wealth by ``1 + c (budget - loss) / (1 - budget)`` each time. If the mean loss is at least `budget`, his expected
    wealth is at most 1, so by Markov's inequality a wealth of W has a probability of at most 1 / W.

    Args:
        losses: independent draws from [0, 1].
        budget: from 0 to below 1.

    Raises:
        ValueError: a loss outside [0, 1] or a budget outside [0, 1).
    """
    if not 0 <= budget < 1:
        raise ValueError(f"budget={budget} is not allowed; as a share of the largest loss it must be in [0, 1)")
    for loss in losses:
        if not 0 <= loss <= 1:
            raise ValueError(f"a loss of {loss} lies outside [0, 1]; clip the losses and divide by the clip")
    edges = [(budget - loss) / (1 - budget) for loss in losses]
    wealths = [math.fsum(math.log1p(bet * edge) for edge in edges) for bet in _BETS]
    most = max(wealths)
    log_wealth = most + math.log(math.fsum(math.exp(w - most) for w in wealths) / len(_BETS))
    return min(1.0, math.exp(-log_wealth))


def texts_needed(budget: float, confidence: float) -> int:
    """Return how many texts it takes to pass a budget (in (0, 1)) when not one of them has any loss."""

    def passes(texts: int) -> bool:
        return p_value([0.0] * texts, budget) <= 1 - confidence

    enough = 1
    while not passes(enough):
        enough *= 2
    return 1 + bisect_left(range(1, enough), True, key=passes)


def fixed_sequence(losses: Iterable[Sequence[float]], budget: float, confidence: float) -> int:
    """Test candidates in the given order until one fails; return how many passed.

    Args:
        losses: each candidate's losses, in an order that must not depend on them; taken only as far as needed.
        budget: what the mean loss may be.
        confidence: probability, over the draw of the texts, that no candidate which passes is above the budget.
    """
    passed = 0
    for sample in losses:
        if p_value(sample, budget) > 1 - confidence:
            break
        passed += 1
    return passed
