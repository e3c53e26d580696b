"""A model that breaks its graph breaks no other model's, and attention that Inductor has no code for runs."""

import warnings

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module

import river_compile
from tests.support.examples import slow
from tests.support.families import make, prompt
from tests.support.lowerings import OPERATORS

OPTIONS = {
    "kernels": OPERATORS,
    "group_size": 32,
    "num_assistant_tokens": 1,
    "num_assistant_tokens_schedule": "constant",
}

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def generate(model):
    ids = prompt()
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)


def generated(model):
    """Returns the text, the trace and River's warnings."""
    with warnings.catch_warnings(record=True) as said, river_compile.trace() as trace:
        warnings.simplefilter("always")
        text = generate(model)
    return text, trace, [str(w.message) for w in said if issubclass(w.category, river_compile.RiverWarning)]


class Breaks(ModelHook):
    """What accelerate puts around a block whose weights it moves: code that Dynamo does not trace."""

    @torch.compiler.disable
    def pre_forward(self, module, *args, **kwargs):
        return args, kwargs


def with_accelerates_hooks(model):
    for block in model.model.layers:
        add_hook_to_module(block, Breaks())
    return model


def with_forward_hooks(model):
    for block in model.model.layers:
        block.register_forward_hook(torch.compiler.disable(lambda module, args, output: output))
    return model


@pytest.mark.parametrize("hooked", [with_accelerates_hooks, slow(with_forward_hooks)])
def test_a_model_whose_hooks_break_its_graph_takes_the_river_from_no_other_one(hooked):
    """It keeps its text and a warning names the break; the next model of its class is rewritten and drafts."""
    broken, whole = (river_compile.accelerate(make("llama", layers=2, seed=i), **OPTIONS) for i in range(2))
    text, _, said = generated(hooked(broken))
    assert torch.equal(text, generate(make("llama", layers=2, seed=0)))
    assert any("Dynamo broke the graph here: " in line for line in said)
    text, trace, said = generated(whole)
    assert torch.equal(text, generate(make("llama", layers=2, seed=1)))
    assert trace.cycles
    assert not said
    assert [graph.refusal for graph in river_compile.report(whole).graphs if graph.refusal] == []


@pytest.mark.slow
def test_a_model_that_is_refused_for_another_reason_names_no_break_of_an_earlier_one():
    generated(with_forward_hooks(river_compile.accelerate(make("llama", layers=2), **OPTIONS)))
    _, _, said = generated(river_compile.accelerate(make("llama", layers=1), **OPTIONS))
    assert any("the graph holds no list of two or more modules" in line for line in said)
    assert not any("Dynamo broke the graph" in line for line in said)


@pytest.mark.slow  # (transformers compiles it: half a minute)
def test_flex_attention_generates_plainly():
    """Its masks on a full cache are wrong; the warning names the attention that works."""
    ours = river_compile.accelerate(make("llama", layers=2, attention="flex_attention"), **OPTIONS)
    text, trace, (said,) = generated(ours)
    assert torch.equal(text, generate(make("llama", layers=2)))
    assert not trace.cycles
    assert "runs without River" in said
    assert "'flex_attention'" in said
    assert "'sdpa'" in said
