"""Who drafts: a source of tokens one by one. The model's own twins are here, others in `assistant.py` and `mtp.py`.

Not handled: how long a source drafts (`draft_length.py`); copies from the context (`sampling.py`).
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from river_compile.decoding.draft_length import TWINS
from river_compile.decoding.passes import Passes


class Drafter(Protocol):
    """A source of drafted tokens."""

    @property
    def source(self) -> str:
        """What `DraftLength` and the records call it."""
        ...

    @property
    def least_probability(self) -> float:
        """A drafted token that is less probable than this ends the draft."""
        ...

    @property
    def longest(self) -> int | None:
        """Most tokens of a draft; None: no separate limit."""
        ...

    def begin(self, ids_1S: Tensor, padding: int) -> None:
        """Begin a text, whose first `padding` ids are hidden."""
        ...

    def can_draft(self, tokens: int) -> bool:
        """Whether it can draft until the text has so many ids."""
        ...

    def behind(self, tokens: int) -> int:
        """Return about how many draft steps it takes to read what it does not know of a text of so many ids."""
        ...

    def step(self, ids_1S: Tensor) -> Tensor:
        """Return the logits ``[1, V]`` of the token after the ids: the text's, and those drafted in this cycle."""
        ...

    def end(self, steps: int) -> None:
        """End a draft of so many steps, before it is verified."""
        ...

    def rewind(self, tokens: int) -> None:
        """Forget what it knows of drafted tokens behind the text's first `tokens` ids: they were rejected."""
        ...

    def close(self) -> None:
        """End the text."""
        ...


class Twins:
    """The model's own twins, on its own KV cache."""

    source = TWINS
    least_probability = 0.0
    longest = None

    def __init__(self, passes: Passes) -> None:
        self._passes = passes

    def begin(self, ids_1S: Tensor, padding: int) -> None:
        self._passes.begin_drafts(ids_1S)

    def can_draft(self, tokens: int) -> bool:
        return self._passes.can_draft()

    def behind(self, tokens: int) -> int:
        return 0

    def step(self, ids_1S: Tensor) -> Tensor:
        return self._passes.draft_step(ids_1S)

    def end(self, steps: int) -> None:
        self._passes.rewind(steps)  # the verifying pass overwrites their entries

    def rewind(self, tokens: int) -> None:
        pass

    def close(self) -> None:
        pass
