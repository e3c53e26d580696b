"""Several answers to one prompt in columns: as they were written, with their speeds, and in the end.

What differs from the first answer is marked. Times are those of the runs, which need not have run side by side.
Not handled: tokens that change the text before them; the text grows at its end.
"""

from __future__ import annotations

import difflib
import math
import re
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from river_compile.reporting.timing import decode_rate

if TYPE_CHECKING:
    from river_compile.reporting.timing import Generation

END = math.inf  # as a time: everything is written
_CHANGED = "yellow underline"
_GAP = 2  # characters between columns
_PER_SECOND = 30  # frames of a terminal
_BELOW = 6  # lines of a terminal that are not the answers'


@dataclass(frozen=True)
class Answer:
    """One text and when its parts were written.

    Attributes:
        title: of the column.
        text: the whole text.
        times: seconds from the call of ``generate`` to each token, at least two.
        lengths: characters of the text after each token.
    """

    title: str
    text: str
    times: tuple[float, ...]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, title: str, made: Generation, decode: Callable[[Sequence[int]], str]) -> Answer:
        """Return the answer of a timed run.

        Args:
            title: of the column.
            made: the run.
            decode: the text of token ids.
        """
        text = decode(made.tokens)
        so_far = (decode(made.tokens[:count]) for count in range(1, len(made.tokens) + 1))
        return cls(title, text, made.times, tuple(_common(part, text) for part in so_far))

    def written(self, seconds: float) -> int:
        """Return how many tokens there are after a time."""
        return bisect_right(self.times, seconds)

    def rate(self, seconds: float = END) -> float | None:
        """Return tokens per second after the first token, until a time; None before the second token."""
        count = self.written(seconds)
        return decode_rate(self.times[:count]) if count > 1 else None


def _common(part: str, text: str) -> int:
    """Return the length of the common beginning; half a character, which needs more tokens, is no part of the text."""
    return next((i for i, (a, b) in enumerate(zip(part, text, strict=False)) if a != b), min(len(part), len(text)))


def compared(first: str, text: str) -> Iterator[tuple[str, bool]]:
    """Yield a text's words and the spaces between them, each with whether the first text has another word there."""
    before, after = (re.findall(r"\s+|\S+", t) for t in (first, text))
    for kind, _, _, start, end in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        for piece in after[start:end]:
            yield piece, kind != "equal" and not piece.isspace()


class Columns:
    """The answers side by side.

    Args:
        answers: at least one; speeds and words are compared with the first.
        width: in characters.
        stars: put stars around words that differ, for output without colors.
    """

    def __init__(self, answers: Sequence[Answer], width: int, stars: bool = False) -> None:
        self.answers, self._width = answers, (width - _GAP * (len(answers) - 1)) // len(answers)
        words = [list(compared(answers[0].text, answer.text)) for answer in answers]
        self._texts = [_marked(pieces, stars) for pieces in words]
        self._differ = [sum(differs for _, differs in pieces) for pieces in words]
        self.height = max(len(self._lines(text)) for text in self._texts)

    @property
    def seconds(self) -> float:
        """When the last token was written."""
        return max(answer.times[-1] for answer in self.answers)

    def at(self, seconds: float = END, height: int | None = None) -> Table:
        """Return the columns as they are after a time, the texts in `height` lines, the last ones (None: all)."""
        ended = seconds >= self.seconds
        height = self.height if height is None else height
        table = Table(box=None, padding=(0, _GAP, 0, 0), pad_edge=False, show_footer=True)
        cells = []
        for number, answer in enumerate(self.answers):
            count = answer.written(seconds)
            done = count == len(answer.times)
            style = "bold green" if done else "bold"
            footer = Text("\n").join([Text(), *self._footer(number, seconds, ended)])
            footer.stylize_before(style)
            table.add_column(Text(answer.title), footer, width=self._width, overflow="fold", header_style=style)
            text = self._texts[number]  # (with stars it is longer than the answer, and only shown whole)
            lines = self._lines(text if done else text[: answer.lengths[count - 1] if count else 0])[-height:]
            cells.append(Text("\n").join([*lines, *[Text()] * (height - len(lines))]))
        table.add_row(*cells)
        return table

    def _lines(self, text: Text) -> list[Text]:
        return list(text.wrap(Console(width=self._width), self._width, overflow="fold"))

    def _footer(self, number: int, seconds: float, ended: bool) -> Iterator[Text]:
        first, answer = self.answers[0], self.answers[number]
        rate, plain = answer.rate(seconds), first.rate()
        yield Text("" if rate is None else f"{rate:.1f} tokens/s")
        if number and ended and rate is not None and plain is not None:
            yield Text(f"{rate / plain:.1f} times {first.title}")
            yield _verdict(answer.text == first.text, self._differ[number])
        else:
            yield from (Text(), Text())


def _marked(pieces: Sequence[tuple[str, bool]], stars: bool) -> Text:
    text = Text()
    for piece, differs in pieces:
        text.append(f"*{piece}*" if differs and stars else piece, style=_CHANGED if differs else "")
    return text


def _verdict(same: bool, differ: int) -> Text:
    if differ:
        return Text(f"{differ} {'word differs' if differ == 1 else 'words differ'}", _CHANGED)
    return Text("the same text" if same else "words left out")


def play(columns: Columns, console: Console, line: str) -> None:
    """Show the answers in a terminal as they were written, with a line below, then remove them."""
    height = min(columns.height, max(console.height - _BELOW - len(line) // console.width, 1))
    with Live(console=console, transient=True, auto_refresh=False) as live:
        start = time.perf_counter()
        while (now := time.perf_counter() - start) < columns.seconds:
            live.update(Group(columns.at(now, height), Text(line)), refresh=True)
            time.sleep(1 / _PER_SECOND)
