"""Streams a text to the terminal, each token in the colour of where it came from or of how deep it went.

In exact mode a cycle tells the sources of its tokens after it has handed them over, so a cycle's tokens appear at once.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from transformers.generation.streamers import BaseStreamer

from river_compile.runtime.executor import on_step
from river_compile.runtime.stats import CycleRecord, StepRecord, cycles

STYLES = {"river": "green", "lookup": "cyan", "backbone": "default", "prompt": "default"}
_SHADES = ("green", "cyan", "blue", "magenta", "default")  # from the first blocks to all of them
_HALF = "\ufffd"  # what a tokenizer gives for half a character


class Painter(BaseStreamer):
    """A streamer that writes tokens with what is known of them.

    Args:
        decode: ids to text.
        write: takes a piece of text and its style.
        by_cycle: tokens wait for their cycle (exact mode); else each has the depth of the step before it.
        blocks: of the model.

    Attributes:
        tokens: (text, source) of each token; the source of a step is "depth 3".
        times: when each was handed over.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], write: Callable[[str, str], object], by_cycle: bool, blocks: int
    ) -> None:
        self._decode, self._write, self._by_cycle, self._blocks = decode, write, by_cycle, blocks
        self._ids: list[int] = []
        self._shown = ""
        self._waiting: list[int] = []
        self._prompt_seen = False
        self._depth = blocks
        self.tokens: list[tuple[str, str]] = []
        self.times: list[float] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[Painter]:
        """Inside, steps and cycles tell where tokens come from."""
        with on_step(self._stepped), cycles.added(self._cycled):
            yield self

    @property
    def text(self) -> str:
        return self._shown

    @property
    def sources(self) -> dict[str, int]:
        return dict(Counter(source for _, source in self.tokens))

    @property
    def tokens_per_s(self) -> float | None:
        """Speed after the first token, None where there is no second one."""
        spent = self.times[-1] - self.times[0] if self.times else 0.0
        return (len(self.times) - 1) / spent if spent else None

    def put(self, value: Any) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.times.append(time.perf_counter())
        first = not self.tokens and not self._waiting
        self._waiting += value.flatten().tolist()
        if first:
            self._show("prompt", self._blocks)
        elif not self._by_cycle:
            self._show(f"depth {self._depth}", self._depth)

    def end(self) -> None:
        while self._waiting:
            self._show("backbone", self._blocks)

    def _show(self, source: str, depth: int) -> None:
        self._ids.append(self._waiting.pop(0))
        text = self._decode(self._ids)
        piece = "" if text.endswith(_HALF) else text[len(self._shown) :]
        self._shown += piece
        self.tokens.append((piece, source))
        shade = _SHADES[min(len(_SHADES) - 1, depth * len(_SHADES) // max(self._blocks, 1))]
        self._write(piece, STYLES.get(source, shade))

    def _cycled(self, cycle: CycleRecord) -> None:
        for source in cycle.kept:
            if self._waiting:
                self._show(source, self._blocks)

    def _stepped(self, executor: Any, args: object, step: StepRecord) -> None:
        self._depth = step.depth
