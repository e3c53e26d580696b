"""Greedy generation with a time stamp per token, and a streamer that colours tokens by their source.

Times are wall clock, taken when `generate` gives a token to its streamer, so they include all that a user waits for.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, MaxLengthCriteria, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from river_compile.errors import OptionError
from river_compile.record import find_record
from river_compile.runtime.kv_cache import PrefixPool
from river_compile.runtime.state import on_step
from river_compile.runtime.stats import CycleRecord, StepRecord, cycles
from river_compile.upstream.dynamo import OwnCall

STYLES = {"river": "green", "lookup": "cyan", "backbone": "default", "prompt": "default"}
_SHADES = ("green", "cyan", "blue", "magenta", "default")  # from the first blocks to all of them
_HALF = "\ufffd"  # a tokenizer's output for half a character


@dataclass(frozen=True)
class Generation:
    """One generated text."""

    tokens: tuple[int, ...]  # ids of the new tokens, of a batch its first row's
    times: tuple[float, ...]  # seconds from the call of `generate` to each of them

    @property
    def first_token_s(self) -> float:
        """Seconds to the first new token: prefill, and compilation if needed."""
        return self.times[0]

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens per second and row after the first token."""
        return decode_rate(self.times)


def decode_rate(times: tuple[float, ...] | list[float]) -> float:
    """Return tokens per second between the first and the last of at least two times, in seconds."""
    if len(times) < 2:
        raise OptionError(f"A decode rate requires at least 2 tokens, got {len(times)}. Generate more")
    return (len(times) - 1) / (times[-1] - times[0])


def generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    new_tokens: int,
    static_cache: bool = True,
    stop_after: int | None = None,  # tokens, on a KV cache of the same size as without; for warming up
    end_early: bool = False,  # let the end token end the text, after the two tokens that a rate needs
    fresh: bool = True,  # empty the prefix cache, so the whole prompt runs
    **more: object,  # arguments of generate
) -> Generation:
    """Generate greedily after prompts ``[batch, length]`` without padding, and time every token."""
    record = find_record(model)
    if fresh and record is not None:
        record.of(PrefixPool).forget_texts()
    clock = Clock()
    least = 2 if end_early else new_tokens
    # Each loop bars the end token in its own cheapest way.
    ends: dict[str, Any] = {"min_new_tokens": least}
    if record is None or record.find(OwnCall) is None:
        no_end = _NoEnd(model.generation_config.eos_token_id, input_ids.shape[1] + least)
        ends = {"logits_processor": LogitsProcessorList([no_end])}
    options = {**ends, **more}
    if static_cache:
        options["cache_implementation"] = "static"
    if stop_after is not None:
        options["stopping_criteria"] = StoppingCriteriaList([StopAfter(input_ids.shape[1] + stop_after)])
    start = time.perf_counter()
    model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        streamer=clock,
        disable_compile=True,  # transformers must not compile on its own what is timed as plain
        **options,
    )
    return Generation(tuple(clock.ids), tuple(stamp - start for stamp in clock.times))


class StopAfter(MaxLengthCriteria):
    """Ends generation at a length; a ``MaxLengthCriteria`` itself would replace that of ``max_new_tokens``."""


class Clock(BaseStreamer):
    """Records the time of every new token of the first row; the first call brings the prompt."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.times: list[float] = []
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self.times.append(time.perf_counter())
            self.ids.append(int(value.flatten()[0]))
        self._prompt_seen = True

    def end(self) -> None:
        pass


class _NoEnd(LogitsProcessor):
    """Keeps the sequence from ending before `length` tokens, as ``min_new_tokens`` does.

    That compares each entry of the vocabulary for every token: 0.15 ms with 49,152 entries.
    """

    def __init__(self, end_tokens: int | list[int] | None, length: int) -> None:
        self._end_tokens = [] if end_tokens is None else [end_tokens] if isinstance(end_tokens, int) else end_tokens
        self._length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] < self._length:
            for token in self._end_tokens:
                scores[:, token] = -float("inf")
        return scores


class Painter(Clock):
    """Streams a text, each token in the colour of its source or exit depth.

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
        for source in cycle.kept:
            if self._waits:
                self._show(source, self._blocks)

    def _stepped(self, state: object, step: StepRecord) -> None:
        self._depth = step.depth
