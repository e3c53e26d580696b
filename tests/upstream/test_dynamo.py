"""Which calls reach River, however many models are compiled and whatever changes on one."""

from __future__ import annotations

import gc
import traceback

import pytest
import torch
from torch import nn

import river_compile
from river_compile import report
from river_compile.backend import river
from river_compile.decoding.mode import exact
from river_compile.errors import OptionError, UnsupportedGraphError
from river_compile.exits import forced_depth
from tests.support.families import make, prompt
from tests.support.lowerings import OPERATORS, UNQUANTIZED

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
OPTIONS = {"kernels": UNQUANTIZED, "first_exit": 1}


def compiled(seed: int = 0, **options) -> nn.Module:
    model = make("llama", layers=2, seed=seed)
    model.compile(backend=river, options={**OPTIONS, **options})
    return model


@torch.no_grad()
def prompts_through_river(model: nn.Module, batch: int = 1) -> int:
    """Runs one prompt and returns how many ran through River so far."""
    model(prompt(batch=batch))
    return sum(report(model).prefill_depths.values())


@pytest.mark.slow
def test_models_of_one_class_count_for_themselves_and_freed_ones_for_nobody():
    """Dynamo may keep one graph of a model, and nearly all models share the code that it counts them by."""
    with torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=1):
        models = [compiled(seed) for seed in range(2)]
        for model in models:
            assert prompts_through_river(model) == 1
        assert [prompts_through_river(model) for model in models] == [2, 2]
        del models, model
        gc.collect()
        assert prompts_through_river(compiled(seed=2)) == 1


@pytest.mark.slow
def test_a_model_runs_plainly_beyond_dynamos_limit_of_graphs():
    """So a call whose shapes change each time does not compile for ever."""
    model = compiled()
    with torch._dynamo.config.patch(recompile_limit=1, automatic_dynamic_shapes=False):
        for batch in range(1, 6):
            prompts_through_river(model, batch)
    assert len(report(model).graphs) < 4


def test_a_hook_that_is_added_after_the_first_text_takes_effect():
    """The text stays the plain model's; a hook that is taken away is gone, without another trace."""
    model, ids = river_compile.accelerate(make("llama", layers=2), kernels=OPERATORS, group_size=32), prompt()

    def text() -> torch.Tensor:
        settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
        ours = model.generate(ids, **settings)
        assert torch.equal(ours, type(model).generate(model, ids, **settings))
        return ours

    block, first = model.model.layers[1], text()
    hook = block.register_forward_hook(lambda module, args, output: -2.5 * output)
    assert not torch.equal(text(), first)
    hook.remove()
    graphs = len(report(model).graphs)
    assert torch.equal(text(), first)
    assert len(report(model).graphs) <= graphs


def test_an_error_reads_as_it_was_raised():
    """Dynamo adds nothing to the message, and its frames are not shown."""
    model = compiled(treshold=0.7)
    with pytest.raises(OptionError, match=r"did you mean 'threshold'\?\)\. See .river explain-error RC001.$") as raised:
        prompts_through_river(model)
    assert str(raised.value).startswith("RC001: Unknown option 'treshold'")
    files = [frame.filename for frame in traceback.extract_tb(raised.value.__traceback__)]
    assert not [file for file in files if file.endswith(("convert_frame.py", "symbolic_convert.py", "output_graph.py"))]
    assert files[-1] == river_compile.config.__file__


@pytest.mark.slow
def test_exact_mode_takes_the_graph_that_the_prompt_runs_in():
    """Neither one of other options nor one that was refused, both traced later, stands in its way."""
    model, ids = compiled(), prompt()

    def text(**options) -> torch.Tensor:
        settings = {"max_new_tokens": 3, "do_sample": False, "disable_compile": True, "cache_implementation": "static"}
        return model.generate(ids, attention_mask=torch.ones_like(ids), **settings, **options)

    drafted = {"custom_generate": exact, "num_assistant_tokens": 1, "num_assistant_tokens_schedule": "constant"}
    with forced_depth(2):
        plain = text()
    model.compile(backend=river, options={**OPTIONS, "exit_depth": 1, "on_unsupported": "raise"})
    prompts_through_river(model)
    with torch.no_grad(), pytest.raises(UnsupportedGraphError, match="write no KV cache"):
        model(ids, use_cache=False)
    model.compile(backend=river, options=OPTIONS)
    assert torch.equal(text(**drafted), plain)
    assert report(model).exact.cycles > 0
