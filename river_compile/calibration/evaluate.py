"""Decodes given texts with exit rules and compares the logits with never exit's, for calibration and benchmarks.

A text is fed, not generated: a prompt of ``context`` tokens, then token by token. Each rule really decodes, so that its
cache holds what its own earlier exits wrote, as in generation.

Cost is the time of a decode step as a share of never exit's. Steps of equal depth are timed as they come up, and their
median counts. A step that left is linear in its depth between the least depth seen and never exit.

Ranks that share a model all go by the first one's clock and losses.

Not handled: prompts that exit (``prefill="exit"``), and batches.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from river_compile.backend import river
from river_compile.decoding.given_text import AfterPrompt, TextDecoder
from river_compile.exits import Criterion, Threshold, forced_depth, forced_threshold
from river_compile.kernels.portable import token_kl
from river_compile.reporting.trace import trace
from river_compile.runtime.stats import StepRecord
from river_compile.runtime.tensor_parallel import ranks_of

Rule = tuple[Threshold, int]  # threshold, first exit


@contextlib.contextmanager
def compiled(model: PreTrainedModel, options: dict[str, object], backend: Callable = river) -> Iterator[None]:
    """Compiles a model for the time of a with statement and leaves it as it was."""
    before = model._compiled_call_impl
    model.compile(backend=backend, options=options)
    try:
        yield
    finally:
        model._compiled_call_impl = before


@dataclass(frozen=True)
class Run:
    """One text decoded once: logits ``[tokens, vocabulary]``, and the record of each step."""

    logits: Tensor
    steps: tuple[StepRecord, ...]


@dataclass(frozen=True)
class Measured:
    """A rule on some texts: KL (nats) and disagreement of each token, by text, and the depth of every step."""

    rule: Rule
    kl: list[list[float]]
    disagreement: list[list[float]]
    depths: list[int]

    def text_losses(self, metric: str) -> list[float]:
        """Returns each text's mean KL ("kl") or share of other most likely tokens ("agreement")."""
        return [statistics.fmean(tokens) for tokens in (self.kl if metric == "kl" else self.disagreement)]

    @property
    def mean_depth(self) -> float:
        return statistics.fmean(self.depths)


class Meter:
    """Decodes texts with a compiled model; see the module's text.

    Args:
        model: compiled with the criterion, with checks from the first depth on.
        criterion: of the rules.
        samples: the texts' ids, each ``[1, tokens]`` and of one length.
        context: ids of a text that run as its prompt.
        progress: whether to show progress bars.
        references: never exit's run of each text where another meter has them; the first text then runs for its time.

    Attributes:
        cache: the KV cache of the text that ran last.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        criterion: Criterion,
        samples: Sequence[Tensor],
        context: int,
        progress: bool,
        references: Sequence[Run] | None = None,
    ) -> None:
        self._model, self._samples, self._context, self._progress = model, samples, context, progress
        self._never = (criterion.never, 1)
        self._ranks = ranks_of(model.parameters())
        self._decoder = decoder = TextDecoder(model, samples[0].shape[1])
        self.cache = decoder.cache
        self._prompts: dict[int, AfterPrompt] = {}
        self._seconds: defaultdict[int, list[float]] = defaultdict(list)
        for rule in (self._never, self._never, (criterion.always, 1)):  # these runs pack and compile
            self.run(0, rule)
        self._seconds.clear()
        needed = range(len(samples) if references is None else 1)
        runs = [self.run(i, self._never) for i in self._bar(needed, "never exit")]
        self.references = runs if references is None else list(references)
        self.num_blocks = self.references[0].steps[0].depth

    def run(self, index: int, rule: Rule) -> Run:
        """Decodes one text with (threshold, first exit)."""
        with forced_threshold(*rule):
            return self.run_at(index, itertools.repeat(None))

    def run_at(self, index: int, depths: Iterable[int | None]) -> Run:
        """Decodes one text with a given exit depth for each token, None if the rule decides."""
        ids = self._samples[index].to(self._model.device)
        self._prompt(index, ids)
        logits, seconds = [], []
        with trace() as seen:
            for position, depth in zip(range(self._context, ids.shape[1]), depths, strict=False):
                with forced_depth(depth):
                    start = time.perf_counter()
                    logits.append(self._decoder.step(ids[:, : position + 1]))
                    seconds.append(time.perf_counter() - start)
        steps = [step for step in seen.tokens if step.thread == threading.get_ident()]
        if len(steps) != len(seconds):
            raise RuntimeError(
                f"{len(steps)} of {len(seconds)} steps ran through River; river_compile.report(model) says why"
            )
        for step, spent in zip(steps, self._ranks.agree(seconds), strict=True):
            self._seconds[step.depth].append(spent)
        return Run(torch.stack(logits), tuple(steps))

    def measure(self, rule: Rule, texts: Sequence[int], title: str) -> Measured:
        """Decodes texts, given by their index, with (threshold, first exit)."""
        return self.measured(rule, texts, [self.run(i, rule) for i in self._bar(texts, title)])

    def never(self, texts: Sequence[int]) -> Measured:
        """Returns never exit's rule on texts, which are decoded already."""
        return self.measured(self._never, texts, [self.references[i] for i in texts])

    def measure_at(self, depths: Sequence[Sequence[int]], texts: Sequence[int], title: str) -> Measured:
        """Decodes texts with given exit depths, a list for each text."""
        runs = [self.run_at(i, mine) for i, mine in zip(self._bar(texts, title), depths, strict=True)]
        return self.measured((float("nan"), 0), texts, runs)

    def measured(self, rule: Rule, texts: Sequence[int], runs: Sequence[Run]) -> Measured:
        """Compares runs of texts, given by their index, with never exit's."""
        kl, disagreement = [], []
        for index, run in zip(texts, runs, strict=True):
            reference = self.references[index].logits
            kl.append([*self._ranks.agree(token_kl(reference, run.logits).tolist())])
            other = reference.argmax(-1) != run.logits.argmax(-1)
            disagreement.append([*self._ranks.agree(other.float().tolist())])
        return Measured(rule, kl, disagreement, [step.depth for run in runs for step in run.steps])

    def cost(self, measured: Measured) -> float:
        """Returns the mean time of a rule's steps as a share of never exit's, by all steps timed so far."""
        total = sum(self._cost_of(depth) * count for depth, count in Counter(measured.depths).items())
        return total / len(measured.depths)

    @property
    def seconds_never(self) -> float:
        """Median seconds of a step that never exits."""
        return statistics.median(self._seconds[self.num_blocks])

    def _cost_of(self, depth: int) -> float:
        if depth in self._seconds and depth in (0, self.num_blocks):
            return statistics.median(self._seconds[depth]) / self.seconds_never
        least = min(self._seconds)
        if least == self.num_blocks:
            return 1.0
        shallow = statistics.median(self._seconds[least]) / self.seconds_never
        return shallow + (1 - shallow) * (depth - least) / (self.num_blocks - least)

    def _prompt(self, index: int, ids: Tensor) -> None:
        """Brings cache and memory to the end of a text's prompt."""
        if index in self._prompts:
            self._decoder.resume(self._prompts[index])
        else:
            self._decoder.prompt(ids[:, : self._context])
            self._prompts[index] = self._decoder.save()

    def _bar(self, texts: Sequence[int], title: str) -> tqdm:
        return tqdm(texts, desc=f"river: {title}", unit="text", leave=False, disable=not self._progress)
