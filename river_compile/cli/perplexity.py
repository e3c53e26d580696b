"""Perplexity of a text whose tokens are decoded one by one, as generation runs them, in each way of running a model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .ways import CALIBRATED, FAST, PLAIN, RIVER, running

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WAYS = (PLAIN, FAST, RIVER)  # (exact and strict keep the plain model's)
_CONTEXT = 16


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    tokens: int,
    calibration: Path | None,
    rule: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """Returns perplexity and the number of tokens for each way; `rule` has options of the backend for "fast".

    Raises:
        ValueError: no text is long enough.
    """
    import torch

    length = _CONTEXT + tokens
    rows = [tokenizer(text)["input_ids"][:length] for text in texts]
    samples = [torch.tensor([row]) for row in rows if len(row) == length]
    if not samples:
        raise ValueError(f"no text has {length} tokens; give longer ones, or a smaller --new-tokens")
    ways = (*WAYS, CALIBRATED) if calibration else WAYS
    results = {}
    for way in ways:
        with running(model, way, calibration, **(rule if way == FAST else {})), torch.inference_mode():
            losses = [loss for ids in samples for loss in _losses(model, ids)]
        mean = sum(losses) / len(losses)
        results[way] = {"score": math.exp(mean), "tokens": len(losses), "nats_per_token": mean}
    return results


def _losses(model: PreTrainedModel, ids: Any) -> list[float]:
    """Returns each decoded token's loss in nats; the context runs as a prompt."""
    from torch.nn.functional import cross_entropy
    from transformers import StaticCache

    from river_compile.upstream.hf_cache import cache_argument

    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=ids.shape[1])
    held = {cache_argument(model): cache, "use_cache": True}
    model(input_ids=ids[:, :_CONTEXT], **held)
    losses = []
    for i in range(_CONTEXT, ids.shape[1] - 1):
        logits = model(input_ids=ids[:, i : i + 1], position_ids=ids.new_tensor([[i]]), **held).logits[0, -1]
        losses.append(float(cross_entropy(logits.float()[None], ids[0, i + 1 : i + 2])))
    return losses
