"""Finds the exit rule of least cost that keeps a promised quality on unseen text.

``calibrate(model, tokenizer, texts, kl=0.05)`` decodes a stretch of each text token by token, once with never exit and
once with each candidate rule (:mod:`river_compile.calibration.evaluate`). A few *pilot* texts choose candidates and the
order in which they are tested; the others test them (:mod:`river_compile.calibration.risk`), so that the promise does
not suffer from the choice.

The loss of a text is the mean over its tokens. KL has no largest value, and a promise without assumptions needs one: a
text counts with at most ``clip`` nats. The promise is about that clipped mean; the unclipped one is reported beside it.

Not handled: prompts that exit (``prefill="exit"``), batches, and texts from another source than the model will see.
"""

from __future__ import annotations

import math
import random
import statistics
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from river_compile.config import RiverConfig
from river_compile.errors import BudgetError, OptionError
from river_compile.exits import CRITERIA, threshold_text
from river_compile.kernels.checks import Check, integer, number
from river_compile.twins.observe import checked_texts

from .candidates import candidate_rules
from .evaluate import Measured, Meter, compiled
from .result import Calibration, Candidate
from .risk import fixed_sequence, p_value, texts_needed, upper_bound

Tokenizer = Callable[[str], Mapping[str, Sequence[int]]]

_COUNT, _ANY = integer(1), number("it must be a number")
_CONFIDENCE = Check(
    "it must be a number between 0 and 1, such as 0.9", lambda value: _ANY.fits(value) and 0 < value < 1
)
_BUDGETS = {
    "kl": Check("it must be a number above 0, in nats per token", lambda v: _ANY.fits(v) and 0 < v < math.inf),
    "agreement": Check("it must be a number between 0 and 1", lambda v: _ANY.fits(v) and 0 < v < 1),
}
_CLIP = 5  # largest KL of a text, in budgets
_PILOT = 0.2
_EASY = 0.2  # a test is easy where the pilot texts, taken as often, give a p-value that far below what is needed
_STEP = 0.2  # candidates tested one after another differ by that many budgets on the pilot texts
_FINE, _POWERS = 1.001, 30_000  # budgets that a rule could pass are tried in steps of a thousandth, up to 10^13 times
_HOPELESS = 1.2  # a candidate above that many budgets on the pilot texts is not worth a test


def calibrate(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    budget: Mapping[str, float] | None = None,
    *,
    kl: float | None = None,
    agreement: float | None = None,
    criterion: str = "confidence",
    confidence: float = 0.9,
    options: Mapping[str, object] | None = None,
    context: int = 16,
    tokens: int = 16,
    clip: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Calibration:
    """Finds threshold (for some criteria one for each depth) and first exit that meet a budget at the least cost.

    Args:
        model: a causal language model in eval mode. It is compiled for the time of the call and left as it was; its
            packed twins stay, so that compiling it afterwards is quicker.
        tokenizer: maps a text to ``{"input_ids": [...]}``.
        texts: independent of each other and like those that the model will see. Those shorter than `context` +
            `tokens` tokens are left out.
        budget: ``{"kl": 0.05}``, the most nats per token from never exit, or ``{"agreement": 0.98}``, the least share
            of tokens whose most likely successor is never exit's.
        kl, agreement: the same, shorter: one of the two in place of `budget`.
        criterion: which exit criterion the rules use, see :mod:`river_compile.exits`.
        confidence: probability, over the draw of the texts, that the promise holds.
        options: of the backend, all but those that calibration finds.
        context: tokens of a text that run as its prompt.
        tokens: tokens of a text that are decoded and measured.
        clip: largest loss that a text counts with; by default five budgets for KL and 1 for agreement.
        seed: shuffles the texts.
        progress: whether to show a progress bar.

    Raises:
        BudgetError: (a ``ValueError``) the budget cannot be promised; the message says what can.
        OptionError: (a ``ValueError``) a bad budget or option.
    """
    context, tokens = _COUNT("context", context, OptionError), _COUNT("tokens", tokens, OptionError)
    goal = _goal(budget, kl, agreement, confidence, clip)
    base, config = _checked({} if options is None else options, criterion)
    rule = CRITERIA[criterion]
    samples = _samples(tokenizer, texts, context + tokens, seed)
    pilot_size = math.ceil(_PILOT * len(samples))
    goal.check_texts(len(samples) - pilot_size)
    with compiled(model, {**base, "first_exit": 1, "threshold": rule.never}), torch.inference_mode():
        meter = Meter(model, rule, samples, context, progress)
        pilot, held_out = range(pilot_size), range(pilot_size, len(samples))
        looked_at = candidate_rules(meter, rule, pilot, config.exit_every)
        order = _order([(_candidate(meter, m, goal), goal.is_easy(m, len(held_out))) for m in looked_at], goal)
        tested, passed = _tested(meter, order, held_out, goal)
    results = [replace(_candidate(meter, m, goal), passed=i < passed) for i, m in enumerate(tested)]
    if not passed:
        raise BudgetError(_cannot(goal, results, tested))
    known = {c.rule: c for c in [*(_candidate(meter, m, goal) for m in looked_at), *results]}
    return Calibration(
        metric=goal.metric,
        budget=goal.asked,
        confidence=confidence,
        clip=goal.clip,
        num_blocks=meter.num_blocks,
        seconds_never=meter.seconds_never,
        chosen=min(results[:passed], key=lambda c: c.cost),
        candidates=tuple(known.values()),
        base_options=base,
    )


def _tested(
    meter: Meter, order: Sequence[Candidate], held_out: Sequence[int], goal: _Goal
) -> tuple[list[Measured], int]:
    """Tests candidates one after another until one fails; returns what was measured, and how many of them passed."""
    tested: list[Measured] = []

    def losses() -> Iterator[list[float]]:
        for candidate in order:
            tested.append(meter.measure(candidate.rule, held_out, "testing the budget"))
            yield goal.shares(tested[-1])

    return tested, fixed_sequence(losses(), goal.limit / goal.clip, goal.confidence)


def _checked(given: Mapping[str, object], criterion: str) -> tuple[dict[str, object], RiverConfig]:
    """Returns the options that the rules share, and those that calibration compiles with first."""
    if not isinstance(given, Mapping):
        raise OptionError(f"options={given!r} is not allowed; it must be a dict of the backend's options")
    for name in ("exit_depth", "threshold", "first_exit"):
        if name in given:
            raise OptionError(f"{name}={given[name]!r} is what calibration finds; leave it out of options=")
    if "criterion" in given:
        raise OptionError(f"give criterion={given['criterion']!r} to calibrate itself, not in options=")
    base = {**given, "criterion": criterion}
    config = RiverConfig.from_options({**base, "first_exit": 1})
    if config.deepest is not None:
        raise OptionError(
            f"offload={config.offload} with offload_policy='exit' lets no token through the whole backbone, which "
            "calibration compares with; use offload_policy='fetch', or leave offload out until it is done"
        )
    return base, config


@dataclass(frozen=True)
class _Goal:
    """A budget as a limit on a loss: KL, or disagreement."""

    metric: str
    asked: float
    limit: float
    clip: float
    confidence: float

    def check_texts(self, count: int) -> None:
        needed = texts_needed(self.limit / self.clip, self.confidence)
        if count < needed:
            raise BudgetError(
                f"{self.metric}={self.asked} with confidence {self.confidence:.0%} takes at least {needed} texts to "
                f"test (and a quarter of that to choose candidates), even if River made no error; {count} are left for "
                "the test. Give more texts that are long enough, a lower confidence, or an easier budget"
            )

    def shares(self, measured: Measured) -> list[float]:
        """Returns each text's loss as a share of the clip."""
        return [min(max(loss, 0.0), self.clip) / self.clip for loss in measured.text_losses(self.metric)]

    def is_easy(self, measured: Measured, texts: int) -> bool:
        """Tells whether that many texts like the measured ones would pass, with room to spare."""
        shares = self.shares(measured)
        copies = [shares[i % len(shares)] for i in range(texts)]
        return p_value(copies, self.limit / self.clip) <= _EASY * (1 - self.confidence)


def _goal(
    budget: Mapping[str, float] | None,
    kl: float | None,
    agreement: float | None,
    confidence: float,
    clip: float | None,
) -> _Goal:
    """Returns the one budget that was given, in whichever form."""
    short = {name: value for name, value in (("kl", kl), ("agreement", agreement)) if value is not None}
    if (budget is not None) + len(short) != 1:
        given = short if budget is None else {"budget": budget, **short}
        raise OptionError(f"one budget is needed, such as kl=0.05 or agreement=0.98; given: {given or 'none'}")
    budget = short if budget is None else budget
    if not isinstance(budget, Mapping) or len(budget) != 1 or not set(budget) <= {"kl", "agreement"}:
        raise OptionError(f'budget={budget!r} is not allowed; give {{"kl": 0.05}} or {{"agreement": 0.98}}')
    confidence = _CONFIDENCE("confidence", confidence, OptionError)
    ((metric, asked),) = budget.items()
    asked = _BUDGETS[metric](metric, asked, OptionError)
    limit = asked if metric == "kl" else 1 - asked
    clip = clip if clip is not None else (_CLIP * limit if metric == "kl" else 1.0)
    above = f"it must be a number above the loss that is promised, {limit:.4g}"
    clip = Check(above, lambda value: _ANY.fits(value) and limit < value < math.inf)("clip", clip, OptionError)
    return _Goal(metric, asked, limit, clip, confidence)


def _samples(tokenizer: Tokenizer, texts: Sequence[str], length: int, seed: int) -> list[Tensor]:
    """Returns the first `length` ids ``[1, length]`` of every text that has as many, in a shuffled order."""
    if not callable(tokenizer):
        raise OptionError(f"tokenizer={tokenizer!r} is not allowed; it must map a text to its input_ids")
    ids = [list(tokenizer(text)["input_ids"])[:length] for text in checked_texts(texts)]
    samples = [torch.tensor([row]) for row in ids if len(row) == length]
    random.Random(seed).shuffle(samples)
    return samples


def _candidate(meter: Meter, measured: Measured, goal: _Goal) -> Candidate:
    """Returns the means over texts, with the cost by all steps timed so far."""
    return Candidate(
        *measured.rule,
        kl=statistics.fmean(measured.text_losses("kl")),
        agreement=1 - statistics.fmean(measured.text_losses("agreement")),
        loss=statistics.fmean(goal.shares(measured)) * goal.clip,
        mean_depth=measured.mean_depth,
        doubted=measured.doubted,
        cost=meter.cost(measured),
        texts=len(measured.kl),
    )


def _order(candidates: Sequence[tuple[Candidate, bool]], goal: _Goal) -> list[Candidate]:
    """Orders those worth a test from the safest to the cheapest.

    Only those that are cheaper than every one with less loss are worth it. It begins with the cheapest that should pass
    with ease, so that a test is not spent on what is safer than needed, and goes on in steps of a share of the budget.

    Args:
        candidates: as measured on the pilot texts, each with whether it should pass with ease.
        goal: the budget.
    """
    frontier: list[Candidate] = []
    start = 0
    for candidate, easy in sorted(candidates, key=lambda c: (c[0].loss, c[0].cost)):
        if not frontier or candidate.cost < frontier[-1].cost:
            frontier.append(candidate)
            start = len(frontier) - 1 if easy else start
    order = [frontier[start]]
    hopeful = [c for c in frontier[start + 1 :] if c.loss <= _HOPELESS * goal.limit]
    for candidate in hopeful:
        if candidate is hopeful[-1] or candidate.loss >= order[-1].loss + _STEP * goal.limit:
            order.append(candidate)
    return order


def _cannot(goal: _Goal, results: Sequence[Candidate], tested: Sequence[Measured]) -> str:
    best, can = results[0], _borne_out(goal, tested[0])
    return (
        f"{goal.metric}={goal.asked} cannot be promised with confidence {goal.confidence:.0%}: the safest rule tested "
        f"(threshold={threshold_text(best.threshold)}, first_exit={best.first_exit}) has KL {best.kl:.4g} and "
        f"agreement {best.agreement:.4g} on {best.texts} texts, which bear out {goal.metric}={can:.4g}. Ask for that "
        "or give more texts"
    )


def _borne_out(goal: _Goal, measured: Measured) -> float:
    """Returns the budget, in the goal's metric, that a rule's losses pass; KL's clip grows with it."""
    if goal.metric == "agreement":
        return 1 - upper_bound(goal.shares(measured), goal.confidence) * goal.clip

    def passes(power: int) -> bool:
        shares = replace(goal, clip=goal.clip * _FINE**power).shares(measured)
        return p_value(shares, goal.limit / goal.clip) <= 1 - goal.confidence

    return goal.limit * _FINE ** bisect_left(range(_POWERS), True, key=passes)
