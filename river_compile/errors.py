"""Errors that reach a user.

TorchDynamo wraps what a backend raises into its own exception and prints a page of frames. Errors derived from its
``ShortenTraceback`` pass through as they are, so a bad option is the ``ValueError`` that a user expects. What Dynamo
adds to their message and the frames of its own are left out: nothing is wrong with the compiler.
"""

from pathlib import Path

from torch._dynamo.exc import ShortenTraceback
from typing_extensions import Self

_FOLDER = str(Path(__file__).parent)


class _UserError(ValueError, ShortenTraceback):
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


class OptionError(_UserError):
    """An option is unknown or has a bad value; the message names it, what is allowed and the closest match."""


class UnsupportedGraphError(_UserError):
    """A graph cannot be rewritten and ``on_unsupported="raise"`` asks for an error, or a weight is not finite."""


class ArtifactError(_UserError):
    """Saved twins cannot be read, written or used for this model; the message names the file and the reason."""


class BudgetError(ValueError):
    """Calibration cannot promise a budget; the message says which one it can, or how many texts it takes."""


class CacheFullError(ValueError):
    """The tokens of this step do not fit into the static KV cache; nothing was written."""


class ExactModeError(ValueError):
    """Exact mode cannot run this call or this model; the message gives the reason."""


class DecodeError(ValueError):
    """``river_compile.decoding`` does not handle this call; the message gives the reason. Nothing was computed."""


class RankError(RuntimeError):
    """The processes that share a model cannot go on together: one is gone, or they disagree; the message says which."""


class RiverWarning(UserWarning):
    """Something runs otherwise than asked for; the message says what and why."""
