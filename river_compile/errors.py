"""Errors and the warning that reach a user; all errors are a `RiverError`.

Dynamo wraps an error of a backend and prints a page of frames, but passes those derived from ``ShortenTraceback``.
"""

from pathlib import Path

from torch._dynamo.exc import ShortenTraceback
from typing_extensions import Self

from river_compile.kernels.messages import with_id

_FOLDER = str(Path(__file__).parent)


class RiverError(Exception):
    """Base of River's errors.

        try:
            river_compile.accelerate(model, quality="best")
        except river_compile.RiverError as error:
            print(error.id)  # RC..., which `river explain-error` explains

    Args:
        text: what failed, why, and what to do.
        id: of the cause, if it has one; else that of the class.

    Attributes:
        id: such as "RC002", which ``river explain-error RC002`` explains; the message begins with it.
        text: the message without the id.
    """

    id: str

    def __init__(self, text: str, *, id: str | None = None) -> None:
        super().__init__(text)
        self._set(text, id)

    def _set(self, text: str, id: str | None) -> None:
        self.text = text
        if id is not None:
            self.id = id

    def __str__(self) -> str:
        return with_id(self.id, self.text)


class _GraphError(RiverError, ValueError, ShortenTraceback):
    """Raised while Dynamo compiles: its own frames and additions to the message are left out."""

    def __init__(self, text: str, *, id: str | None = None) -> None:
        ShortenTraceback.__init__(self, text, first_useful_frame=None)
        self._set(text, id)

    def remove_dynamo_frames(self) -> Self:
        frame = self.__traceback__
        while frame is not None and not frame.tb_frame.f_code.co_filename.startswith(_FOLDER):
            frame = frame.tb_next
        return self if frame is None else self.with_traceback(frame)


class OptionError(_GraphError):
    """An option is unknown or has a bad value; the message names it, what is allowed and the closest match."""

    id = "RC002"


class UnsupportedGraphError(_GraphError):
    """A graph is unsupported and ``on_unsupported="raise"``, or a weight is not finite."""

    id = "RC020"


class TwinsError(_GraphError):
    """Saved twins cannot be read, written or used for this model; the message names the file and the reason."""

    id = "RC040"


class BudgetError(RiverError, ValueError):
    """`tune_exit` cannot guarantee the budget; the message says how many texts it takes."""

    id = "RC009"


class CacheFullError(RiverError, ValueError):
    """The tokens of this step do not fit into the static KV cache; nothing was written."""

    id = "RC065"

    @classmethod
    def of(cls, slots: int, filled: int, new: int) -> Self:
        """Return the error of a step that adds `new` tokens to `filled` ones."""
        return cls(
            f"The static KV cache holds {slots} tokens, {filled} are filled, and this step adds {new}. Set "
            f"max_cache_len or max_new_tokens to {filled + new} or more, or use a dynamic cache"
        )


class ExactModeError(RiverError, ValueError):
    """Exact mode does not support this call or model; the message says why."""

    id = "RC061"


class DecodeError(RiverError, ValueError):
    """River's decoding loop does not support this call; the message says why. Nothing was computed."""

    id = "RC060"


class BatchError(RiverError, RuntimeError):
    """A `ContinuousBatch` was closed, its thread has ended, or code inside of it calls the model's generate."""

    id = "RC066"


class EmbeddingError(RiverError, IndexError):
    """An id of a token, position or type is no row of its embedding; the message has the range of each input."""

    id = "RC067"


class RankError(RiverError, RuntimeError):
    """A process that shares a model with others cannot continue, since one of them has ended."""

    id = "RC121"


class RiverWarning(UserWarning):
    """Something runs in another way than asked for; the message says what and why, and begins with an id.

        warnings.simplefilter("error", river_compile.RiverWarning)  # a call that is not accelerated is an error

    There is one warning for each reason.
    """
