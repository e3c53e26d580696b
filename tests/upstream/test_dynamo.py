"""Which calls reach the river, however often a model is compiled, and that those which do not are noticed.

Dynamo's limit of graphs is set to one or none, so that few traces reach it.
"""

from __future__ import annotations

import gc
import traceback
import warnings

import pytest
import torch
from torch import nn

import river_compile
from river_compile import OptionError, RiverWarning, UnsupportedGraphError, report, river
from river_compile.exits import forced_depth
from river_compile.model_record import find_record
from tests.support.families import HIDDEN, make, prompt

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
OPTIONS = {"lowering": "eager", "quantizer": "none", "first_exit": 1}
WITHOUT_RIVER = r"a forward pass of LlamaForCausalLM ran without the river: "


def compiled(seed: int = 0, **options) -> nn.Module:
    model = make("llama", layers=2, seed=seed)
    model.compile(backend=river, options={**OPTIONS, **options})
    return model


@torch.no_grad()
def prompts_through_river(model: nn.Module, batch: int = 1) -> int:
    """Runs one prompt and returns how many ran through the river so far."""
    model(prompt(batch=batch))
    return sum(report(model).prefill_depths.values())


@pytest.fixture
def one_graph():
    """Dynamo keeps one graph of a model, and one of all that run the same code."""
    with torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=1):
        yield


class TestOptionsAndModels:
    @pytest.mark.usefixtures("one_graph")
    def test_a_model_is_compiled_with_other_options_again_and_again(self):
        """Every call runs through the river, and one graph is kept: that of the latest options."""
        model = compiled()
        for calls, threshold in enumerate((0.5, 0.6, 0.7), start=1):
            model.compile(backend=river, options={**OPTIONS, "threshold": threshold})
            assert prompts_through_river(model) == calls
            (graph,) = report(model).graphs
            assert graph.config.threshold == threshold
        assert [graph.entry.cached for graph in find_record(model).graphs] == [True]

    @pytest.mark.usefixtures("one_graph")
    @pytest.mark.slow
    def test_models_of_one_class_count_for_themselves_and_freed_ones_for_nobody(self):
        models = [compiled(seed) for seed in range(2)]
        for model in models:
            assert prompts_through_river(model) == 1
        assert [prompts_through_river(model) for model in models] == [2, 2]
        entries = [find_record(model).graphs[0].entry for model in models]
        assert [entry.cached for entry in entries] == [True, True]
        del models, model
        gc.collect()
        assert [entry.cached for entry in entries] == [False, False]
        assert prompts_through_river(compiled(seed=2)) == 1


def test_calls_that_do_not_reach_the_river_are_warned_of_and_reported():
    """Under a stance, disabled, and at Dynamo's limit; not where the user runs the plain model."""
    model = compiled()
    assert prompts_through_river(model) == 1
    with torch.no_grad():
        model.forward(prompt())
    assert report(model).plain_runs == 0
    with torch.compiler.set_stance("force_eager"), pytest.warns(RiverWarning, match=WITHOUT_RIVER + r".*set_stance"):
        prompts_through_river(model)
    assert prompts_through_river(model) == 2
    model.forward = torch.compiler.disable(model.forward)
    with pytest.warns(RiverWarning, match=WITHOUT_RIVER + r".*torch\.compiler\.disable"):
        prompts_through_river(model)
    del model.forward
    assert prompts_through_river(model) == 3
    with torch._dynamo.config.patch(recompile_limit=0):
        with pytest.warns(RiverWarning, match=WITHOUT_RIVER + r".*recompile_limit=0\)"):
            prompts_through_river(model, batch=2)
        with warnings.catch_warnings():  # one warning until the river runs again
            warnings.simplefilter("error", RiverWarning)
            assert prompts_through_river(model, batch=2) == 3
    assert report(model).to_dict()["plain_runs"] == 4
    assert "without river  4 forward passes" in str(report(model))
    assert "recompile_limit=0" in str(report(model))
    assert len(report(model).graphs) == 1


@pytest.mark.filterwarnings("ignore:backend 'river' leaves a graph to Inductor")
@pytest.mark.slow
def test_calls_after_a_graph_broke_are_warned_of():
    """A graph breaks in the middle of the code; one warning until the river runs again, and a count in the report."""
    model = compiled()

    def generate(**options: bool) -> int:
        settings = {"attention_mask": torch.ones_like(prompt()), "max_new_tokens": 2, "do_sample": False}
        model.generate(prompt(), **settings, **options)
        return report(model).plain_runs

    assert generate() == 0
    with pytest.warns(RiverWarning, match=WITHOUT_RIVER + ".*output_attentions=True, say"):
        assert generate(output_attentions=True, return_dict_in_generate=True) == 2
    river_again = generate() == 2  # (whether Dynamo traces such code again is a matter of its version)
    assert river_again or "without river  4 forward passes" in str(report(model))
    torch._dynamo.reset()
    before = report(model).plain_runs
    assert generate() == before


class Adapter(nn.Module):
    """A linear layer with a low-rank one beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.low_rank = base, nn.Sequential(nn.Linear(HIDDEN, 4), nn.Linear(4, base.out_features))

    def forward(self, x):
        return self.base(x) + self.low_rank(x)


@torch.no_grad()
def test_hooks_and_adapters_added_after_the_first_call_take_effect():
    """The logits stay the plain model's, bit by bit; a hook that is taken away is gone, without another trace."""
    model, ids = compiled(exit_depth=2), prompt()
    block = model.model.layers[1]

    def logits() -> torch.Tensor:
        through_river = model(ids).logits
        assert torch.equal(through_river, model.forward(ids).logits)
        return through_river

    first = logits()
    hook = block.register_forward_hook(lambda module, args, output: 1.5 * output)
    assert not torch.equal(logits(), first)
    hook.remove()
    assert torch.equal(logits(), first)
    assert len(report(model).graphs) == 2
    block.self_attn.q_proj = Adapter(block.self_attn.q_proj)
    assert not torch.equal(logits(), first)
    assert report(model).prefill_depths == {2: 4}
    assert report(model).plain_runs == 0


def test_an_error_reads_as_it_was_raised():
    """Dynamo adds nothing to the message, and its frames are not shown."""
    model = compiled(treshold=0.7)
    with pytest.raises(OptionError, match=r"did you mean 'threshold'\?\)$") as raised:
        prompts_through_river(model)
    assert str(raised.value).startswith("unknown option 'treshold'")
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

    exact = {"custom_generate": river_compile.exact, "max_draft": 1, "adaptive": False}
    with forced_depth(2):
        plain = text()
    model.compile(backend=river, options={**OPTIONS, "exit_depth": 1, "on_unsupported": "raise"})
    prompts_through_river(model)
    with torch.no_grad(), pytest.raises(UnsupportedGraphError, match="write no KV cache"):
        model(ids, use_cache=False)
    model.compile(backend=river, options=OPTIONS)
    assert torch.equal(text(**exact), plain)
    assert report(model).exact.cycles > 0
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.warns(RiverWarning, match=WITHOUT_RIVER),
        pytest.raises(ValueError, match=r"it ran without it: torch\.compiler"),
    ):
        text(**exact)
