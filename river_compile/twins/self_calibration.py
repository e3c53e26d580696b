"""Self-calibration: statistics from text that a model samples, and the loss of the twins on it.

Not handled: models that cannot be sampled from token ids alone. Their `refusal` says why; on several ranks they raise.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from torch import Tensor, nn

from river_compile.errors import OptionError
from river_compile.progress import stage_shown
from river_compile.runtime.tensor_parallel import ranks_of
from river_compile.twins.calibration_stats import Moments, Observation
from river_compile.twins.native_linear import NativeLinear
from river_compile.twins.observe import record, visit
from river_compile.twins.sampling import enough, sample
from river_compile.twins.twin_kl import TwinLoss, estimate_loss
from river_compile.twins.weights import TwinWeight

log = logging.getLogger("river_compile.twins")
R = TypeVar("R")
ROWS, MOST_TOKENS = 32, 32  # (a longer row takes a step more)
_ROWS_AT_ONCE = 16


class SelfCalibration:
    """Text of one model's own, kept as token ids until its weights change.

    Attributes:
        refusal: why there is none, empty where there is.
        seconds: what sampling and reading it took, with all that was done meanwhile.
    """

    def __init__(self) -> None:
        self._model: Callable[[], nn.Module | None] = lambda: None
        self._ids: Tensor | None = None
        self.refusal = "torch.compile was not given a model"
        self.seconds = 0.0

    def is_of(self, model: nn.Module) -> None:
        """Says which model it is."""
        if self._model() is not model:
            self._model, self._ids, self.refusal = weakref.ref(model), None, ""

    def visit(self, weights: Sequence[Tensor], see: Callable[[Tensor, Moments], None], *, anew: bool = False) -> str:
        """Calls `see` for each of these matrices that the model reads on it, with the moments of its inputs.

        Args:
            weights: matrices, or stacks of them.
            see: called in the order of reading, before the model goes on; raises nothing.
            anew: sample again, since the weights are others.

        Returns:
            What the text is, in words; empty if the model cannot write it.
        """

        def run(model: nn.Module) -> str:
            ids = self._text(model, anew)
            visit(model, ids, weights, see)
            return f"{ids.numel()} tokens that the model sampled"

        return self._run(run) or ""

    def observation(self, *, anew: bool = False) -> Observation | None:
        """Returns the statistics of all the model's matrices on it, None if the model cannot write it."""
        return self._run(lambda model: record(model, self._text(model, anew).split(_ROWS_AT_ONCE), own=True))

    def _run(self, what: Callable[[nn.Module], R]) -> R | None:
        """Returns what something returns for the uncompiled model, None if the code of the model fails."""
        model = self._model()
        if model is None or self.refusal:
            return None
        start = time.perf_counter()
        try:
            with NativeLinear():
                return what(model)
        except Exception as error:  # (the code of any model, which was not made for this)
            _tell_ranks(model, error)
            self.refusal = _why(error)
            log.info("%s writes no text for its twins: %s", type(model).__name__, self.refusal)
            return None
        finally:
            self.seconds += time.perf_counter() - start

    def _text(self, model: nn.Module, anew: bool) -> Tensor:
        if anew or self._ids is None:
            with stage_shown("reading own text"):
                self._ids = sample(model, ROWS, enough(model, ROWS, MOST_TOKENS))
        return self._ids

    def loss(self, packed: Iterable[TwinWeight]) -> TwinLoss | None:
        """Estimates the joint loss of these twins on other text; None if the model cannot write it."""
        model = self._model()
        if model is None or self.refusal:
            return None
        try:
            with NativeLinear():
                return estimate_loss(model, packed)
        except Exception as error:  # (as above)
            _tell_ranks(model, error)
            log.info("the loss of the twins of %s is not known: %s", type(model).__name__, _why(error))
            return None


def _tell_ranks(model: nn.Module, error: Exception) -> None:
    """Raises an error of a model that several ranks share: going on with other twins than the others would part them.

    Raises:
        RankError: another rank is gone.
        OptionError: (a ``ValueError``) the model cannot be sampled.
    """
    ranks = ranks_of(model.parameters())
    if not ranks.several:
        return
    ranks.raise_if_lost(error)
    raise OptionError(
        f"{type(model).__name__} on {ranks.size} ranks cannot write the text that its twins' statistics are taken from "
        f"({_why(error)}); use river_compile.observe, or quantizer='hqq'"
    ) from error


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.200}"
