"""Texts for the quality benchmark: what the model itself writes, and passages that it was not asked for.

All samples of a run have one length, so that one cache and one compilation serve them all: `context` tokens that run as
a prompt, then the tokens that are measured. Prompts are of different length, so a sample of the model's own text may
hold some of its answer in the context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from river_compile.calibration.evaluate import cache_argument
from tools import models
from tools.texts import topics

PROMPTS = (
    "Explain how a refrigerator works.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Why is the sky blue?",
    "Give me three tips for learning a language.",
    "Tell a short story about a lighthouse.",
    "What is the difference between a list and a tuple in Python?",
    "Write a polite email that moves a meeting to Friday.",
    "How do vaccines work?",
)


@dataclass(frozen=True)
class Texts:
    """Samples ``[1, context + tokens]`` of both kinds.

    Attributes:
        own: greedy text of the model that never exits.
        held_out: passages of Python's documentation, none of which calibration sees.
        calibration: passages for calibration, as text.
        context: tokens that run as a prompt.
    """

    own: tuple[Tensor, ...]
    held_out: tuple[Tensor, ...]
    calibration: tuple[str, ...]
    context: int


def collect(model: PreTrainedModel, tokenizer: Callable, count: int, tokens: int, calibration: int) -> Texts:
    """Returns `count` samples of each kind, `tokens` of each to be measured.

    Args:
        model: compiled so that it never exits, or not compiled.
        tokenizer: of the model.
        count: samples of each kind; at most as many own ones as there are prompts.
        tokens: tokens measured in each.
        calibration: passages set aside for calibration.
    """
    prompts = [models.encode(tokenizer, prompt) for prompt in PROMPTS[:count]]
    context = max(prompt.shape[1] for prompt in prompts)
    own = tuple(greedy(model, prompt, context + tokens) for prompt in prompts)
    passages = topics()
    rows = [tokenizer(text)["input_ids"][: context + tokens] for text in reversed(passages[calibration:])]
    held_out = tuple(torch.tensor([row]) for row in rows if len(row) == context + tokens)[:count]
    return Texts(own, held_out, tuple(passages[:calibration]), context)


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompt: Tensor, length: int) -> Tensor:
    """Returns the prompt with the model's greedy text behind it, ``[1, length]`` in all, whatever it ends with."""
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=length)
    held = {cache_argument(model): cache, "use_cache": True}
    ids, step = prompt, prompt
    while ids.shape[1] < length:
        positions = torch.arange(ids.shape[1] - step.shape[1], ids.shape[1])[None]
        step = model(input_ids=step, position_ids=positions, **held).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, step], dim=1)
    return ids


def exact_match(disagreement: Sequence[Sequence[float]]) -> float:
    """Returns how many tokens of the model's own text come out unchanged, in the mean over texts.

    A text that is fed and one that is generated are the same up to the first token that comes out otherwise.
    """
    lengths = [next((i for i, other in enumerate(text) if other), len(text)) for text in disagreement]
    return sum(lengths) / len(lengths)
