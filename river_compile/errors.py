"""Errors and the warning that reach a user; all errors are a `RiverError`.

Dynamo wraps an error of a backend and prints a page of frames, but passes those derived from ``ShortenTraceback``.
"""

from pathlib import Path

from torch._dynamo.exc import ShortenTraceback
from typing_extensions import Self

_FOLDER = str(Path(__file__).parent)


class RiverError(Exception):
    """Base of River's errors."""


class _GraphError(RiverError, ValueError, ShortenTraceback):
    """Raised while Dynamo compiles: its own frames and additions to the message are left out."""

    def __init__(self, message: str) -> None:
        ShortenTraceback.__init__(self, message, first_useful_frame=None)
        self._message = message

    def __str__(self) -> str:
        return self._message

    def remove_dynamo_frames(self) -> Self:
        frame = self.__traceback__
        while frame is not None and not frame.tb_frame.f_code.co_filename.startswith(_FOLDER):
            frame = frame.tb_next
        return self if frame is None else self.with_traceback(frame)


class OptionError(_GraphError):
    """An option is unknown or has a bad value; the message names it, what is allowed and the closest match."""


class UnsupportedGraphError(_GraphError):
    """A graph is unsupported and ``on_unsupported="raise"``, or a weight is not finite."""


class TwinsError(_GraphError):
    """Saved twins cannot be read, written or used for this model; the message names the file and the reason."""


class BudgetError(RiverError, ValueError):
    """`tune_exit` cannot guarantee the budget; the message says how many texts it takes."""


class CacheFullError(RiverError, ValueError):
    """The tokens of this step do not fit into the static KV cache; nothing was written."""


class ExactModeError(RiverError, ValueError):
    """Exact mode does not support this call or model; the message says why."""


class DecodeError(RiverError, ValueError):
    """River's decoding loop does not support this call; the message says why. Nothing was computed."""


class RankError(RiverError, RuntimeError):
    """Processes that share a model cannot continue: one has ended, or they disagree; the message says which."""


class RiverWarning(UserWarning):
    """Something runs in another way than asked for; the message says what and why."""
