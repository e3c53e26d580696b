"""Captures everything a decode needs before the first token that counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers.cache_utils import Cache

from river_compile.capture.device import CaptureLog
from river_compile.exits import CRITERIA, forced_depth, forced_threshold
from river_compile.model_record import GraphRecord, record_of_model
from river_compile.upstream.transformers import cache_argument

_PROMPT = 4  # tokens of a prompt that says nothing
_STEPS = 2  # decode steps per exit: the first one warms up, the second one captures


def warmup(
    model: nn.Module, cache: Cache, *, batch_size: int = 1, depths: Iterable[int] = (), **options: object
) -> CaptureLog:
    """Generates a few tokens at every exit depth, so that all graphs which decoding on a cache needs are captured.

    A capture belongs to the KV cache whose memory it writes: generate with the same cache afterwards. It is emptied
    before this returns. Where nothing can be captured, this still compiles, and the log says why.

    Args:
        model: a model compiled with the river backend.
        cache: a static cache with room for 7 tokens or more.
        batch_size: rows that will be generated together.
        depths: exit depths that `forced_depth` will ask for, such as those of exact mode
            (0 and the number of blocks).
        options: further arguments of ``model.generate``, as they will be used.

    Returns:
        What was captured; ``report(model)`` shows the same.

    Raises:
        ValueError: the cache is too short, or the model never reached the backend.
    """
    room = cache.get_max_length()
    if 0 <= room < _PROMPT + _STEPS + 1:
        raise ValueError(f"warmup needs a cache of {_PROMPT + _STEPS + 1} tokens or more, this one holds {room}")
    ids = torch.ones(batch_size, _PROMPT, dtype=torch.long, device=next(model.parameters()).device)
    settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": _STEPS + 1, **options}
    settings |= {"min_new_tokens": _STEPS + 1, cache_argument(model): cache}

    generate: Any = model.generate

    def run_once() -> None:
        cache.reset()
        generate(ids, **settings)

    with tqdm(desc="river: capturing", unit="exit") as bar:
        run_once()  # compiles, and takes the exit that the compiled rule takes
        bar.update()
        record = _decode_record(model)
        runs = list(_runs(record, depths))
        bar.total = 1 + len(runs)
        for run in runs:
            with run:
                run_once()
            bar.update()
    cache.reset()
    return record.captures


def _runs(record: GraphRecord, depths: Iterable[int]) -> Iterator[AbstractContextManager[None]]:
    """Yields a context for every way that a token can take."""
    criterion, first = CRITERIA[record.config.criterion], record.config.first_exit
    if record.config.exit_depth is None:
        yield forced_threshold(criterion.never, first)
        for depth in record.candidates or (first,):
            yield forced_threshold(criterion.always, depth)
    for depth in depths:
        yield forced_depth(depth)


def _decode_record(model: nn.Module) -> GraphRecord:
    graphs = record_of_model(model, "warmup").graphs
    decode = [g for g in graphs if g.kind == "decode"]
    if not decode:
        raise ValueError(f"nothing to capture: {graphs[-1].refusal or 'generation ran no decode step'}")
    return decode[-1]
