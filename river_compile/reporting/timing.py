"""Greedy generation with a time stamp per token.

Times are wall clock, taken when `generate` gives a token to its streamer, so they include all that a user waits for.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, MaxLengthCriteria, PreTrainedModel, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from river_compile.decoding.prefix_cache import PrefixPool
from river_compile.errors import OptionError
from river_compile.record import find_record
from river_compile.upstream.dynamo import OwnCall


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
