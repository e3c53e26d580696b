"""Texts that benchmarks measure on: what the model itself writes, and passages that it was not asked for.

:func:`collect` gives both kinds in samples of one length, so that one cache and one compilation serve them all:
`context` tokens that run as a prompt, then those that are measured. Prompts are of different length, so a sample of
the model's own text may hold some of its answer in the context. :func:`answers` gives whole answers of any length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StaticCache

from river_compile.cli import shared
from river_compile.cli.shared import topics
from river_compile.upstream.transformers import cache_argument

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
MEASURED = (
    "Why is the sky blue?",
    "Explain how a refrigerator works.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Tell me a short story about a lighthouse keeper.",
    "What are three good habits for learning a language?",
    "How do plants turn sunlight into food?",
    "Summarize the causes of the First World War.",
    "Give me a recipe for vegetable soup.",
    "What is the difference between a list and a tuple in Python?",
    "Describe the water cycle.",
    "Write a polite email asking for a day off.",
    "A train travels 60 km in 45 minutes. What is its average speed?",
)
CALIBRATION = (
    "How does a bicycle stay upright?",
    "Write a poem about the sea.",
    "Explain recursion to a child.",
    "List five uses of a paper clip.",
    "What causes earthquakes?",
    "Write a Python function that reverses a string.",
    "How is bread made?",
    "Who was Marie Curie?",
    "What is the capital of France and what is it known for?",
    "Give advice for a job interview.",
    "Explain the rules of chess.",
    "What is inflation in economics?",
    "Describe a walk in a forest in autumn.",
    "How do vaccines work?",
    "Write a short dialogue between a teacher and a student.",
    "What is 17 times 23? Show your steps.",
    "Explain the difference between weather and climate.",
    "How can I sleep better?",
    "Tell me about the planet Mars.",
    "Write a SQL query that counts orders per customer.",
    "What is a black hole?",
    "Describe how to change a car tire.",
    "What are the benefits of exercise?",
    "Tell a joke about computers.",
    "How do birds navigate?",
    "Summarize the story of Romeo and Juliet.",
    "What is machine learning?",
    "Plan a weekend trip to the mountains.",
    "Why do we have leap years?",
    "Explain what a bank does.",
    "How is paper recycled?",
    "What is photosynthesis?",
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


@dataclass(frozen=True)
class Answer:
    """A prompt with its answer.

    Attributes:
        ids: ``[1, T]``, both.
        prompt: tokens of the prompt.
    """

    ids: Tensor
    prompt: int


def collect(model: PreTrainedModel, tokenizer: Callable, count: int, tokens: int, calibration: int) -> Texts:
    """Return `count` samples of each kind, `tokens` of each to be measured.

    Args:
        model: compiled so that it never exits, or not compiled.
        tokenizer: of the model.
        count: samples of each kind; at most as many own ones as there are prompts.
        tokens: tokens measured in each.
        calibration: passages set aside for calibration.
    """
    prompts = [shared.encode(tokenizer, prompt) for prompt in PROMPTS[:count]]
    context = max(prompt.shape[1] for prompt in prompts)
    own = tuple(greedy(model, prompt, context + tokens) for prompt in prompts)
    passages = topics()
    rows = [tokenizer(text)["input_ids"][: context + tokens] for text in reversed(passages[calibration:])]
    held_out = tuple(torch.tensor([row]) for row in rows if len(row) == context + tokens)[:count]
    return Texts(own, held_out, tuple(passages[:calibration]), context)


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
    """Answer questions greedily, as one batch and without compiled code; an answer may end early."""
    prompts = [shared.encode(tokenizer, question)[0] for question in questions]
    length = max(map(len, prompts))
    padding = [length - len(prompt) for prompt in prompts]
    pad = tokenizer.pad_token_id or 0
    ids = torch.stack([functional.pad(p, (n, 0), value=pad) for p, n in zip(prompts, padding, strict=True)])
    mask = torch.stack([functional.pad(torch.ones_like(p), (n, 0)) for p, n in zip(prompts, padding, strict=True)])
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, disable_compile=True)
    ends = model.generation_config.eos_token_id
    ends = torch.tensor(ends if isinstance(ends, list) else [ends])
    found = []
    for row, n in zip(out, padding, strict=True):
        ended = torch.isin(row[length:], ends).nonzero()
        stop = length + int(ended[0]) + 1 if len(ended) else len(row)
        found.append(Answer(row[None, n:stop].clone(), length - n))
    return found
