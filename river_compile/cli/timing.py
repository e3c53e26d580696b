"""Greedy generation with a time stamp per token, shared by the demo and the benchmarks.

Handles one model at a time. Times are wall clock, taken when `generate` hands a token to its streamer, so
they hold everything a user waits for: the forward pass, the choice of the token and transformers' own loop.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True)
class Generation:
    """One generated text.

    Attributes:
        tokens: ids of the new tokens, of a batch its first text's.
        times: seconds from the call of `generate` to each new token.
    """

    tokens: tuple[int, ...]
    times: tuple[float, ...]

    @property
    def first_token_s(self) -> float:
        """Seconds to the first new token: prefill, and compilation if it was due."""
        return self.times[0]

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens per second and text after the first one, prefill excluded."""
        return decode_rate(self.times)


def decode_rate(times: tuple[float, ...] | list[float]) -> float:
    """Returns tokens per second between the first and the last of `times` (in seconds, at least two)."""
    if len(times) < 2:
        raise ValueError(f"a decode rate needs at least 2 tokens, there are {len(times)}; generate more")
    return (len(times) - 1) / (times[-1] - times[0])


def generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    new_tokens: int,
    static_cache: bool = True,
    stop_after: int | None = None,
    end_early: bool = False,
    **more: object,
) -> Generation:
    """Generates greedily and times every token.

    Args:
        model: whatever ``model(...)`` runs is what is timed, compiled or not.
        input_ids: the prompts ``[batch, length]``, every token of which counts.
        new_tokens: how many tokens to generate; a static cache is made for that many.
        static_cache: use a static cache rather than one that grows.
        stop_after: stop after this many tokens, with a cache of the same size as without; for warming up.
        end_early: let the end-of-sequence token end the text after at least two tokens, which a rate needs.
        more: further arguments of the model's `generate`.
    """
    clock = _Clock()
    ends = _NoEnd(model.generation_config.eos_token_id, input_ids.shape[1] + (2 if end_early else new_tokens))
    options = {"logits_processor": LogitsProcessorList([ends]), **more}
    if static_cache:
        options["cache_implementation"] = "static"
    if stop_after is not None:
        options["stopping_criteria"] = StoppingCriteriaList([_StopAfter(input_ids.shape[1] + stop_after)])
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
    return Generation(tuple(clock.tokens), tuple(stamp - start for stamp in clock.stamps))


class _Clock(BaseStreamer):
    """Notes the time of every new token; the first call brings the prompt."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.stamps: list[float] = []
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.stamps.append(time.perf_counter())
        self.tokens.append(int(value.flatten()[0]))

    def end(self) -> None:
        pass


class _NoEnd(LogitsProcessor):
    """Keeps the sequence from ending before it has `length` tokens, as ``min_new_tokens`` does.

    That builds and searches a list of the whole vocabulary for every token: 0.6 ms with 49,152 entries, more than the
    rest of transformers' loop.
    """

    def __init__(self, end_tokens: int | list[int] | None, length: int) -> None:
        self._end_tokens = [] if end_tokens is None else [end_tokens] if isinstance(end_tokens, int) else end_tokens
        self._length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] < self._length:
            for token in self._end_tokens:
                scores[:, token] = -float("inf")
        return scores


class _StopAfter(StoppingCriteria):
    """Ends generation once the sequence has `length` tokens."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        done = input_ids.shape[1] >= self.length
        return torch.full((input_ids.shape[0],), done, device=input_ids.device, dtype=torch.bool)
