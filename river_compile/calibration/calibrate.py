"""Finds the exit rule of least cost that keeps a promised quality on unseen text.

``calibrate(model, tokenizer, texts, kl=0.05)`` decodes a stretch of each text token by token, once with never exit and
once with each candidate rule (:mod:`river_compile.calibration.evaluate`). A few *pilot* texts choose candidates and the
order in which they are tested; the others test them (:mod:`river_compile.calibration.risk`), so that the promise does
not suffer from the choice. The first candidate is never exit, which loses nothing: a tight budget gives a slower rule.

The loss of a text is the mean over its tokens. KL has no largest value, and a promise without assumptions needs one: a
text counts with at most ``clip`` nats. The promise is about that clipped mean; the unclipped one is reported beside it.

Not handled: prompts that exit (``prefill="exit"``), batches, and texts from another source than the model will see.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from river_compile.calibration.budget import Budget
from river_compile.calibration.candidates import candidate_rules
from river_compile.calibration.evaluate import Measured, Meter, compiled
from river_compile.calibration.result import Calibration, Candidate
from river_compile.calibration.risk import fixed_sequence
from river_compile.config import RiverConfig
from river_compile.errors import OptionError
from river_compile.exits import CRITERIA
from river_compile.kernels.checks import integer
from river_compile.twins.observe import checked_texts

Tokenizer = Callable[[str], Mapping[str, Sequence[int]]]

_COUNT = integer(1)
_PILOT = 0.2
_STEP = 0.2  # candidates tested one after another differ by that many budgets on the pilot texts
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
        BudgetError: (a ``ValueError``) the texts are too few to promise the budget of any rule.
        OptionError: (a ``ValueError``) a bad budget or option.
    """
    context, tokens = _COUNT("context", context, OptionError), _COUNT("tokens", tokens, OptionError)
    goal = Budget.of(budget, kl, agreement, confidence, clip)
    base, config = _checked({} if options is None else options, criterion)
    rule = CRITERIA[criterion]
    samples = _samples(tokenizer, texts, context + tokens, seed)
    pilot_size = math.ceil(_PILOT * len(samples))
    goal.check_texts(len(samples) - pilot_size)
    with compiled(model, {**base, "first_exit": 1, "threshold": rule.never}), torch.inference_mode():
        meter = Meter(model, rule, samples, context, progress)
        pilot, held_out = range(pilot_size), range(pilot_size, len(samples))
        looked_at = candidate_rules(meter, rule, pilot, config.exit_every)
        order = _order([_candidate(meter, m, goal) for m in looked_at], goal)
        tested, passed = _tested(meter, order, held_out, goal)
    results = [replace(_candidate(meter, m, goal), passed=i < passed) for i, m in enumerate(tested)]
    known = {c.rule: c for c in [*(_candidate(meter, m, goal) for m in looked_at), *results]}
    return Calibration(
        metric=goal.metric,
        budget=goal.asked,
        confidence=goal.confidence,
        clip=goal.clip,
        num_blocks=meter.num_blocks,
        seconds_never=meter.seconds_never,
        chosen=min(results[:passed], key=lambda c: c.cost),
        candidates=tuple(known.values()),
        base_options=base,
    )


def _tested(
    meter: Meter, order: Sequence[Candidate], held_out: Sequence[int], goal: Budget
) -> tuple[list[Measured], int]:
    """Tests never exit, which passes with enough texts, and then candidates one after another until one fails.

    Returns:
        What was measured of those that were tested, and how many of them passed.
    """
    tested: list[Measured] = []

    def losses() -> Iterator[list[float]]:
        for rule in (None, *(candidate.rule for candidate in order)):
            title = "testing the budget"
            tested.append(meter.never(held_out) if rule is None else meter.measure(rule, held_out, title))
            yield goal.shares(tested[-1])

    return tested, fixed_sequence(losses(), goal.share, goal.confidence)


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


def _samples(tokenizer: Tokenizer, texts: Sequence[str], length: int, seed: int) -> list[Tensor]:
    """Returns the first `length` ids ``[1, length]`` of every text that has as many, in a shuffled order."""
    if not callable(tokenizer):
        raise OptionError(f"tokenizer={tokenizer!r} is not allowed; it must map a text to its input_ids")
    ids = [list(tokenizer(text)["input_ids"])[:length] for text in checked_texts(texts)]
    samples = [torch.tensor([row]) for row in ids if len(row) == length]
    random.Random(seed).shuffle(samples)
    return samples


def _candidate(meter: Meter, measured: Measured, goal: Budget) -> Candidate:
    """Returns the means over texts, with the cost by all steps timed so far."""
    return Candidate(
        *measured.rule,
        kl=statistics.fmean(measured.text_losses("kl")),
        agreement=1 - statistics.fmean(measured.text_losses("agreement")),
        loss=statistics.fmean(goal.shares(measured)) * goal.clip,
        mean_depth=measured.mean_depth,
        cost=meter.cost(measured),
        texts=len(measured.kl),
    )


def _order(candidates: Sequence[Candidate], goal: Budget) -> list[Candidate]:
    """Orders those worth a test from the safest to the cheapest, in steps of a share of the budget.

    Only those that are cheaper than every one with less loss are worth it.

    Args:
        candidates: rules that exit, as measured on the pilot texts.
        goal: the budget.
    """
    frontier: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.loss, c.cost)):
        if candidate.loss <= _HOPELESS * goal.limit and candidate.cost < (frontier[-1].cost if frontier else 1):
            frontier.append(candidate)
    order = frontier[:1]
    for candidate in frontier[1:]:
        if candidate is frontier[-1] or candidate.loss >= order[-1].loss + _STEP * goal.limit:
            order.append(candidate)
    return order
