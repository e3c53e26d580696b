"""Answers while they are generated: their tokens are counted, stop strings are cut, and a hang-up ends them."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from torch import Tensor
from transformers.cli.serving import utils
from transformers.generation.streamers import BaseStreamer

from river_compile.cli.serving.errors import Refused
from river_compile.cli.serving.metrics import Metrics
from river_compile.cli.serving.requests import asked

_ERROR = 'data: {"error": "'  # of transformers' events; no other one begins so


async def with_errors(events: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """Yield events of transformers, with an error as OpenAI's object in place of a string."""
    async with contextlib.aclosing(events):
        async for event in events:
            before, found, text = event.partition(_ERROR)
            if found:
                error = Refused(500, "internal_error", text.rpartition('"')[0])
                event = f"{before}data: {json.dumps(error.body())}\n\n"
            yield event


class Tokens:
    """Counts one call's tokens in the metrics."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._began, self._puts = metrics, time.monotonic(), 0

    def put(self, value: Tensor) -> None:
        """Called with each value of a streamer: first the prompt, then tokens."""
        self._puts += 1
        if self._puts == 2:
            self._metrics.first_token.observe(time.monotonic() - self._began)
        if self._puts > 1:
            self._metrics.tokens.inc(value.numel())


class Streamer(utils.DirectStreamer):
    """Streams an answer up to a stop string; the call ends at the token after a hang-up (transformers' part).

    Args:
        limit: the most tokens; None: no limit.
        ends: ids that end a text, and are no part of it.
        metrics: that count its tokens.
    """

    def __init__(self, *args: Any, limit: int | None, ends: frozenset[int], metrics: Metrics, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._tokens, self._stops, self._ending = Tokens(metrics), Stops(asked.get().stops), asked.get().ending
        self._limit, self._ends, self._last = limit, ends, -1
        self.ended = False

    def put(self, value: Tensor) -> None:
        self._tokens.put(value)
        self._last = int(value.reshape(-1)[-1])
        super().put(value)

    def end(self) -> None:
        self.ended = True
        stopped = self._last in self._ends or self._stops.stopped
        self._ending.cut = self._limit is not None and self.total_tokens >= self._limit and not stopped
        super().end()

    def _enqueue(self, item: Any) -> None:
        if type(item) is str:  # (reasoning is a subclass)
            self._show(self._stops.feed(item))
            return
        self._show(self._stops.rest(), last=item is None)
        super()._enqueue(item)

    def _show(self, text: str, last: bool = False) -> None:
        if text or type(text) is not str:
            super()._enqueue(text)


class Whole(BaseStreamer):
    """Counts tokens of an answer in one piece, and ends its call after a hang-up."""

    def __init__(self, metrics: Metrics) -> None:
        self._tokens, self._cancelled = Tokens(metrics), False

    def put(self, value: Tensor) -> None:
        if self._cancelled:
            raise utils._GenerationCancelled
        self._tokens.put(value)

    def end(self) -> None:
        pass

    def cancel(self) -> None:
        self._cancelled = True


class Stops:
    """Cuts a text at the first of its stop strings; holds back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops, self.held, self.stopped = stops, "", False

    def feed(self, piece: str) -> str:
        """Return what may be shown after another piece."""
        text = "" if self.stopped else self.held + piece
        found = [at for at in map(text.find, self.stops) if at >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        held = max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self.held = text[len(text) - held :]
        return text[: len(text) - held]

    def rest(self) -> str:
        """Return what was held back when the text has ended."""
        held, self.held = self.held, ""
        return held

    def cut(self, text: str) -> str:
        """Return a whole text, cut."""
        return self.feed(text) + self.rest()
