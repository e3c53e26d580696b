"""The perplexity of Python's documentation, decoded one token at a time through the exits, as generation runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from river_compile.cli.shared import topics
from river_compile.evaluation.meter import TextDecoder
from river_compile.reporting.trace import trace

_CONTEXT = 16  # tokens of a text that run as its prompt


def samples_of(tokenizer: PreTrainedTokenizerBase, limit: int, tokens: int) -> list[Tensor]:
    """Return ids ``[1, _CONTEXT + tokens]`` of those of the first `limit` passages that are long enough."""
    length = _CONTEXT + tokens
    rows = [tokenizer(text)["input_ids"][:length] for text in topics()[:limit]]
    samples = [torch.tensor([ids]) for ids in rows if len(ids) == length]
    if not samples:
        raise ValueError(f"no text has {length} tokens; give a smaller --new-tokens")
    return samples


def perplexity(model: PreTrainedModel, samples: Sequence[Tensor]) -> dict[str, float | None]:
    """Return the perplexity of samples under a model as it runs now, and the mean depth of the decode steps."""
    decoder, losses = TextDecoder(model, samples[0].shape[1]), []
    with trace() as steps:
        for ids in samples:
            logits = decoder.logits(ids[:, :-1], _CONTEXT).float()
            losses.append(cross_entropy(logits, ids[0, _CONTEXT + 1 :], reduction="none"))
    nats, depth = torch.cat(losses).mean().item(), steps.mean_depth if steps.tokens else None
    tokens = sum(map(len, losses))
    return {"perplexity": math.exp(nats), "nats_per_token": nats, "tokens": tokens, "mean_depth": depth}
