"""A model's own greedy text: what it writes to questions, some to measure on and others to calibrate with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tools import models

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
class Answer:
    """A prompt with its answer.

    Attributes:
        ids: ``[1, T]``, both.
        prompt: tokens of the prompt.
    """

    ids: Tensor
    prompt: int


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], new_tokens: int
) -> list[Answer]:
    """Answers questions greedily, as one batch and without compiled code; an answer may end early."""
    prompts = [models.encode(tokenizer, question)[0] for question in questions]
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
