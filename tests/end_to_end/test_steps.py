"""What steps compute is what Dynamo has them compute, though few run through it, and every change takes effect.

Tiny models with the eager lowering and unquantized twins. What is expected comes from a model whose forward was
compiled (``torch.compile(model.forward)``), which is called through Dynamo every time.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from transformers.generation import LogitsProcessor, LogitsProcessorList

from river_compile.backend import river
from river_compile.upstream.transformers import cache_argument
from tests.support.decoding import cache_state, left_padded, new_cache
from tests.support.examples import slow
from tests.support.families import CONFIGS, HIDDEN, make, prompt
from tests.support.lowerings import UNQUANTIZED

OPTIONS = {"kernels": UNQUANTIZED, "exit_depth": 1}
LAYERS = 2
NEW_TOKENS = 10


def compiled(model: nn.Module, **options) -> nn.Module:
    model.compile(backend=river, options={**OPTIONS, **options})
    return model


def through_dynamo(model: nn.Module, **options) -> nn.Module:
    model.forward = torch.compile(model.forward, backend=river, options={**OPTIONS, **options})
    return model


def generate(model, ids, mask, kind="static", **options):
    """Returns the ids, every step's scores, and the cache's state."""
    cache = new_cache(model, kind, capacity=64)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "disable_compile": True, **options}
    wanted = {"return_dict_in_generate": True, "output_scores": True, cache_argument(model): cache}
    out = model.generate(ids, attention_mask=mask, **wanted, **options)
    return [out.sequences, *out.scores, *(torch.as_tensor(part) for state in cache_state(cache) for part in state)]


@pytest.mark.parametrize(("name", "kind"), [("llama", "static"), slow("llama", "dynamic"), slow("gpt2", "static")])
def test_text_scores_and_entries_are_those_through_dynamo(name, kind):
    """With left padding, of one sequence and of another after it."""
    model, (ids, mask) = compiled(make(name, layers=LAYERS)), left_padded(batch=3)
    expected = generate(through_dynamo(make(name, layers=LAYERS)), ids, mask, kind)
    for _ in range(2):
        assert all(map(torch.equal, generate(model, ids, mask, kind), expected))


@pytest.mark.parametrize("window", [6, 12, 64])
@pytest.mark.slow
def test_sliding_windows_count_as_dynamo_has_them_count(window):
    """Full from the prompt on, filling up on the way, never full."""
    config = CONFIGS["gemma3"](LAYERS)
    config.sliding_window = window
    ours, theirs = (way(make("gemma3", layers=LAYERS, config=config)) for way in (compiled, through_dynamo))
    ids, mask = left_padded(batch=3)
    expected = generate(theirs, ids, mask)
    for _ in range(2):
        assert all(map(torch.equal, generate(ours, ids, mask), expected))


class Adapter(nn.Module):
    """A linear layer with a scaled low-rank one next to it, the scale in a dict as PEFT has it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.scaling = base, {"default": 1.0}
        self.low_rank = nn.Linear(HIDDEN, base.out_features, bias=False)
        with torch.no_grad():
            self.low_rank.weight.copy_(base.weight).mul_(0.5)

    def forward(self, x):
        return self.base(x) + self.scaling["default"] * self.low_rank(x)


def _scaled_weight(model):
    model.model.layers[0].mlp.up_proj.weight.mul_(1.5)


def _other_data(model):
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = 1.5 * weight.data


def _other_parameter(model):
    up = model.model.layers[0].mlp.up_proj
    up.weight = nn.Parameter(1.5 * up.weight)


def _adapter(model):
    attention = model.model.layers[0].self_attn
    attention.k_proj = Adapter(attention.k_proj)


def _scale_of_adapter(model):
    model.model.layers[0].self_attn.q_proj.scaling["default"] = 0.25


def _training_mode(model):
    model.train()


def _configuration(model):
    model.config._attn_implementation = "eager"


def _other_dtype(model):
    norm = model.model.layers[0].post_attention_layernorm
    norm.weight.data = norm.weight.data.half()


# In this order: no step of a model with its own hooks is noted.
CHANGES = [
    _scaled_weight,
    _other_data,
    _other_parameter,
    _training_mode,
    _adapter,
    _configuration,
    _other_dtype,
]


class ChangesModel(LogitsProcessor):
    """Makes a change after every fifth step."""

    def __init__(self, model, changes):
        self.model, self.changes, self.steps = model, list(changes), 0

    @torch.no_grad()
    def __call__(self, input_ids, scores):
        self.steps += 1
        if self.steps % 5 == 0 and self.changes:
            self.changes.pop(0)(self.model)
        return scores


@pytest.mark.parametrize("changes", [CHANGES, [_scale_of_adapter]], ids=["many", "scale"])
def test_what_a_logits_processor_changes_takes_effect_in_the_next_step(changes):
    """The scores of all steps, before and after each change, are the plain model's."""
    texts = []
    for way in (compiled, lambda model, **_: model):
        model, ids = make("llama", layers=LAYERS), prompt()
        attention = model.model.layers[0].self_attn
        attention.q_proj = Adapter(attention.q_proj)
        processors = LogitsProcessorList([ChangesModel(way(model, exit_depth=LAYERS), changes)])
        how = {"logits_processor": processors, "max_new_tokens": 5 * len(changes) + 4}
        texts.append(generate(model, ids, torch.ones_like(ids), **how))
    torch.testing.assert_close(*texts, rtol=1e-4, atol=1e-4)


def test_nothing_of_a_sequence_or_a_model_stays_alive(fresh_dynamo):
    model, (ids, mask) = compiled(make("llama", layers=LAYERS)), left_padded(batch=1)
    cache = new_cache(model, "static")
    held = {cache_argument(model): cache, "max_new_tokens": NEW_TOKENS, "disable_compile": True, "do_sample": False}
    model.generate(ids, attention_mask=mask, **held)
    keys, gone = weakref.ref(cache.layers[0].keys), weakref.ref(model)
    del cache, held
    gc.collect()
    assert keys() is None
    del model
    gc.collect()
    assert gone() is None
