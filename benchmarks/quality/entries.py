"""How near the twins' KV entries are to the backbone's, and what the exit score tells of it beforehand.

The texts run with one exit depth for every token, so that the entries also read a history of such entries, as they do
in generation. A cosine is that of one token's keys (or values) of all heads of a layer, twin against backbone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import StaticCache

from river_compile.evaluation.meter import Meter


def depths_of(num_blocks: int) -> list[int]:
    """Return some ten exit depths, those that the summaries need among them."""
    depths = {0, 1, 2, *range(4, num_blocks, max(1, num_blocks // 8)), num_blocks - 1}
    return sorted(depth for depth in depths if depth < num_blocks)


def measure(meter: Meter, depths: Sequence[int]) -> dict:
    """Return mean cosines by (exit depth, layer), similarities by layer, and their correlation with the final error.

    Args:
        meter: of a session.
        depths: exit depths, ascending.
    """
    blocks, texts = meter.num_blocks, range(len(meter.references))
    plain = [_entries(meter, i, blocks) for i in texts]
    cosines = {depth: _cosines(meter, plain, depth) for depth in depths}  # each [keys and values, layers, tokens]
    similarity = torch.tensor([step.scores for run in meter.references for step in run.steps])  # [tokens, L - 1]
    return {
        "depths": list(depths),
        "keys": [cosines[d][0].mean(-1).tolist() for d in depths],
        "values": [cosines[d][1].mean(-1).tolist() for d in depths],
        "similarity": {
            "mean": similarity.mean(0).tolist(),
            "low": similarity.quantile(0.1, dim=0).tolist(),
            "high": similarity.quantile(0.9, dim=0).tolist(),
        },
        "correlation": {
            "depths": [d for d in depths if d >= 1],
            "rank": [rank_correlation(similarity[:, d - 1], 1 - cosines[d][1, -1]) for d in depths if d >= 1],
        },
    }


def summary(entries: dict, depth: int) -> dict[str, float]:
    """Return mean and least value cosine of the layers after an exit depth, and the mean key cosine."""
    row = entries["depths"].index(depth)
    values, keys = entries["values"][row][depth:], entries["keys"][row][depth:]
    mean = sum(values) / len(values)
    return {"depth": depth, "values_mean": mean, "values_least": min(values), "keys_mean": sum(keys) / len(keys)}


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Return Spearman's correlation of two series ``[tokens]``; NaN where one of them is constant."""
    ranks = torch.stack([x.double().argsort().argsort().double() for x in (a, b)])
    return torch.corrcoef(ranks)[0, 1].item()


def _cosines(meter: Meter, plain: Sequence[Tensor], depth: int) -> Tensor:
    return torch.cat(
        [torch.cosine_similarity(_entries(meter, i, depth), known, dim=-1) for i, known in enumerate(plain)], dim=-1
    )


def _entries(meter: Meter, text: int, depth: int) -> Tensor:
    """Return keys and values ``[2, layers, tokens, heads x head dim]`` of a text whose tokens left at a depth."""
    steps = len(meter.references[text].steps)
    meter.run_at(text, [depth] * steps)
    return of_cache(meter.cache, slice(-steps, None))


def of_cache(cache: StaticCache, slots: slice) -> Tensor:
    """Return keys and values ``[2, layers, tokens, heads x head dim]`` of a batch of one in some slots of a cache."""
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    flat = [[t[0, :, slots].transpose(0, 1).flatten(1).float() for t in pair] for pair in pairs]
    return torch.stack([torch.stack(kind) for kind in zip(*flat, strict=True)])
