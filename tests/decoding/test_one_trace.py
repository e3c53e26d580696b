"""One graph that Dynamo traces serves the prompt, the draft steps and the verifying passes of a call."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import LlamaForCausalLM

from river_compile import accelerate, report
from river_compile.runtime.state import on_step
from tests.support.families import CONFIGS, VOCABULARY, make, prompt

OPTIONS = {"group_size": 32, "quantizer": "rtn", "compile_cache": False}


def generate(model, ids, tokens=12, **arguments):
    return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, **arguments)


@pytest.fixture
def traced():
    """Returns how many graphs Dynamo traced since the test began."""
    torch._dynamo.reset()
    counters.clear()
    return lambda: counters["frames"]["ok"]


@pytest.mark.parametrize("quality", ["exact", "fast"])
def test_dynamo_traces_once(traced, quality):
    model = accelerate(make("llama", layers=3), quality, **OPTIONS)
    for length in (9, 2, 30):
        text = generate(model, prompt(length, seed=length))
        if quality == "exact":
            assert torch.equal(text, generate(make("llama", layers=3), prompt(length, seed=length)))
    assert traced() == 1
    assert {(graph.kind, graph.origin) for graph in report(model).graphs} == {
        ("prefill", "traced"),
        ("decode", "derived"),
    }
    assert "decode         3 layers, static cache, from the graph of several tokens;" in str(report(model))


def test_a_prompts_head_is_that_of_its_last_token():
    """Of a long prompt and a large vocabulary all logits would be gigabytes."""
    model, widths = accelerate(make("llama", layers=2), **OPTIONS), []
    with on_step(lambda state, step: widths.append([o.shape[1] for o in state.outputs() if _are_logits(o)])):
        generate(model, prompt(40), tokens=1)  # through Dynamo
        generate(model, prompt(50), tokens=1)
    assert widths == [[1], [1]]


def _are_logits(output) -> bool:
    return isinstance(output, torch.Tensor) and output.dim() == 3 and output.shape[-1] == VOCABULARY


class OwnLlama(LlamaForCausalLM):
    """A class that did not come with transformers: it could do anything with one token."""


def test_code_from_elsewhere_is_traced_for_each_kind_of_pass(traced):
    model = OwnLlama(CONFIGS["llama"](2)).eval()
    model.load_state_dict(make("llama", layers=2).state_dict())
    assert torch.equal(generate(accelerate(model, **OPTIONS), prompt()), generate(make("llama", layers=2), prompt()))
    assert traced() == 3
    assert {graph.origin for graph in report(model).graphs} == {"traced"}


@pytest.mark.slow
def test_a_window_counts_the_tokens_of_a_second_prompt(traced):
    """Its number of tokens is a result of the graph by then, as is that of the prompt's: not of the head's one row."""
    plain, model = make("gemma3", layers=2), accelerate(make("gemma3", layers=2), **OPTIONS)
    for length in (12, 10):
        ids = prompt(length, seed=length)
        assert torch.equal(generate(model, ids, tokens=5), generate(plain, ids, tokens=5))
