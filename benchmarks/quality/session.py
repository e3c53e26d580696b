"""One compilation of the model and what is measured with it, on its own text and on held-out text.

Every session feeds the same samples and is compared with the same runs at full depth, those of the first session. Times
are compared within a session: a rule's time is a share of full depth's there, so a machine that gets slower between two
sessions touches none of them.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from transformers import PreTrainedModel

from benchmarks.texts import Texts, exact_match
from river_compile.evaluation.meter import Measured, Meter, Rule, compiled
from river_compile.exits import CRITERIA


@dataclass(frozen=True)
class Row:
    """A rule, measured. Each number is a mean over tokens.

    Attributes:
        name: of the configuration.
        kl, agreement: from full depth, on the model's own text and on held-out text (KL in nats).
        match: tokens of the own text that come out unchanged, of `tokens`.
        tokens: tokens measured in each text.
        depth: backbone blocks executed.
        time: of a decode step, as a share of full depth's.
        rule: threshold (None where depths were given) and first exit.
    """

    name: str
    kl: tuple[float, float]
    agreement: tuple[float, float]
    match: float
    tokens: int
    depth: float
    time: float
    rule: tuple[float | None, int]

    def to_dict(self) -> dict:
        own, held_out = ({"kl": kl, "agreement": same} for kl, same in zip(self.kl, self.agreement, strict=True))
        return {**asdict(self), "own": own | {"match": self.match}, "held_out": held_out}


class Session:
    """The model compiled with some options, and a meter for each kind of text.

    Attributes:
        model: the model.
        own, held_out: the meters; the second one is made when it is first asked for.
        num_blocks: blocks of the model.
    """

    def __init__(
        self, model: PreTrainedModel, criterion: str, texts: Texts, progress: bool, first: Session | None = None
    ) -> None:
        self.model, self._criterion, self._progress = model, CRITERIA[criterion], progress
        self._texts, self._first = texts, first
        self.own = self._meter("own")
        self.num_blocks = self.own.references[0].steps[0].depth

    @functools.cached_property
    def held_out(self) -> Meter:
        return self._meter("held_out")

    def _meter(self, kind: str) -> Meter:
        samples, known = getattr(self._texts, kind), self._first and getattr(self._first, kind).references
        return Meter(self.model, self._criterion, samples, self._texts.context, self._progress, known)

    def rule(self, name: str, rule: Rule) -> Row:
        """Measure (threshold, first exit) on both kinds of text."""
        return self._row(name, [m.measure(rule, range(len(m.references)), name) for m in (self.own, self.held_out)])

    def depth(self, name: str, depth: int) -> Row:
        """Measure one depth for every token on both kinds of text."""
        return self._row(name, [at_depth(m, depth, name) for m in (self.own, self.held_out)], depth)

    def _row(self, name: str, measured: Sequence[Measured], depth: int | None = None) -> Row:
        own, _ = measured
        threshold, first_exit = own.rule
        return Row(
            name,
            tuple(statistics.fmean(m.text_losses("kl")) for m in measured),
            tuple(1 - statistics.fmean(m.text_losses("agreement")) for m in measured),
            exact_match(own.disagreement),
            len(own.kl[0]),
            own.mean_depth,
            self.own.cost(own),
            (threshold, first_exit) if depth is None else (None, depth),
        )


def at_depth(meter: Meter, depth: int, title: str) -> Measured:
    """Decode all texts with one depth for every token."""
    texts = range(len(meter.references))
    return meter.measure_at([[depth] * len(meter.references[i].steps) for i in texts], texts, title)


@contextlib.contextmanager
def session(
    model: PreTrainedModel,
    options: Mapping[str, object],
    texts: Texts | Callable[[], Texts],
    progress: bool,
    first: Session | None = None,
) -> Iterator[Session]:
    """Compile the model for the time of a with statement.

    Args:
        model: the model.
        options: of the backend; checks stand after every block.
        texts: what to measure on, or how to get it from the compiled model.
        progress: whether to show progress bars.
        first: the session whose runs at full depth all others are compared with.
    """
    torch._dynamo.reset()
    criterion = options.get("criterion", "similarity")
    never = {"threshold": CRITERIA[criterion].never, "first_exit": 1}
    with compiled(model, {**options, **never}), torch.inference_mode():
        texts = texts() if callable(texts) else texts
        yield Session(model, criterion, texts, progress, first)
