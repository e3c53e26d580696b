"""Texts that benchmarks measure on: what the model itself writes, and passages that it was not asked for.

:func:`collect` gives both kinds in samples of one length, so that one cache and one compilation serve them all:
`context` tokens that run as a prompt, then those that are measured. :func:`answers` gives answers of any length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StaticCache

from benchmarks.prompts import mixed
from river_compile.cli import shared
from river_compile.cli.shared import topics
from river_compile.upstream.transformers import cache_argument

QUESTIONS = [*islice(mixed(), 44)]
MEASURED, CALIBRATION = QUESTIONS[:12], QUESTIONS[12:]


@dataclass(frozen=True)
class Texts:
    """Samples ``[1, context + tokens]`` of both kinds.

    Attributes:
        own: greedy text of the model that never exits.
        held_out: passages of Python's documentation.
        context: tokens that run as a prompt.
    """

    own: tuple[Tensor, ...]
    held_out: tuple[Tensor, ...]
    context: int


@dataclass(frozen=True)
class Answer:
    """A prompt with its answer.

    Attributes:
        ids: ``[1, T]``, both.
        prompt: tokens of the prompt.
    """

    ids: Tensor
    prompt: int


def collect(model: PreTrainedModel, tokenizer: Callable, count: int, tokens: int) -> Texts:
    """Return `count` samples of each kind, `tokens` of each to be measured.

    Args:
        model: compiled so that it never exits, or not compiled.
        tokenizer: of the model.
        count: samples of each kind; at most as many own ones as there are questions.
        tokens: tokens measured in each.
    """
    prompts = [shared.encode(tokenizer, prompt) for prompt in MEASURED[:count]]
    context = max(prompt.shape[1] for prompt in prompts)
    own = tuple(greedy(model, prompt, context + tokens) for prompt in prompts)
    rows = [tokenizer(text)["input_ids"][: context + tokens] for text in reversed(topics())]
    held_out = tuple(torch.tensor([row]) for row in rows if len(row) == context + tokens)[:count]
    return Texts(own, held_out, context)


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompt: Tensor, length: int) -> Tensor:
    """Return the prompt with the model's greedy text after it, ``[1, length]`` in all, whatever it ends with."""
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=length)
    held = {cache_argument(model): cache, "use_cache": True}
    ids, step = prompt, prompt
    while ids.shape[1] < length:
        positions = torch.arange(ids.shape[1] - step.shape[1], ids.shape[1])[None]
        step = model(input_ids=step, position_ids=positions, **held).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, step], dim=1)
    return ids


def exact_match(disagreement: Sequence[Sequence[float]]) -> float:
    """Return how many tokens of the model's own text come out unchanged, in the mean over texts.

    A text that is fed and one that is generated are the same up to the first token that comes out otherwise.
    """
    lengths = [next((i for i, other in enumerate(text) if other), len(text)) for text in disagreement]
    return sum(lengths) / len(lengths)


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], new_tokens: int
) -> list[Answer]:
    """Answer questions greedily, without compiled code; an answer may end early."""
    how: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False, "disable_compile": True}
    found = []
    for question in questions:
        ids = shared.encode(tokenizer, question)
        with torch.inference_mode():
            whole = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
        found.append(Answer(whole.clone(), ids.shape[1]))
    return found
