"""Steps a model by hand, so that tests choose each token's exit depth and look into the cache afterwards."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, PreTrainedModel, StaticCache

from river_compile.decoding.kv_cache import KVCache
from river_compile.decoding.passes import Passes
from river_compile.decoding.prompt import Prompt
from river_compile.exits import forced_depth
from river_compile.runtime.state import StepState, on_step
from river_compile.runtime.stats import StepRecord
from river_compile.upstream.transformers import cache_argument, cache_of, full_static_cache, mark_dynamic
from tests.support.families import prompt

CAPACITY = 24


class Scores(LogitsProcessor):
    """Notes the scores of each step."""

    def __init__(self):
        self.steps = []

    def __call__(self, input_ids, scores):
        self.steps.append(scores.clone())
        return scores


def new_cache(model: PreTrainedModel, kind: str, capacity: int = CAPACITY) -> StaticCache | DynamicCache:
    """Returns one of transformers' kinds, "static" or "dynamic", or a static one without ring buffers, "full"."""
    config = model.config.get_text_config()
    if kind == "full":
        return full_static_cache(model, capacity)
    return StaticCache(config=config, max_cache_len=capacity) if kind == "static" else DynamicCache(config=config)


def left_padded(batch: int, length: int = 9) -> tuple[Tensor, Tensor]:
    """Returns ids and mask ``[batch, length]``; row i starts with i padding tokens."""
    ids = prompt(length, batch)
    mask = torch.ones_like(ids)
    for row in range(batch):
        ids[row, :row] = 0
        mask[row, :row] = 0
    return ids, mask


@torch.no_grad()
def run_plainly(model, **inputs):
    """Runs a prompt as if the model were not compiled; the cache is then as a compiled prompt leaves it.

    (Outside of Dynamo transformers marks a static cache's tensors, which makes them look like weights in a graph.)
    """
    outputs = model.forward(**inputs)
    for layer in cache_of(inputs).layers:
        for tensor in vars(layer).values():
            if isinstance(tensor, Tensor):
                vars(tensor).pop("_dynamo_static_input_type", None)
    return outputs


@torch.no_grad()
def decode(
    model,
    cache,
    depths: Sequence[int | AbstractContextManager[None] | None],
    batch: int = 2,
    compiled: bool = True,
    plain_prompt: bool = False,
    whole_mask: bool = False,
) -> list[Tensor]:
    """Feeds a left-padded prompt and then fixed tokens, one step for each depth; returns every step's logits.

    Args:
        depths: exit depth of each step; None leaves the choice to the model's exit rule, a context to what it sets.
        compiled: False runs the model as it is (``model.compile`` changes calls, not ``forward``).
        plain_prompt: runs the prompt as if it were not compiled, for tests of steps alone: one graph less to trace.
        whole_mask: the steps' mask spans the whole static cache, so that no input of a step changes its size.
    """
    run = model if compiled else model.forward
    run_prompt = functools.partial(run_plainly, model) if plain_prompt else run
    held = {"use_cache": True, cache_argument(model): cache}
    ids, mask = (tensor.to(model.device) for tensor in left_padded(batch))
    logits = [run_prompt(input_ids=ids, attention_mask=mask, **held).logits]
    tokens = prompt(len(depths), batch, seed=1).to(model.device)
    for step, depth in enumerate(depths):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        position = mask.sum(-1, keepdim=True) - 1
        rest = CAPACITY - mask.shape[1] if whole_mask else 0
        spanned = torch.cat([mask, mask.new_zeros(batch, rest)], 1)
        ids = torch.tensor(tokens[:, step : step + 1].tolist(), device=model.device)  # (a view has other strides)
        arguments = {"input_ids": ids, "attention_mask": spanned, "position_ids": position}
        mark_dynamic(arguments)  # one graph serves all steps, over static caches too
        with depth if isinstance(depth, AbstractContextManager) else forced_depth(depth):
            logits.append(run(**arguments, **held).logits)
    return logits


def passes_on(model, ids: Tensor, kind: str = "full") -> Passes:
    """Returns passes whose prompt has run."""
    cache = new_cache(model, kind)
    kwargs = {"attention_mask": torch.ones_like(ids), "use_cache": True, cache_argument(model): cache}
    passes = Passes(model, kwargs, KVCache(cache))
    Prompt(passes, ids, model.generation_config).run()
    return passes


@contextlib.contextmanager
def rows_of_steps() -> Iterator[set[int]]:
    """Collects how many rows the decode steps inside have."""
    found: set[int] = set()

    def note(state: StepState, step: StepRecord) -> None:
        if step.decode:
            ids = [arg for arg in state.slots if isinstance(arg, Tensor) and arg.dtype == torch.long and arg.dim() == 2]
            found.add(max(map(len, ids)))

    with on_step(note):
        yield found


def cache_state(cache) -> list[tuple[Tensor, Tensor, int]]:
    """Returns keys, values and length of every layer."""
    return [(layer.keys, layer.values, int(layer.get_seq_length())) for layer in cache.layers]
