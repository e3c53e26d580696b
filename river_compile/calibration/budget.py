"""The budget of a calibration: how it is given, the loss that it limits, and the texts that it takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from river_compile.calibration.evaluate import Measured
from river_compile.calibration.risk import texts_needed
from river_compile.errors import BudgetError, OptionError
from river_compile.kernels.checks import Check, number

_CLIP = 5  # largest KL of a text, in budgets
_ANY = number("it must be a number")
_CONFIDENCE = Check(
    "it must be a number between 0 and 1, such as 0.9", lambda value: _ANY.allows(value) and 0 < value < 1
)
_ASKED = {
    "kl": Check("it must be a number above 0, in nats per token", lambda v: _ANY.allows(v) and 0 < v < math.inf),
    "agreement": Check("it must be a number between 0 and 1", lambda v: _ANY.allows(v) and 0 < v < 1),
}


@dataclass(frozen=True)
class Budget:
    """A limit on the mean loss of a text: KL, or disagreement."""

    metric: str  # "kl" or "agreement"
    asked: float  # as it was given
    limit: float  # what the mean loss may be
    clip: float  # largest loss that a text counts with
    confidence: float  # probability, over the draw of the texts, that a promise holds

    @classmethod
    def of(
        cls,
        budget: Mapping[str, float] | None,
        kl: float | None,
        agreement: float | None,
        confidence: float,
        clip: float | None,
    ) -> Budget:
        """Returns the one budget that was given, in whichever form.

        Raises:
            OptionError: (a ``ValueError``) none or two, or a bad value.
        """
        short = {name: value for name, value in (("kl", kl), ("agreement", agreement)) if value is not None}
        if (budget is not None) + len(short) != 1:
            given = short if budget is None else {"budget": budget, **short}
            raise OptionError(f"one budget is needed, such as kl=0.05 or agreement=0.98; given: {given or 'none'}")
        budget = short if budget is None else budget
        if not isinstance(budget, Mapping) or len(budget) != 1 or not set(budget) <= _ASKED.keys():
            raise OptionError(f'budget={budget!r} is not allowed; give {{"kl": 0.05}} or {{"agreement": 0.98}}')
        confidence = _CONFIDENCE("confidence", confidence, OptionError)
        ((metric, asked),) = budget.items()
        asked = _ASKED[metric](metric, asked, OptionError)
        limit = asked if metric == "kl" else 1 - asked
        clip = clip if clip is not None else (_CLIP * limit if metric == "kl" else 1.0)
        above = f"it must be a number above the loss that is promised, {limit:.4g}"
        clip = Check(above, lambda value: _ANY.allows(value) and limit < value < math.inf)("clip", clip, OptionError)
        return cls(metric, asked, limit, clip, confidence)

    def check_texts(self, count: int) -> None:
        """Checks that so many texts can test it.

        Raises:
            BudgetError: (a ``ValueError``) not even texts without any loss would pass.
        """
        needed = texts_needed(self.share, self.confidence)
        if count < needed:
            raise BudgetError(
                f"{self.metric}={self.asked} with confidence {self.confidence:.0%} takes at least {needed} texts to "
                f"test (and a quarter of that to choose candidates), even if River made no error; {count} are left for "
                "the test. Give more texts that are long enough, a lower confidence, or an easier budget"
            )

    @property
    def share(self) -> float:
        """The limit as a share of the clip."""
        return self.limit / self.clip

    def shares(self, measured: Measured) -> list[float]:
        """Returns each text's loss as a share of the clip."""
        return [min(max(loss, 0.0), self.clip) / self.clip for loss in measured.text_losses(self.metric)]
