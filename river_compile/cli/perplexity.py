"""Perplexity of a text whose tokens are decoded one by one, as generation runs them, in each way of running a model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from river_compile.cli.ways import FAST, RIVER, running

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from river_compile.evaluation.decoding import TokenByToken

_CONTEXT = 16


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    ways: Sequence[str],
    tokens: int,
    calibration: Path | None,
    rule: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """Returns perplexity and the number of tokens for each of the ways; `rule` has options for "fast" and "river".

    Raises:
        ValueError: no text is long enough.
    """
    import torch

    from river_compile.evaluation.decoding import TokenByToken

    length = _CONTEXT + tokens
    rows = [tokenizer(text)["input_ids"][:length] for text in texts]
    samples = [torch.tensor([row]) for row in rows if len(row) == length]
    if not samples:
        raise ValueError(f"no text has {length} tokens; give longer ones, or a smaller --new-tokens")
    results = {}
    for way in ways:
        with running(model, way, calibration, **(rule if way in (FAST, RIVER) else {})):
            decoder = TokenByToken(model, length)
            losses = [loss for ids in samples for loss in _losses(decoder, ids)]
        mean = sum(losses) / len(losses)
        score = {"score": math.exp(mean), "tokens": len(losses), "nats_per_token": mean}
        results[way] = {**score, "scoring": "decode"}
    return results


def _losses(decoder: TokenByToken, ids: Tensor) -> list[float]:
    """Returns the loss in nats of each token after the first that was decoded; the context runs as a prompt."""
    from torch.nn.functional import cross_entropy

    logits = decoder.logits(ids[:, :-1], _CONTEXT).float()
    losses: list[float] = cross_entropy(logits, ids[0, _CONTEXT + 1 :], reduction="none").tolist()
    return losses
