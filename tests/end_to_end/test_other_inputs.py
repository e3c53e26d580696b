"""Prompts that come as embeddings, and blocks that keep the state of a convolution or a recurrence: text and cache.

A twin writes such a state as its block does, so any exit of an unquantized river is the plain model here too.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Lfm2Config, PreTrainedModel, Qwen3NextConfig

import river_compile
from river_compile.backend import river
from river_compile.decoding.mode import decode, exact
from river_compile.exits import forced_depth
from tests.support.decoding import new_cache
from tests.support.families import COMMON, make, prompt
from tests.support.lowerings import UNQUANTIZED

NEW_TOKENS = 4
EAGER = {"kernels": UNQUANTIZED, "first_exit": 1, "on_unsupported": "raise"}


def lfm2() -> PreTrainedModel:
    """One block with a convolution, one with attention."""
    config = Lfm2Config(**COMMON, num_hidden_layers=2, layer_types=["conv", "full_attention"])
    return AutoModelForCausalLM.from_config(config).eval()


def qwen3_next() -> PreTrainedModel:
    """One block with a convolution and a recurrence (gated delta rule), one with attention; experts in both."""
    config = Qwen3NextConfig(
        **COMMON, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], head_dim=32,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def generate(model: PreTrainedModel, static: bool = False, **options: object) -> Tensor:
    cache = {"cache_implementation": "static"} if static else {}
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, **cache, **options}
    return model.generate(disable_compile=True, **options)


def held(cache) -> list[Tensor]:
    """Returns what every layer of a cache holds: keys and values, or the states of a convolution and a recurrence."""
    found = []
    for layer in cache.layers:
        states = [*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values()]
        found += [t for t in (*states, getattr(layer, "keys", None), getattr(layer, "values", None)) if t is not None]
    return found


@pytest.mark.parametrize(("build", "static"), [(lfm2, False), (qwen3_next, True)])
@pytest.mark.slow
def test_hybrids_give_the_plain_text_and_states_at_every_depth(build: Callable[[], PreTrainedModel], static: bool):
    torch.manual_seed(0)
    model = build()
    inputs = {"input_ids": prompt(7), "return_dict_in_generate": True, "output_logits": True, "static": static}
    plain = generate(model, **inputs)
    model.compile(backend=river, options=EAGER)
    for depth in range(3):
        with forced_depth(depth), river_compile.trace() as trace:
            ours = generate(model, **inputs)
        assert [step.depth for step in trace.tokens] == [depth] * (NEW_TOKENS - 1)
        assert torch.equal(ours.sequences, plain.sequences)
        torch.testing.assert_close(ours.logits, plain.logits, rtol=1e-4, atol=1e-4)
        assert len(held(ours.cache)) == len(held(plain.cache)) > 2
        torch.testing.assert_close(held(ours.cache), held(plain.cache), rtol=1e-4, atol=1e-4)
    assert {graph["cache"] for graph in river_compile.report(model).to_dict()["graphs"]} == {
        "static" if static else "dynamic"
    }
    if build is qwen3_next:
        with pytest.raises(ValueError, match="recurrent state of Qwen3NextForCausalLM"):
            generate(model, custom_generate=exact, num_assistant_tokens_schedule="constant", **inputs)


def test_exact_mode_reads_a_prompt_of_embeddings():
    """The text is the one from ids; the twins draft it, and lookup knows the new text alone."""
    model, ids = make("llama", layers=2), prompt(7)
    embeds = model.get_input_embeddings()(ids).detach()
    plain = generate(model, input_ids=ids, max_new_tokens=12)[:, 7:]
    model.compile(backend=river, options={**EAGER, "quantizer": "rtn", "group_size": 32})
    with river_compile.trace() as trace:
        exactly = {"custom_generate": exact, "num_assistant_tokens": 1, "num_assistant_tokens_schedule": "constant"}
        ours = generate(model, inputs_embeds=embeds, max_new_tokens=12, **exactly)
    assert torch.equal(ours, plain)
    assert trace.kept_sources["river"] > 0


def test_exact_mode_refuses_a_convolution_by_name():
    """What it holds of a draft cannot be taken back. The loop without drafts has the plain text."""
    torch.manual_seed(0)
    model, inputs = lfm2(), {"input_ids": prompt(7), "max_new_tokens": 12}
    plain = generate(model, **inputs)
    assert torch.equal(generate(model, custom_generate=decode, **inputs), plain)
    model.compile(backend=river, options={**EAGER, "quantizer": "rtn", "group_size": 32})
    with pytest.raises(ValueError, match=r"layers of kind .*LinearAttentionLayer.* do not allow"):
        generate(model, custom_generate=exact, **inputs)


def test_prompts_and_steps_of_embeddings_give_the_plain_text():
    """The prompt comes as embeddings, then ids; and a step that comes as an embedding leaves like any other."""
    model = make("llama", layers=2)
    embeds = torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(0)) / 4
    inputs = {"inputs_embeds": embeds, "return_dict_in_generate": True}
    plain = generate(model, cache=new_cache(model, "static"), **inputs)
    with torch.no_grad():
        step = model(inputs_embeds=embeds[:, :1], cache=plain.cache).logits
    model.compile(backend=river, options=EAGER)
    for depth in (0, 1):
        with forced_depth(depth), torch.no_grad(), river_compile.trace() as trace:
            ours = generate(model, cache=new_cache(model, "static"), **inputs)
            last = model(inputs_embeds=embeds[:, :1], cache=ours.cache).logits
        assert torch.equal(ours.sequences, plain.sequences)
        torch.testing.assert_close(last, step, rtol=1e-4, atol=1e-4)
        assert [s.depth for s in trace.tokens] == [depth] * NEW_TOKENS
