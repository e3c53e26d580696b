"""Chooses the exit rules that calibration considers, by the pilot texts.

"similarity" decides block by block, so each rule is decoded. "confidence" has one exit and a number for each token
beforehand: one run in which every token leaves gives, for every threshold at once, which tokens would have
left and what they lost (slightly too much: the cache holds no exact entries of tokens that a rule would have kept).
What is promised is decoded again on other texts in any case.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from river_compile.calibration.evaluate import Measured, Meter, Rule
from river_compile.exits import Criterion

_FIRST_EXITS = 5
_SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of the tokens that a threshold lets leave


def candidate_rules(meter: Meter, criterion: Criterion, texts: Sequence[int], every: int) -> list[Measured]:
    """Returns rules that spread over costs, each with what it does to the pilot texts."""
    if criterion.reads == "block":
        return [meter.measure(rule, texts, "pilot texts") for rule in _score_rules(meter, criterion, texts, every)]
    found = []
    # With one exit there are none, few, or a quarter of the blocks before the river.
    for first_exit in sorted(depth for depth in {0, 2, meter.num_blocks // 4} if depth < meter.num_blocks):
        runs = [meter.run(i, (criterion.always, first_exit)) for i in texts]
        all_left = meter.measured((criterion.always, first_exit), texts, runs)
        entropies = [[step.entropy for step in run.steps if step.entropy is not None] for run in runs]
        found += [all_left, *_at_thresholds(all_left, entropies, meter.num_blocks)]
    return found


def _score_rules(meter: Meter, criterion: Criterion, texts: Sequence[int], every: int) -> list[Rule]:
    """Returns three rules for first exits up to the last block but one.

    Leave at once; if more similar than most tokens are at the first exit; if more so than most are at the same depth.
    """
    depths = range(1, meter.num_blocks, every)
    picked = {depths[round(i * (len(depths) - 1) / (_FIRST_EXITS - 1))] for i in range(_FIRST_EXITS)}
    steps = [step for i in texts for step in meter.references[i].steps]
    medians = [statistics.median(step.similarities[column] for step in steps) for column in range(len(depths))]
    by_depth = [criterion.never] * depths[-1]  # (where no check stands, nothing is compared)
    for depth, median in zip(depths, medians, strict=True):
        by_depth[depth - 1] = median
    rules: list[Rule] = []
    for first_exit in sorted(picked):
        rules += [(criterion.always, first_exit), (medians[depths.index(first_exit)], first_exit)]
        if first_exit < depths[-1]:
            rules.append((tuple(by_depth), first_exit))
    return rules


def _at_thresholds(all_left: Measured, entropies: Sequence[Sequence[float]], num_blocks: int) -> list[Measured]:
    """Predicts rules with lower thresholds from a run in which every token left."""
    first_exit = all_left.rule[1]
    ordered = sorted(entropy for text in entropies for entropy in text)
    found = []
    for threshold in dict.fromkeys(ordered[int(share * len(ordered))] for share in _SHARES):
        leaves = [[entropy < threshold for entropy in text] for text in entropies]
        kl, disagreement = _where(leaves, all_left.kl), _where(leaves, all_left.disagreement)
        depths = [first_exit if left else num_blocks for text in leaves for left in text]
        found.append(Measured((threshold, first_exit), kl, disagreement, depths))
    return found


def _where(leaves: Sequence[Sequence[bool]], losses: Sequence[Sequence[float]]) -> list[list[float]]:
    """Returns the losses, by text and token, 0 for tokens that stay."""
    return [
        [loss if left else 0.0 for left, loss in zip(*text, strict=True)] for text in zip(leaves, losses, strict=True)
    ]
