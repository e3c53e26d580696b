"""Answers whose pieces carry the log-probabilities of their tokens.

Not handled: tokens of tool calls and of reasoning, which are dropped.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from river_compile.cli.serving.logprobs import Logprobs, Piece, Token
from river_compile.cli.serving.streams import Streamer


class LoggedStreamer(Streamer):
    """Streams pieces with the log-probabilities of their tokens, without those after a stop string.

    Args:
        logprobs: a processor of the same call.
    """

    def __init__(self, *args: Any, logprobs: Logprobs, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._logprobs = logprobs
        self._waiting: list[Token] = []  # have no text yet
        self._begun: list[tuple[int, Token]] = []  # with the beginnings of their texts, of which none is shown
        self._fed = self._shown = 0  # characters

    def put(self, value: Tensor) -> None:
        if self._first:
            super().put(value)
            return
        for token in value.reshape(-1, 1):
            entry = self._logprobs.take(int(token))
            if int(token) not in self._ends:
                self._waiting.append(entry)
            super().put(token)

    def _enqueue(self, item: Any) -> None:
        if type(item) is str:
            self._begun += [(self._fed, token) for token in self._waiting]
            self._fed += len(item)
        elif item is None and self._parser is None:  # half of a character may be left
            self._begun += [(self._fed, token) for token in self._waiting]
        self._waiting.clear()
        super()._enqueue(item)

    def _show(self, text: str, last: bool = False) -> None:
        self._shown += len(text)
        all_of_them = last and not self._stops.stopped and self._parser is None
        ready = [(at, token) for at, token in self._begun if at < self._shown or all_of_them]
        self._begun = self._begun[len(ready) :]
        if text or ready:
            super()._show(Piece(text, ready), last)
