"""Finds the exit rule of least cost that keeps a promised quality on unseen text.

``calibrate(model, tokenizer, texts, budget={"kl": 0.05})`` decodes a stretch of each text token by token, once with
never exit and once with each candidate rule, the text itself being fed both times. So a candidate's KV cache holds what
its own earlier exits left there, as in generation. A few *pilot* texts choose candidates and the order in which they
are tested; the others test them (:mod:`river_compile.risk`), so that the promise does not suffer from the choice.

The loss of a text is the mean over its tokens. KL has no largest value, and a promise without assumptions needs one: a
text counts with at most ``clip`` nats. The promise is about that clipped mean; the unclipped one is reported beside it.

Cost is the time of a decode step, linear in the exit depth between two medians: of never exit's steps and of those with
the least depth seen.

Not handled: criteria other than similarity, thresholds for single blocks, prompts that exit (``prefill="exit"``),
batches, and texts drawn otherwise than those that the model will see.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, StaticCache

from .backend import river
from .calibration import Calibration, Candidate
from .config import RiverConfig
from .errors import BudgetError, OptionError
from .risk import fixed_sequence, p_value, texts_needed, upper_bound
from .runtime import forced_threshold
from .stats import trace

NEVER = 2.0  # no cosine exceeds it
AT_ONCE = -2.0  # every cosine exceeds it
_CLIP = 5  # largest KL of a text, in budgets
_PILOT = 0.2
_FIRST_EXITS = 5
_HOPELESS = 1.2  # a candidate above that many budgets on the pilot texts is not worth a test


def calibrate(
    model: PreTrainedModel,
    tokenizer: Callable[[str], Mapping[str, Sequence[int]]],
    texts: Sequence[str],
    budget: Mapping[str, float],
    *,
    confidence: float = 0.9,
    options: Mapping[str, object] | None = None,
    context: int = 16,
    tokens: int = 16,
    clip: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Calibration:
    """Finds threshold and first exit that meet a budget at the least expected cost.

    Args:
        model: a causal language model in eval mode. It is compiled for the time of the call and left as it was; its
            packed twins stay, so that compiling it afterwards is quicker.
        tokenizer: maps a text to ``{"input_ids": [...]}``.
        texts: independent of each other and like those that the model will see. Those shorter than `context` +
            `tokens` tokens are left out.
        budget: ``{"kl": 0.05}``, the most nats per token from never exit, or ``{"agreement": 0.98}``, the least share
            of tokens whose most likely successor is never exit's.
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
    goal = _goal(budget, confidence, clip)
    base = dict(options or {})
    for name in ("exit_depth", "threshold", "first_exit"):
        if name in base:
            raise OptionError(f"{name}={base[name]!r} is what calibration finds; leave it out of options=")
    config = RiverConfig.from_options(base)
    samples = _samples(tokenizer, texts, context + tokens, seed)
    pilot_size = math.ceil(_PILOT * len(samples))
    goal.check_texts(len(samples) - pilot_size)
    with _compiled(model, {**base, "first_exit": 1, "threshold": NEVER}), torch.inference_mode():
        meter = _Meter(model, samples, context, goal, progress)
        pilot, held_out = range(pilot_size), range(pilot_size, len(samples))
        rules = _rules(meter, pilot, config.exit_every)
        looked_at = [meter.measure(rule, pilot, "pilot texts") for rule in rules]
        order = _order([meter.candidate(m) for m in looked_at], goal)
        tested: list[_Measured] = []

        def losses() -> Iterator[list[float]]:
            for candidate in order:
                rule = (candidate.threshold, candidate.first_exit)
                tested.append(meter.measure(rule, held_out, "testing the budget"))
                yield tested[-1].shares(goal)

        passed = fixed_sequence(losses(), goal.limit / goal.clip, confidence)
    results = [replace(meter.candidate(m), passed=i < passed) for i, m in enumerate(tested)]
    if not passed:
        raise BudgetError(_cannot(goal, results, tested))
    known = {(c.threshold, c.first_exit): c for c in [*map(meter.candidate, looked_at), *results]}
    chosen = min(results[:passed], key=lambda c: c.cost)
    return Calibration(
        goal.metric, goal.asked, confidence, goal.clip, meter.num_blocks, chosen, tuple(known.values()), base
    )


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


def _goal(budget: Mapping[str, float], confidence: float, clip: float | None) -> _Goal:
    if not isinstance(budget, Mapping) or len(budget) != 1 or not set(budget) <= {"kl", "agreement"}:
        raise OptionError(f'budget={budget!r} is not allowed; give {{"kl": 0.05}} or {{"agreement": 0.98}}')
    if not 0 < confidence < 1:
        raise OptionError(f"confidence={confidence!r} is not allowed; it must lie between 0 and 1, such as 0.9")
    ((metric, asked),) = budget.items()
    limit = asked if metric == "kl" else 1 - asked
    if not limit > 0 or (metric == "agreement" and limit >= 1):
        allowed = "above 0, in nats per token" if metric == "kl" else "between 0 and 1"
        raise OptionError(f"budget {metric}={asked!r} is not allowed; it must be {allowed}")
    clip = clip if clip is not None else (_CLIP * limit if metric == "kl" else 1.0)
    if not clip > limit:
        raise OptionError(f"clip={clip!r} is not allowed; it must be above the loss that is promised, {limit:.4g}")
    return _Goal(metric, asked, limit, clip, confidence)


def _samples(tokenizer: Callable, texts: Sequence[str], length: int, seed: int) -> list[Tensor]:
    """Returns the first `length` ids ``[1, length]`` of every text that has as many, in a shuffled order."""
    ids = [list(tokenizer(text)["input_ids"])[:length] for text in texts]
    samples = [torch.tensor([row]) for row in ids if len(row) == length]
    random.Random(seed).shuffle(samples)
    return samples


@contextlib.contextmanager
def _compiled(model: PreTrainedModel, options: dict[str, object]) -> Iterator[None]:
    before = model._compiled_call_impl
    model.compile(backend=river, options=options)
    try:
        yield
    finally:
        model._compiled_call_impl = before


@dataclass(frozen=True)
class _Run:
    """One text decoded with one rule: logits ``[tokens, vocabulary]``, and of each step depth, scores and seconds."""

    logits: Tensor
    depths: tuple[int, ...]
    similarities: tuple[tuple[float, ...], ...]
    seconds: tuple[float, ...]


@dataclass(frozen=True)
class _Measured:
    """A rule on some texts: mean KL and disagreement of each text, and the depths of all steps."""

    rule: tuple[float, int]
    kl: list[float]
    disagreement: list[float]
    depths: list[int]

    def shares(self, goal: _Goal) -> list[float]:
        """Returns each text's loss as a share of the clip."""
        losses = self.kl if goal.metric == "kl" else self.disagreement
        return [min(max(loss, 0.0), goal.clip) / goal.clip for loss in losses]


class _Meter:
    """Decodes texts with exit rules and compares the logits with never exit's."""

    def __init__(
        self, model: PreTrainedModel, samples: Sequence[Tensor], context: int, goal: _Goal, progress: bool
    ) -> None:
        self._model, self._samples, self._context = model, samples, context
        self._goal, self._progress = goal, progress
        config = model.config.get_text_config()
        self._cache = StaticCache(config=config, max_cache_len=samples[0].shape[1])
        parameters = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        self._seconds: dict[int, list[float]] = {}
        for threshold in (NEVER, NEVER, AT_ONCE):  # the first runs pack and compile
            self._decode(samples[0], threshold, 1)
        self.references = [self._run(i, NEVER, 1) for i in self._bar(range(len(samples)), "never exit")]
        self.num_blocks = self.references[0].depths[0]

    def measure(self, rule: tuple[float, int], texts: Sequence[int], title: str) -> _Measured:
        """Decodes texts, given by their index, with (threshold, first exit)."""
        kl, disagreement, depths = [], [], []
        for index in self._bar(texts, title):
            run, reference = self._run(index, *rule), self.references[index]
            kl.append(_mean_kl(reference.logits, run.logits))
            disagreement.append((reference.logits.argmax(-1) != run.logits.argmax(-1)).float().mean().item())
            depths += run.depths
        return _Measured(rule, kl, disagreement, depths)

    def candidate(self, measured: _Measured) -> Candidate:
        """Returns the means over texts, with the cost by all steps timed so far."""
        return Candidate(
            *measured.rule,
            kl=statistics.fmean(measured.kl),
            agreement=1 - statistics.fmean(measured.disagreement),
            loss=statistics.fmean(measured.shares(self._goal)) * self._goal.clip,
            mean_depth=statistics.fmean(measured.depths),
            cost=self._cost(statistics.fmean(measured.depths)),
            texts=len(measured.kl),
        )

    def _cost(self, depth: float) -> float:
        least = min(self._seconds)
        full = statistics.median(self._seconds[self.num_blocks])
        if least == self.num_blocks:
            return 1.0
        shallow = statistics.median(self._seconds[least])
        return (shallow + (full - shallow) * (depth - least) / (self.num_blocks - least)) / full

    def _run(self, index: int, threshold: float, first_exit: int) -> _Run:
        run = self._decode(self._samples[index], threshold, first_exit)
        for depth, seconds in zip(run.depths, run.seconds, strict=True):
            self._seconds.setdefault(depth, []).append(seconds)
        return run

    def _decode(self, ids: Tensor, threshold: float, first_exit: int) -> _Run:
        """Runs the context as a prompt, then feeds the rest of the text token by token."""
        ids = ids.to(self._model.device)
        self._cache.reset()
        self._step(ids, 0, self._context)
        logits, seconds = [], []
        with forced_threshold(threshold, first_exit), trace() as seen:
            for position in range(self._context, ids.shape[1]):
                start = time.perf_counter()
                logits.append(self._step(ids, position, position + 1))
                seconds.append(time.perf_counter() - start)
        steps = [step for step in seen.tokens if step.thread == threading.get_ident()]
        if len(steps) != len(seconds):
            raise RuntimeError(
                f"{len(steps)} of {len(seconds)} steps ran through River; river_compile.report(model) says why"
            )
        return _Run(
            torch.cat(logits), tuple(s.depth for s in steps), tuple(s.similarities for s in steps), tuple(seconds)
        )

    def _step(self, ids: Tensor, start: int, stop: int) -> Tensor:
        positions = torch.arange(start, stop, device=ids.device)[None]
        held = {self._cache_name: self._cache, "use_cache": True}
        return self._model(input_ids=ids[:, start:stop], position_ids=positions, **held).logits[:, -1]

    def _bar(self, texts: Sequence[int], title: str) -> tqdm:
        return tqdm(texts, desc=f"river: {title}", unit="text", leave=False, disable=not self._progress)


def _mean_kl(reference: Tensor, other: Tensor) -> float:
    """Returns the mean of KL(reference || other) in nats over rows of logits."""
    p, q = reference.float().log_softmax(-1), other.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def _rules(meter: _Meter, texts: Sequence[int], every: int) -> list[tuple[float, int]]:
    """Returns (threshold, first exit) pairs that spread over the depths.

    For first exits from block 1 to the last but one: leave there at once, and leave there if more similar than most.
    """
    depths = range(1, meter.num_blocks, every)
    picked = {depths[round(i * (len(depths) - 1) / (_FIRST_EXITS - 1))] for i in range(_FIRST_EXITS)}
    rules = []
    for first_exit in sorted(picked):
        column = depths.index(first_exit)
        scores = [step[column] for i in texts for step in meter.references[i].similarities]
        rules += [(AT_ONCE, first_exit), (statistics.median(scores), first_exit)]
    return rules


def _order(candidates: Sequence[Candidate], goal: _Goal) -> list[Candidate]:
    """Orders those worth a test from the safest to the cheapest.

    Only those that are cheaper than every one with less loss are worth it. It begins with the cheapest that lost less
    than half of the budget, so that a test is not spent on what is safer than needed.
    """
    frontier: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.loss, c.cost)):
        if not frontier or candidate.cost < frontier[-1].cost:
            frontier.append(candidate)
    start = max((i for i, c in enumerate(frontier) if c.loss <= goal.limit / 2), default=0)
    return [c for i, c in enumerate(frontier[start:]) if i == 0 or c.loss <= _HOPELESS * goal.limit]


def _cannot(goal: _Goal, results: Sequence[Candidate], tested: Sequence[_Measured]) -> str:
    best, can = results[0], _borne_out(goal, tested[0])
    return (
        f"{goal.metric}={goal.asked} cannot be promised with confidence {goal.confidence:.0%}: the safest rule tested "
        f"(threshold={best.threshold:.4g}, first_exit={best.first_exit}) has KL {best.kl:.4g} and agreement "
        f"{best.agreement:.4g} on {best.texts} texts, which bear out {goal.metric}={can:.4g}. Ask for that or give "
        "more texts"
    )


def _borne_out(goal: _Goal, measured: _Measured) -> float:
    """Returns the budget, in the goal's metric, that a rule's losses pass; KL's clip grows with it."""
    if goal.metric == "agreement":
        return 1 - upper_bound(measured.shares(goal), goal.confidence) * goal.clip

    def passes(factor: float) -> bool:
        shares = measured.shares(replace(goal, clip=goal.clip * factor))
        return p_value(shares, goal.limit / goal.clip) <= 1 - goal.confidence

    low, high = 1.0, 2.0
    while not passes(high):
        low, high = high, high * 2
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if passes(middle) else (middle, high)
    return goal.limit * high
