"""Finds the cheapest exit rule that keeps a quality budget on unseen text.

A few *pilot* texts choose candidates and their order; the others test them (:mod:`river_compile.evaluation.risk`), so
the choice does not bias the test. The first candidate is full depth, which loses nothing.
Not handled: prompts that exit (``prefill="exit"``), batches, and texts from another source than the model will see.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from river_compile.config import RiverConfig
from river_compile.errors import BudgetError, OptionError
from river_compile.evaluation.meter import Measured, Meter, Rule, compiled
from river_compile.evaluation.risk import fixed_sequence, texts_needed
from river_compile.exit_rule import Candidate, ExitRule
from river_compile.exits import CRITERIA, Criterion
from river_compile.kernels.checks import Check, integer, number
from river_compile.twins.observe import checked_texts

Tokenizer = Callable[[str], Mapping[str, Sequence[int]]]

_COUNT = integer(1)
_PILOT = 0.2  # share of the texts
_STEP = 0.2  # budgets between candidates that are tested one after another, on the pilot texts
_HOPELESS = 1.2  # budgets on the pilot texts above which no test is worth it
_CLIP = 5  # largest KL of a text, in budgets
_ANY = number("it must be a number")
_CONFIDENCE = Check(
    "it must be a number between 0 and 1, such as 0.9", lambda value: _ANY.allows(value) and 0 < value < 1
)
_ASKED = {
    "kl": Check("it must be a number above 0, in nats per token", lambda v: _ANY.allows(v) and 0 < v < math.inf),
    "agreement": Check("it must be a number between 0 and 1", lambda v: _ANY.allows(v) and 0 < v < 1),
}
_FIRST_EXITS = 5
_SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of the tokens that a threshold lets leave


def tune_exit(
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
) -> ExitRule:
    """Tune the exit threshold and first exit depth: the fastest rule whose loss keeps a budget on unseen text.

        rule = river_compile.tune_exit(model, tokenizer, texts, kl=0.1)
        river_compile.accelerate(model, calibration=rule)

    The loss of a text is its mean over tokens. The guarantee is about the clipped loss, since KL has no largest value;
    the unclipped one is reported too. A tight budget gives a slower rule, at worst full depth.

    Args:
        model: a causal language model in eval mode. It is compiled during the call and left as it was; its twins stay,
            which makes the next start faster.
        tokenizer: maps a text to ``{"input_ids": [...]}``.
        texts: independent of each other and like those that the model will see. Those shorter than `context` +
            `tokens` tokens are skipped.
        budget: ``{"kl": 0.05}``: largest mean KL from full depth, in nats per token; or ``{"agreement": 0.98}``: least
            share of tokens whose most likely successor is full depth's.
        kl: short for ``budget={"kl": kl}``.
        agreement: short for ``budget={"agreement": agreement}``.
        criterion: exit criterion, "similarity" or "confidence".
        confidence: probability, over the draw of the texts, that the budget holds.
        options: of the backend, but those that are tuned.
        context: tokens of a text that run as its prompt.
        tokens: tokens of a text that are decoded and measured.
        clip: largest loss that a text counts with; by default five budgets for KL and 1 for agreement.
        seed: shuffles the texts.
        progress: whether to show a progress bar.

    Returns:
        The rule, for ``accelerate(model, calibration=rule)``.

    Raises:
        BudgetError: (a ``ValueError``) there are too few texts to guarantee the budget for any rule.
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
    return ExitRule(
        metric=goal.metric,
        budget=goal.asked,
        confidence=goal.confidence,
        clip=goal.clip,
        num_blocks=meter.num_blocks,
        seconds_full_depth=meter.seconds_full_depth,
        chosen=min(results[:passed], key=lambda c: c.cost),
        candidates=tuple(known.values()),
        base_options=base,
    )


def _tested(
    meter: Meter, order: Sequence[Candidate], held_out: Sequence[int], goal: Budget
) -> tuple[list[Measured], int]:
    """Test full depth, then candidates until one fails; return all measurements, and how many passed."""
    tested: list[Measured] = []

    def losses() -> Iterator[list[float]]:
        for rule in (None, *(candidate.rule for candidate in order)):
            title = "testing the budget"
            tested.append(meter.full_depth(held_out) if rule is None else meter.measure(rule, held_out, title))
            yield goal.shares(tested[-1])

    return tested, fixed_sequence(losses(), goal.share, goal.confidence)


def _checked(given: Mapping[str, object], criterion: str) -> tuple[dict[str, object], RiverConfig]:
    """Return the options that all rules share, and those to compile with."""
    if not isinstance(given, Mapping):
        raise OptionError(f"options={given!r} is not allowed; it must be a dict of the backend's options")
    for name in ("exit_depth", "threshold", "first_exit"):
        if name in given:
            raise OptionError(f"{name}={given[name]!r} is set by tune_exit. Remove it from options=", id="RC003")
    if "criterion" in given:
        raise OptionError(f"Pass criterion={given['criterion']!r} to tune_exit itself, not in options=", id="RC003")
    base = {**given, "criterion": criterion}
    config = RiverConfig.from_options({**base, "first_exit": 1})
    if config.deepest is not None:
        raise OptionError(
            "tune_exit compares with full depth, and offload_policy='exit' lets no token go further than layer "
            f"{config.deepest}. Use offload_policy='fetch'",
            id="RC003",
        )
    return base, config


def _samples(tokenizer: Tokenizer, texts: Sequence[str], length: int, seed: int) -> list[Tensor]:
    """Return the first `length` ids ``[1, length]`` of each text that has as many, shuffled."""
    if not callable(tokenizer):
        raise OptionError(f"tokenizer={tokenizer!r} is not allowed; it must map a text to its input_ids")
    ids = [list(tokenizer(text)["input_ids"])[:length] for text in checked_texts(texts)]
    samples = [torch.tensor([row]) for row in ids if len(row) == length]
    random.Random(seed).shuffle(samples)
    return samples


def _candidate(meter: Meter, measured: Measured, goal: Budget) -> Candidate:
    """Average a measurement over texts; its cost is by all steps timed so far."""
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
    """Order the candidates worth a test, from the safest to the cheapest: each is cheaper than all with less loss."""
    frontier: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.loss, c.cost)):
        if candidate.loss <= _HOPELESS * goal.limit and candidate.cost < (frontier[-1].cost if frontier else 1):
            frontier.append(candidate)
    order = frontier[:1]
    for candidate in frontier[1:]:
        if candidate is frontier[-1] or candidate.loss >= order[-1].loss + _STEP * goal.limit:
            order.append(candidate)
    return order


@dataclass(frozen=True)
class Budget:
    """A limit on the mean loss of a text."""

    metric: str  # "kl" or "agreement"
    asked: float  # as it was given
    limit: float  # of the mean loss
    clip: float  # largest loss that a text counts with
    confidence: float  # probability, over the draw of the texts, that it holds

    @classmethod
    def of(
        cls,
        budget: Mapping[str, float] | None,
        kl: float | None,
        agreement: float | None,
        confidence: float,
        clip: float | None,
    ) -> Budget:
        """Return the one budget that was given, in either form; raise an OptionError for none, two or a bad one."""
        short = {name: value for name, value in (("kl", kl), ("agreement", agreement)) if value is not None}
        if (budget is not None) + len(short) != 1:
            given = short if budget is None else {"budget": budget, **short}
            raise OptionError(
                f"tune_exit requires one budget, got {given or 'none'}. Give kl=0.05 or agreement=0.98, for example"
            )
        budget = short if budget is None else budget
        if not isinstance(budget, Mapping) or len(budget) != 1 or not set(budget) <= _ASKED.keys():
            raise OptionError(f'budget={budget!r} is not allowed; give {{"kl": 0.05}} or {{"agreement": 0.98}}')
        confidence = _CONFIDENCE("confidence", confidence, OptionError)
        ((metric, asked),) = budget.items()
        asked = _ASKED[metric](metric, asked, OptionError)
        limit = asked if metric == "kl" else 1 - asked
        clip = clip if clip is not None else (_CLIP * limit if metric == "kl" else 1.0)
        above = f"it must be a number above the budget, {limit:.4g}"
        clip = Check(above, lambda value: _ANY.allows(value) and limit < value < math.inf)("clip", clip, OptionError)
        return cls(metric, asked, limit, clip, confidence)

    def check_texts(self, count: int) -> None:
        """Raise a BudgetError if so few texts could not pass even without any loss."""
        needed = texts_needed(self.share, self.confidence)
        if count < needed:
            raise BudgetError(
                f"{self.metric}={self.asked} with confidence {self.confidence:.0%} takes at least {needed} texts to "
                f"test, and a quarter of that to choose candidates. Only {count} are left. Give more texts "
                "that are long enough, a lower confidence, or an easier budget"
            )

    @property
    def share(self) -> float:
        """The limit, as a share of the clip."""
        return self.limit / self.clip

    def shares(self, measured: Measured) -> list[float]:
        """Return each text's loss, as a share of the clip."""
        return [min(max(loss, 0.0), self.clip) / self.clip for loss in measured.text_losses(self.metric)]


def candidate_rules(meter: Meter, criterion: Criterion, texts: Sequence[int], every: int) -> list[Measured]:
    """Return rules that spread over costs, as measured on the pilot texts.

    "similarity" decides block by block, so each rule is decoded. "confidence" knows an entropy per token beforehand:
    one run in which every token exits predicts all thresholds, with slightly too much loss.
    """
    if criterion.reads == "block":
        return [meter.measure(rule, texts, "pilot texts") for rule in _score_rules(meter, criterion, texts, every)]
    found = []
    for first_exit in sorted(depth for depth in {0, 2, meter.num_blocks // 4} if depth < meter.num_blocks):
        runs = [meter.run(i, (criterion.always, first_exit)) for i in texts]
        all_left = meter.measured((criterion.always, first_exit), texts, runs)
        entropies = [[step.entropy for step in run.steps if step.entropy is not None] for run in runs]
        found += [all_left, *_at_thresholds(all_left, entropies, meter.num_blocks)]
    return found


def _score_rules(meter: Meter, criterion: Criterion, texts: Sequence[int], every: int) -> list[Rule]:
    """Return three rules for each of some first exits: always, above the median there, above each depth's median."""
    depths = range(1, meter.num_blocks, every)
    picked = {depths[round(i * (len(depths) - 1) / (_FIRST_EXITS - 1))] for i in range(_FIRST_EXITS)}
    steps = [step for i in texts for step in meter.references[i].steps]
    medians = [statistics.median(step.scores[column] for step in steps) for column in range(len(depths))]
    by_depth = [criterion.never] * depths[-1]  # without a check nothing is compared
    for depth, median in zip(depths, medians, strict=True):
        by_depth[depth - 1] = median
    rules: list[Rule] = []
    for first_exit in sorted(picked):
        rules += [(criterion.always, first_exit), (medians[depths.index(first_exit)], first_exit)]
        if first_exit < depths[-1]:
            rules.append((tuple(by_depth), first_exit))
    return rules


def _at_thresholds(all_left: Measured, entropies: Sequence[Sequence[float]], num_blocks: int) -> list[Measured]:
    """Predict rules with lower thresholds from runs in which every token exited."""
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
    """Return the losses by text and token, 0 for tokens that stay."""
    return [
        [loss if left else 0.0 for left, loss in zip(*text, strict=True)] for text in zip(leaves, losses, strict=True)
    ]
