"""The result of a calibration: options to pass on, measured quality, and the candidates."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from river_compile.exits import Threshold, threshold_text
from river_compile.kernels.files import atomic_write

VERSION = 4


@dataclass(frozen=True)
class Candidate:
    """An exit rule and its measurements, each a mean over texts."""

    threshold: Threshold  # of the criterion; a tuple where each depth has its own
    first_exit: int  # smallest exit depth
    kl: float  # KL divergence from the model that never exits, in nats per token, not clipped
    agreement: float  # share of tokens with the same most likely next token
    loss: float  # what the budget limits: KL or disagreement of a text, clipped
    mean_depth: float  # backbone blocks executed
    cost: float  # time of a decode step as a share of never exit's, see :mod:`river_compile.calibration.evaluate`
    texts: int  # how many texts were measured
    # whether it passed the test of the budget, None where it was only looked at on the pilot texts (for an entropy
    # criterion: worked out from runs in which every token left)
    passed: bool | None = None

    @property
    def rule(self) -> tuple[Threshold, int]:
        """(threshold, first exit)."""
        return self.threshold, self.first_exit


def _candidate(entry: dict[str, Any]) -> Candidate:
    several = isinstance(entry["threshold"], list)
    return Candidate(**{**entry, "threshold": tuple(entry["threshold"])} if several else entry)


def _content_hash(content: dict[str, Any]) -> str:
    """Returns the SHA-256 of a calibration's fields, independent of their spaces and order in the file."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Calibration:
    """The result of :func:`river_compile.calibrate`."""

    metric: str  # "kl" or "agreement"
    budget: float  # as asked for
    confidence: float  # probability, over the draw of the texts, that the promise holds for the texts' source
    clip: float  # largest loss that one text counts with (nats for KL, share of tokens for disagreement)
    num_blocks: int  # blocks of the model
    seconds_never: float  # median time of a decode step that never exits, on this machine
    chosen: Candidate  # the exit rule of least cost that passed, as measured on the texts that tested it
    candidates: tuple[Candidate, ...]  # all rules, as measured last
    base_options: dict[str, object]  # the options that calibration was given

    @property
    def options(self) -> dict[str, object]:
        """The options for ``model.compile(backend="river", options=...)``."""
        return {**self.base_options, "threshold": self.chosen.threshold, "first_exit": self.chosen.first_exit}

    def __str__(self) -> str:
        best = self.chosen
        relation = "at most" if self.metric == "kl" else "at least"
        clipped = f"texts above {self.clip:g} counted as {self.clip:g}" if self.metric == "kl" or self.clip < 1 else ""
        advice = "; more texts, better twins or another budget let tokens leave"
        return "\n".join(
            [
                f"criterion={self.base_options['criterion']!r}, threshold={threshold_text(best.threshold)}, "
                f"first_exit={best.first_exit}",
                f"  promised   mean {self.metric} {relation} {self.budget:g} on unseen text of the same kind, "
                f"confidence {self.confidence:.0%}{f' ({clipped})' if clipped else ''}",
                f"  measured   KL {best.kl:.4f} nats per token, agreement {best.agreement:.1%}, on {best.texts} texts",
                f"  expected   depth {best.mean_depth:.1f} of {self.num_blocks} blocks, "
                f"{best.cost:.0%} of never exit's time per token: {1 / (best.cost * self.seconds_never):.0f} tokens/s "
                f"instead of {1 / self.seconds_never:.0f}{advice if best.mean_depth == self.num_blocks else ''}",
            ]
        )

    def save(self, path: str | Path) -> Path:
        """Writes the calibration as JSON, with its hash; returns the path. The file appears complete or not at all."""
        path = Path(path)
        content = dataclasses.asdict(self)
        whole = {"version": VERSION, "sha256": _content_hash(content), **content}
        with atomic_write(path) as scratch:
            scratch.write_text(json.dumps(whole, indent=1), encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Reads a file of :meth:`save`.

        Raises:
            ValueError: the file cannot be read, is no calibration, of another version, or was changed.
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
            raise ValueError(f"{path} is no calibration that can be read ({error}); calibrate again") from error
