"""Decodes given texts by exit rules, and compares logits and time with full depth's.

A text is fed, not generated: a prompt of `context` tokens, then token by token, so the KV cache holds the entries that
the rule's own exits wrote. Processes that share a model go by the first one's clock and losses.
Not handled: prompts that exit (``prefill="exit"``), batches, and models that need more than ids, masks and positions.
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
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache

from river_compile.agreement import Agreement
from river_compile.backend import river
from river_compile.decoding.kv_cache import KVCache
from river_compile.decoding.passes import Passes
from river_compile.decoding.prompt import Prompt
from river_compile.errors import UnsupportedGraphError
from river_compile.exits import Criterion, SequenceStates, Threshold, forced_depth, forced_threshold
from river_compile.kernels.portable import token_kl
from river_compile.record import record_of
from river_compile.reporting.trace import trace
from river_compile.runtime.stats import StepRecord
from river_compile.twins.observe import full_attention_mask
from river_compile.upstream.transformers import cache_argument

Rule = tuple[Threshold, int]  # threshold, first exit


@contextlib.contextmanager
def compiled(model: PreTrainedModel, options: dict[str, object], backend: Callable = river) -> Iterator[None]:
    """Inside, a model is compiled; afterwards it is as it was."""
    before = model._compiled_call_impl
    model.compile(backend=backend, options=options)
    try:
        yield
    finally:
        model._compiled_call_impl = before


@dataclass(frozen=True)
class Run:
    logits: Tensor  # [tokens, vocabulary]
    steps: tuple[StepRecord, ...]


@dataclass(frozen=True)
class Measured:
    """A rule on some texts, compared with full depth."""

    rule: Rule
    kl: list[list[float]]  # nats, by text and token
    disagreement: list[list[float]]  # 1 if the most likely tokens differ, by text and token
    depths: list[int]  # of all steps

    def text_losses(self, metric: str) -> list[float]:
        """Return each text's mean KL ("kl") or mean disagreement ("agreement")."""
        return [statistics.fmean(tokens) for tokens in (self.kl if metric == "kl" else self.disagreement)]

    @property
    def mean_depth(self) -> float:
        return statistics.fmean(self.depths)


class Meter:
    """Decodes texts, each ``[1, tokens]`` and of one length, with a model compiled with checks from depth 1 on."""

    def __init__(
        self,
        model: PreTrainedModel,
        criterion: Criterion,
        samples: Sequence[Tensor],
        context: int,
        progress: bool,
        references: Sequence[Run] | None = None,  # full depth's runs, if another meter made them
    ) -> None:
        self._model, self._samples, self._context, self._progress = model, samples, context, progress
        self._full = (criterion.never, 1)
        self._decoder = decoder = TextDecoder(model, samples[0].shape[1])
        self.cache = decoder.cache  # of the text that ran last
        self._prompts: dict[int, AfterPrompt] = {}
        self._seconds: defaultdict[int, list[float]] = defaultdict(list)
        for rule in (self._full, self._full, (criterion.always, 1)):  # these runs quantize and compile
            self.run(0, rule)
        self._seconds.clear()
        needed = range(len(samples) if references is None else 1)
        runs = [self.run(i, self._full) for i in self._bar(needed, "full depth")]
        self.references = runs if references is None else list(references)
        self.num_blocks = self.references[0].steps[0].depth

    def run(self, index: int, rule: Rule) -> Run:
        """Decode one text by a rule."""
        with forced_threshold(*rule):
            return self.run_at(index, itertools.repeat(None))

    def run_at(self, index: int, depths: Iterable[int | None]) -> Run:
        """Decode one text with an exit depth for each token; None lets the rule decide."""
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
            raise UnsupportedGraphError(
                f"Only {len(steps)} of {len(seconds)} steps ran through River. river_compile.report(model) says why",
                id="RC026",
            )
        for step, spent in zip(steps, self._agreed(seconds), strict=True):
            self._seconds[step.depth].append(spent)
        return Run(torch.stack(logits), tuple(steps))

    def measure(self, rule: Rule, texts: Sequence[int], title: str) -> Measured:
        """Decode texts, given by index, by a rule."""
        return self.measured(rule, texts, [self.run(i, rule) for i in self._bar(texts, title)])

    def full_depth(self, texts: Sequence[int]) -> Measured:
        """Return full depth on texts, which are decoded already."""
        return self.measured(self._full, texts, [self.references[i] for i in texts])

    def measure_at(self, depths: Sequence[Sequence[int]], texts: Sequence[int], title: str) -> Measured:
        """Decode texts with exit depths, a list for each text."""
        runs = [self.run_at(i, mine) for i, mine in zip(self._bar(texts, title), depths, strict=True)]
        return self.measured((float("nan"), 0), texts, runs)

    def measured(self, rule: Rule, texts: Sequence[int], runs: Sequence[Run]) -> Measured:
        """Compare runs of texts, given by index, with full depth's."""
        kl, disagreement = [], []
        for index, run in zip(texts, runs, strict=True):
            reference = self.references[index].logits
            kl.append(self._agreed(token_kl(reference, run.logits).tolist()))
            other = reference.argmax(-1) != run.logits.argmax(-1)
            disagreement.append(self._agreed(other.float().tolist()))
        return Measured(rule, kl, disagreement, [step.depth for run in runs for step in run.steps])

    def _agreed(self, values: list[float]) -> list[float]:
        """Return the values of the first process that runs the model."""
        agreement = record_of(self._model.parameters()).of(Agreement)
        agreed: list[float] = agreement.first(torch.tensor(values, dtype=torch.float64)).tolist()
        return agreed

    def cost(self, measured: Measured) -> float:
        """Return the mean time of a rule's steps as a share of full depth's, by all steps timed so far."""
        total = sum(self._cost_of(depth) * count for depth, count in Counter(measured.depths).items())
        return total / len(measured.depths)

    @property
    def seconds_full_depth(self) -> float:
        """Median seconds of a step at full depth."""
        return statistics.median(self._seconds[self.num_blocks])

    def _cost_of(self, depth: int) -> float:
        if depth in self._seconds and depth in (0, self.num_blocks):
            return statistics.median(self._seconds[depth]) / self.seconds_full_depth
        # Time is linear in the depth, from the least depth that was timed to full depth.
        least = min(self._seconds)
        if least == self.num_blocks:
            return 1.0
        shallow = statistics.median(self._seconds[least]) / self.seconds_full_depth
        return shallow + (1 - shallow) * (depth - least) / (self.num_blocks - least)

    def _prompt(self, index: int, ids: Tensor) -> None:
        """Bring KV cache and exit memory to the end of a text's prompt."""
        if index in self._prompts:
            self._decoder.resume(self._prompts[index])
        else:
            self._decoder.prompt(ids[:, : self._context])
            self._prompts[index] = self._decoder.save()

    def _bar(self, texts: Sequence[int], title: str) -> tqdm:
        return tqdm(texts, desc=f"river: {title}", unit="text", leave=False, disable=not self._progress)


class AfterPrompt(NamedTuple):
    """The state after a prompt."""

    passes: Passes
    layers: list[dict[str, Tensor | int]]  # fields of each cache layer
    entropy: Tensor | None  # of the last logits, for the exit criterion


class TextDecoder:
    """Decodes texts of at most `capacity` tokens one after another, on one static KV cache."""

    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        self._model = model
        self._sequences = record_of(model.parameters()).of(SequenceStates)
        self._kv = KVCache.of(model, capacity)

    @property
    def cache(self) -> Cache:
        """The KV cache of the text that ran last."""
        return self._kv.cache

    def prompt(self, ids_1S: Tensor) -> Tensor:
        """Run a prompt on the emptied KV cache; return its logits ``[S, V]``."""
        self.cache.reset()
        self._kv.take_in()
        self._sequences.get(self.cache.layers[0].keys).entropy = None  # a prompt of one token would read it
        kwargs = {
            cache_argument(self._model): self.cache,
            "use_cache": True,
            **full_attention_mask(self._model, ids_1S),
        }
        self._passes = Passes(self._model, kwargs, self._kv)
        logits = Prompt(self._passes, ids_1S, GenerationConfig()).run(all_logits=True)[0]
        self._kv = self._passes.kv
        return logits

    def step(self, ids_1S: Tensor) -> Tensor:
        """Run the last token of a text, those before it being in the KV cache; return its logits ``[V]``."""
        return self._passes.step(ids_1S)[0, -1].clone()  # (the next step overwrites them)

    @torch.inference_mode()
    def logits(self, ids_1S: Tensor, first: int) -> Tensor:
        """Return the logits ``[S - first, V]`` after each token from number `first` on, by decode steps."""
        # A prompt has two tokens at least: one would continue with the sequence before it.
        prompt = min(max(first, 2), ids_1S.shape[1])
        found = [self.prompt(ids_1S[:, :prompt])[first:]]
        found += [self.step(ids_1S[:, : i + 1])[None] for i in range(prompt, ids_1S.shape[1])]
        return torch.cat(found)

    def save(self) -> AfterPrompt:
        """Copy the state after the prompt that just ran."""
        layers = [{name: _copied(v) for name, v in vars(layer).items() if _counts(v)} for layer in self.cache.layers]
        return AfterPrompt(self._passes, layers, self._sequences.get(self.cache.layers[0].keys).entropy)

    def resume(self, saved: AfterPrompt) -> None:
        """Restore the state after a prompt."""
        self._passes = saved.passes
        for layer, held in zip(self.cache.layers, saved.layers, strict=True):
            for name, value in held.items():
                if isinstance(value, Tensor):
                    getattr(layer, name).copy_(value)
                else:
                    setattr(layer, name, value)
        self._passes.kv.filled = int(self.cache.get_seq_length())
        self._sequences.get(self.cache.layers[0].keys).entropy = saved.entropy


def _counts(value: object) -> bool:
    return isinstance(value, (Tensor, int))


def _copied(value: Tensor | int) -> Tensor | int:
    return value.clone() if isinstance(value, Tensor) else value
