"""An exit rule with its evidence, as `tune_exit` finds it: the options, the measured quality, the candidates."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from river_compile.errors import OptionError
from river_compile.exits import Threshold, threshold_text
from river_compile.kernels.files import atomic_write

VERSION = 5


@dataclass(frozen=True)
class Candidate:
    """An exit rule and its measurements, each a mean over texts.

    Attributes:
        threshold: of the criterion; a tuple where each depth has its own.
        first_exit: smallest exit depth, in layers.
        kl: KL divergence from full depth, in nats per token, not clipped.
        agreement: share of tokens with the same most likely next token.
        loss: what the budget limits: KL or disagreement of a text, clipped.
        mean_depth: backbone layers executed.
        cost: time of a decode step as a share of full depth's.
        texts: how many texts were measured.
        passed: whether the rule passed the test of the budget; None: it was measured on the pilot texts only.
    """

    threshold: Threshold
    first_exit: int
    kl: float
    agreement: float
    loss: float
    mean_depth: float
    cost: float
    texts: int
    passed: bool | None = None

    @property
    def rule(self) -> tuple[Threshold, int]:
        """(threshold, first exit)."""
        return self.threshold, self.first_exit


def _candidate(entry: dict[str, Any]) -> Candidate:
    several = isinstance(entry["threshold"], list)
    return Candidate(**{**entry, "threshold": tuple(entry["threshold"])} if several else entry)


def _content_hash(content: dict[str, Any]) -> str:
    """Return the SHA-256 of the fields, whatever their order and spaces in the file."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class ExitRule:
    """The result of `river_compile.tune_exit`, for ``accelerate(model, calibration=rule)``.

        rule = river_compile.tune_exit(model, tokenizer, texts, kl=0.1)
        print(rule)  # what is guaranteed, what was measured, and the speed to expect
        river_compile.accelerate(model, calibration=rule.save("exit_rule.json"))

    Attributes:
        metric: "kl" or "agreement".
        budget: as asked for: KL in nats per token, or the least share of tokens that agree.
        confidence: probability, over the draw of the texts, that the budget holds for their source.
        clip: largest loss that one text counts with (nats for KL, share of tokens for disagreement).
        num_blocks: layers of the model.
        seconds_full_depth: median time of a decode step at full depth, on this machine.
        chosen: the cheapest candidate that passed, as measured on the texts that tested it.
        candidates: all rules, as measured last.
        base_options: options that tuning was given.
    """

    metric: str
    budget: float
    confidence: float
    clip: float
    num_blocks: int
    seconds_full_depth: float
    chosen: Candidate
    candidates: tuple[Candidate, ...]
    base_options: dict[str, object]

    @property
    def options(self) -> dict[str, object]:
        """The options for ``model.compile(backend="river", options=...)``."""
        return {**self.base_options, "threshold": self.chosen.threshold, "first_exit": self.chosen.first_exit}

    def __str__(self) -> str:
        best, rate = self.chosen, 1 / self.seconds_full_depth
        relation = "at most" if self.metric == "kl" else "at least"
        clipped = f"texts above {self.clip:g} counted as {self.clip:g}" if self.metric == "kl" or self.clip < 1 else ""
        advice = "; more texts, better twins or another budget let tokens exit"
        return "\n".join(
            [
                f"criterion={self.base_options['criterion']!r}, threshold={threshold_text(best.threshold)}, "
                f"first_exit={best.first_exit}",
                f"  guarantee  mean {self.metric} {relation} {self.budget:g} on unseen text of the same kind, "
                f"confidence {self.confidence:.0%}{f' ({clipped})' if clipped else ''}",
                f"  measured   KL {best.kl:.4f} nats per token, agreement {best.agreement:.1%}, on {best.texts} texts",
                f"  expected   depth {best.mean_depth:.1f} of {self.num_blocks} layers, "
                f"{best.cost:.0%} of full depth's time per token: {rate / best.cost:.0f} tokens/s instead of {rate:.0f}"
                f"{advice if best.mean_depth == self.num_blocks else ''}",
            ]
        )

    def save(self, path: str | Path) -> Path:
        """Write the rule as JSON with its hash; return the path. The file appears complete or not at all."""
        path = Path(path)
        content = dataclasses.asdict(self)
        whole = {"version": VERSION, "sha256": _content_hash(content), **content}
        with atomic_write(path) as scratch:
            scratch.write_text(json.dumps(whole, indent=1), encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> ExitRule:
        """Read a file that `save` wrote.

        Raises:
            OptionError: (a ``ValueError``) the file cannot be read, is of another version, or was changed.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            version = content.pop("version")
            if version != VERSION:
                raise ValueError(f"it has version {version!r}, this release reads {VERSION}")
            if content.pop("sha256") != _content_hash(content):
                raise ValueError("it is damaged: its hash differs from the one it states")
            content["chosen"] = _candidate(content["chosen"])
            content["candidates"] = tuple(map(_candidate, content["candidates"]))
            return cls(**content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise OptionError(
                f"Cannot read an exit rule from {path}: {error}. Call river_compile.tune_exit again and save the rule",
                id="RC008",
            ) from error
