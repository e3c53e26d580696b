"""A streamer that colors tokens by their source."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator

import torch

from river_compile.reporting.timing import Clock, decode_rate
from river_compile.runtime.state import on_step
from river_compile.runtime.stats import CycleRecord, StepRecord, cycles

STYLES = {"river": "green", "assistant": "blue", "mtp": "blue", "lookup": "cyan"}
STYLES |= dict.fromkeys(("backbone", "prompt"), "default")
_SHADES = ("green", "cyan", "blue", "magenta", "default")  # from the first blocks to all of them
_HALF = "\ufffd"  # a tokenizer's output for half a character


class Painter(Clock):
    """Streams a text, each token in the color of its source or exit depth.

    In exact mode (`by_cycle`) the tokens of a cycle appear together, since their sources are known after it.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], write: Callable[[str, str], object], by_cycle: bool, blocks: int
    ) -> None:
        super().__init__()
        self._decode, self._write, self._by_cycle, self._blocks = decode, write, by_cycle, blocks
        self._depth = blocks
        self.text = ""
        self.tokens: list[tuple[str, str]] = []  # text and source; the source of a step is "depth 3"

    @contextlib.contextmanager
    def watching(self) -> Iterator[Painter]:
        """Inside, tokens get their sources from steps and cycles."""
        with on_step(self._stepped), cycles.added(self._cycled):
            yield self

    @property
    def sources(self) -> dict[str, int]:
        return dict(Counter(source for _, source in self.tokens))

    @property
    def tokens_per_s(self) -> float | None:
        """Speed after the first token, None without a second one."""
        return decode_rate(self.times) if len(self.times) > 1 else None

    def put(self, value: torch.Tensor) -> None:
        super().put(value)
        if len(self.ids) == 1:
            self._show("prompt", self._blocks)
        elif self.ids and not self._by_cycle:
            self._show(f"depth {self._depth}", self._depth)

    def end(self) -> None:
        while self._waits:
            self._show("backbone", self._blocks)

    @property
    def _waits(self) -> bool:
        return len(self.tokens) < len(self.ids)

    def _show(self, source: str, depth: int) -> None:
        text = self._decode(self.ids[: len(self.tokens) + 1])
        piece = "" if text.endswith(_HALF) else text[len(self.text) :]
        self.text += piece
        self.tokens.append((piece, source))
        shade = _SHADES[min(len(_SHADES) - 1, depth * len(_SHADES) // max(self._blocks, 1))]
        self._write(piece, STYLES.get(source, shade))

    def _cycled(self, cycle: CycleRecord) -> None:
        for source in cycle.emitted:
            if self._waits:
                self._show(source, self._blocks)

    def _stepped(self, state: object, step: StepRecord) -> None:
        self._depth = step.depth
