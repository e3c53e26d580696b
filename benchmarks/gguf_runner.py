"""What rows of `benchmarks.decode` share whose program reads a GGUF file, in batches of one.

Not handled: rows of a batch.
"""

from __future__ import annotations

import abc
from typing import Any

from river_compile.cli import shared


def token_ids(job: dict) -> tuple[list[int], list[int]]:
    """Return the token ids of a job's prompt, and of a text as long as its longest prompt to read."""
    from transformers import AutoTokenizer

    from river_compile.cli.bench import beginning

    shared.quiet()
    tokenizer, longest = AutoTokenizer.from_pretrained(job["folder"]), max(job["prompts"], default=1)
    return shared.encode(tokenizer, job["prompt"])[0].tolist(), beginning(tokenizer, longest)[0].tolist()


class GgufRunner(abc.ABC):
    """Generates by a program, which `seconds` runs."""

    def __init__(self, program: Any, prompt: list[int], text: list[int], job: dict) -> None:
        self.program, self.prompt, self.text, self.job = program, prompt, text, job

    @abc.abstractmethod
    def seconds(self, new_tokens: int, prompt: list[int] | None = None) -> list[float]:
        """Generate greedily, past any end-of-sequence token; return the seconds to each new token."""

    def first_call(self) -> tuple[float, float]:
        """Return the seconds to the first and to the second new token; nothing is compiled after loading."""
        first, second = self.seconds(2)
        return first, second

    def warm_up(self) -> None:
        """Generate once untimed; there are no exits to report."""
        self.seconds(self.job["new_tokens"])

    def rate(self) -> float:
        """Return the decode tokens/s of one generation."""
        from river_compile.reporting.timing import decode_rate

        return decode_rate(self.seconds(self.job["new_tokens"]))

    def prompt_seconds(self, length: int) -> float:
        """Return the seconds to the first new token after a prompt of so many tokens."""
        return self.seconds(1, self.text[:length])[0]
