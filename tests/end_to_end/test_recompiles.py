"""After a short warm-up nothing recompiles, whatever the prompt's length."""

from __future__ import annotations

import pytest
import torch
from transformers import StaticCache

from river_compile import report, river
from tests.support.decoding import cache_argument
from tests.support.families import make, prompt

OPTIONS = {"lowering": "eager", "quantizer": "rtn", "group_size": 32, "threshold": -1.0, "first_exit": 1}
LONGEST = 300
NEW_TOKENS = 3


@pytest.mark.core
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_prompts_of_1_to_300_tokens(kind):
    """Warm-up: two lengths (the second makes the length dynamic) and a single token. Then every length must run."""
    model = make("llama", layers=2)
    model.compile(backend=river, options=OPTIONS)
    cache = StaticCache(config=model.config, max_cache_len=LONGEST + NEW_TOKENS) if kind == "static" else None

    def generate(length: int) -> torch.Tensor:
        held = {}
        if cache is not None:
            cache.reset()
            held[cache_argument(model)] = cache
        ids = prompt(length)
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, **held)

    for length in (5, 9, 1, 2):
        generate(length)
    compiled = len(report(model).graphs)
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (*range(1, 33), *range(37, LONGEST, 13), LONGEST):
            assert generate(length).shape == (1, length + NEW_TOKENS)
    assert len(report(model).graphs) == compiled
