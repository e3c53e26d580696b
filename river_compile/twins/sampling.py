"""Text that a model samples itself, which needs no tokenizer.

Rows begin with a token drawn evenly from the vocabulary and go on with tokens drawn from the model's own distribution,
all in one batch, as LLM-QAT makes its data (Liu et al. 2023, arXiv 2305.17888). The draws have a generator of their
own: a machine makes the same text from the same weights every time, and the caller's random numbers go on undisturbed.
Ranks that share a model all take the first one's draws.

Sampling runs the model as it is, also while Dynamo compiles it. Not handled: models that cannot go on from token ids
and their cache alone (encoder-decoders, models without a head).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from river_compile.runtime.tensor_parallel import ranks_of
from river_compile.upstream.dynamo import uncompiled_forward
from river_compile.upstream.transformers import cache_argument


@torch.no_grad()
def sample(model: nn.Module, rows: int, tokens: int, seed: int = 0) -> Tensor:
    """Returns token ids ``[rows, tokens]`` that a model samples, at temperature 1.

    Raises:
        ValueError: its logits are not finite.
        Exception: what a model raises that cannot be sampled.
    """
    network: Any = model
    forward, device = uncompiled_forward(model), next(model.parameters()).device
    ranks = ranks_of(model.parameters())
    draws = torch.Generator(device).manual_seed(seed)
    vocabulary = network.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (rows, 1), generator=draws, device=device)
    name = cache_argument(model)
    held: dict[str, Any] = {}
    while ids.shape[1] < tokens:
        outputs = forward(input_ids=ids[:, -1:], use_cache=True, **everything_counts(model, ids), **held)
        held = {name: outputs[name]}
        ids = torch.cat([ids, ranks.first(_draw(outputs.logits[:, -1], draws))], dim=1)
    return ids


def _draw(logits: Tensor, draws: torch.Generator) -> Tensor:
    """Draws a token ``[B, 1]`` for each row of logits ``[B, V]``: one random number each, where multinomial takes V."""
    up_to = logits.float().softmax(-1).cumsum(-1)
    if not torch.isfinite(up_to).all():
        raise ValueError("its logits are not finite")
    points = torch.rand(len(logits), 1, generator=draws, device=logits.device) * up_to[:, -1:]
    return torch.searchsorted(up_to, points, right=True).clamp(max=logits.shape[1] - 1)


def enough(model: nn.Module, rows: int, most: int) -> int:
    """Returns how long rows are to be: two tokens for each feature of the hidden state in all, 4 to `most` in a row."""
    network: Any = model
    return min(most, max(4, 2 * network.config.get_text_config().hidden_size // rows))


def everything_counts(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Returns the mask for ids of which none is padding, for a model that takes one: it may draw any token."""
    takes_mask = "attention_mask" in inspect.signature(type(model).forward).parameters
    return {"attention_mask": torch.ones_like(ids)} if takes_mask else {}
