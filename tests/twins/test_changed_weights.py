"""Weights that change after their twins were packed: noticed before the next sequence, and packed again."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from river_compile import RiverWarning, collect_statistics, report, requantize, save_twins
from river_compile.backend import executors_of, river
from river_compile.decoding.mode import exact
from river_compile.exits import forced_depth
from river_compile.kernels.quant.data_free import quantize
from river_compile.record import find_record
from river_compile.twins import weights
from river_compile.twins.pack import TwinWeights
from river_compile.twins.weights import ParameterStamp
from tests.support.families import make, prompt
from tests.support.lowerings import OPERATORS, UNQUANTIZED
from tests.support.traced import TracedStep, dequantized

DOWN = "model.layers.1.mlp.down_proj"
RTN = {"quantizer": "rtn"}


@pytest.fixture(scope="module")
def step():
    return TracedStep()


@pytest.fixture(scope="module")
def executor(step):
    return step.compiled(**RTN)


def site_of(model, name):
    return next(site for site in report(model).packed if site.name == name)


def in_place(layer):
    with torch.no_grad():
        layer.weight.mul_(-1)


def through_data(layer):
    layer.weight.data.mul_(-1)


def merged_adapter(layer):
    """As peft merges: neither counted nor at another address."""
    a, b = torch.randn(4, layer.in_features), torch.randn(layer.out_features, 4)
    layer.weight.data += 0.1 * (b @ a)


def other_data(layer):
    layer.weight.data = -layer.weight.data


def other_parameter(layer):
    layer.weight = nn.Parameter(-layer.weight.detach())


def loaded(layer):
    layer.load_state_dict({"weight": -layer.weight.detach()})


def assigned(layer):
    layer.load_state_dict({"weight": -layer.weight.detach()}, assign=True)


def trained(layer):
    layer.weight.grad = torch.ones_like(layer.weight)
    torch.optim.AdamW([layer.weight], lr=0.1).step()
    layer.weight.grad = None


@pytest.mark.parametrize(
    "change", [in_place, through_data, merged_adapter, other_data, other_parameter, loaded, assigned, trained]
)
@pytest.mark.filterwarnings("ignore::river_compile.RiverWarning")
def test_what_changed_is_packed_again_and_nothing_else(step, executor, change):
    """The next step has the twin of the new weights; what stayed as it was is found again, the same object."""
    model = step.model
    old_logits = step.call(executor)
    before = {site.name: site for site in report(model).packed}
    change(model.get_submodule(DOWN))
    logits = step.call(executor)
    after = {site.name: site for site in report(model).packed}
    assert [name for name in before if after[name] is not before[name]] == [DOWN]
    assert after.keys() == before.keys()
    weight = model.get_submodule(DOWN).weight.detach()
    grid = quantize(weight, 32, "rtn").dequantize()
    torch.testing.assert_close(site_of(model, DOWN).dequantize(), grid, rtol=1e-2, atol=1e-2)
    expected = step.reference(twin_weights(model))  # (in float32: the kernel rounds to bfloat16)
    assert (logits - expected).abs().max() < 0.05 < (logits - old_logits).abs().max()
    assert state_of(model).changed == 1


def twin_weights(model):
    """Returns all of a model's parameters by name, those of packed matrices as their twins have them."""
    return {**{name: p.detach() for name, p in model.named_parameters()}, **dequantized(model, report(model).packed)}


def state_of(model):
    return find_record(model).of(TwinWeights)


def test_weights_put_elsewhere_or_loaded_again_are_the_same(step, executor):
    """ParameterStamp decide nothing alone: with the same bytes nothing is packed and nothing is said."""
    step.call(executor)
    renewals = state_of(step.model).changes
    layer = step.model.get_submodule(DOWN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.weight.data = layer.weight.data.clone()
        step.call(executor)
        step.model.load_state_dict({name: t.clone() for name, t in step.model.state_dict().items()})
        step.call(executor)
        layer.weight = nn.Parameter(layer.weight.detach().clone())
        step.call(executor)
    assert state_of(step.model).changes == renewals
    assert sum(site.name == DOWN for site in report(step.model).packed) == 1
    assert site_of(step.model, DOWN).parameters[0] is layer.weight


def test_a_warning_once_then_the_log_and_the_report(caplog):
    """Who trains is not flooded."""
    step = TracedStep()
    executor = step.compiled(**RTN)
    with caplog.at_level("INFO", logger="river_compile.twins"), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            for layer in step.model.model.layers:
                in_place(layer.mlp.down_proj)
            step.call(executor)
    said = [str(w.message) for w in seen if issubclass(w.category, RiverWarning)]
    assert len(said) == 1
    assert said[0].startswith(
        "RC048: The weights changed after their 4-bit twins were packed (model.layers.0.mlp.down_proj and 1"
    )
    assert caplog.text.count("weights changed after") == 3
    assert "packed again 3 times after weights changed, 2 matrices the last time" in str(report(step.model))
    assert report(step.model).to_dict()["packed_again"] == 3


@pytest.mark.filterwarnings("ignore::river_compile.RiverWarning")
def test_one_changed_element_that_is_counted_shows(step, executor):
    step.call(executor)
    weight = step.model.get_submodule(DOWN).weight
    with torch.no_grad():
        weight[0, 0] = 8
    step.call(executor)
    torch.testing.assert_close(site_of(step.model, DOWN).dequantize()[0, 0], weight.detach()[0, 0], rtol=0.1, atol=0)


def test_one_changed_element_without_a_count_takes_refresh(step, executor):
    """No look shows it; `requantize` reads everything."""
    step.call(executor)
    element = step.model.get_submodule(DOWN).weight.data
    element[0, 0] = 16  # (the model is shared: another test may have written 8)
    step.call(executor)
    assert site_of(step.model, DOWN).dequantize()[0, 0] < element[0, 0] - 4
    assert requantize(step.model) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RiverWarning)
        step.call(executor)
    torch.testing.assert_close(site_of(step.model, DOWN).dequantize()[0, 0], element[0, 0], rtol=0.1, atol=0)
    assert requantize(step.model) == 0
    assert requantize(nn.Linear(2, 2)) == 0


@pytest.mark.filterwarnings("ignore::river_compile.RiverWarning")
def test_inference_tensors_are_watched_too():
    """PyTorch counts nothing there. Twins packed under inference mode are packed again outside of it."""
    with torch.inference_mode():
        step = TracedStep()
        executor = step.compiled(**RTN)
        step.call(executor)
        step.model.get_submodule(DOWN).weight.mul_(-1)
    before = site_of(step.model, DOWN).dequantize()
    step.call(executor)
    torch.testing.assert_close(site_of(step.model, DOWN).dequantize(), -before, rtol=0.1, atol=0.1)


class TestWhatElseTheyAreMadeFrom:
    @pytest.mark.filterwarnings("ignore::river_compile.RiverWarning")
    def test_a_tied_head_in_four_bits(self):
        """The embedding's twin is the head's."""
        step = TracedStep()
        executor = step.compiled(**RTN, lm_head="w4")
        step.call(executor)
        with torch.no_grad():
            step.model.get_input_embeddings().weight.mul_(-1)
        step.call(executor)
        head = site_of(step.model, "lm_head").dequantize()
        torch.testing.assert_close(head, step.model.lm_head.weight.detach(), rtol=0.1, atol=0.05)
        assert state_of(step.model).changed == 1

    def test_awq_follows_a_norm_and_gptq_without_statistics_becomes_hqq(self, tmp_path):
        """The norm that takes a scale up is a source. What was observed before is used, and the warning says so."""
        step = TracedStep()
        observed = collect_statistics(step.model, [prompt(40)], progress=False)
        awq, gptq = step.compiled(quantizer="awq"), step.compiled(quantizer="gptq")
        step.call(awq)
        step.call(gptq)
        with torch.no_grad():
            step.model.model.layers[1].input_layernorm.weight.mul_(2)
        with pytest.warns(RiverWarning, match=r"again in .* s, 1 with the old statistics. river_compile.collect"):
            logits = step.call(awq)
        torch.testing.assert_close(logits, step.call(step.compiled(quantizer="awq")))
        observed.clear()
        in_place(step.model.get_submodule(DOWN))
        step.call(gptq)
        found = {site.asked: site.quantizer for site in report(step.model).packed if site.name == DOWN}
        assert found == {"awq": "awq", "gptq": "hqq"}

    @pytest.mark.filterwarnings("ignore::river_compile.RiverWarning")
    def test_twins_of_an_artifact(self, tmp_path):
        """Its grids are those of the old weights: the new ones are quantized, and can be saved in their turn."""
        step = TracedStep()
        hqq = step.compiled(quantizer="hqq")
        step.call(hqq)
        folder = save_twins(step.model, tmp_path / "old")
        executor = step.compiled(quantizer="hqq", twins=folder)
        step.call(executor)
        in_place(step.model.get_submodule(DOWN))
        logits = step.call(executor)
        assert torch.equal(logits, step.call(hqq))
        kept = {site.folder for site in report(step.model).packed if site.name == DOWN}
        assert kept == {""}
        save_twins(step.model, tmp_path / "new")

    @pytest.mark.filterwarnings("ignore::river_compile.RiverWarning")
    def test_a_stack_of_experts(self):
        """All experts of a stack are one product."""
        step = TracedStep("qwen3_moe", layers=2)
        executor = step.compiled(**RTN)
        step.call(executor)
        name = "model.layers.1.mlp.experts.down_proj"
        stack = step.model.get_parameter(name)
        stack.data.mul_(-1)
        step.call(executor)
        torch.testing.assert_close(site_of(step.model, name).dequantize(), stack.flatten(0, 1), rtol=0.1, atol=0.1)
        assert state_of(step.model).changed == 1

    def test_offloaded_weights_that_only_move_are_not_read(self, monkeypatch):
        """Only looking at a file would bring it back into memory."""
        step = TracedStep()
        executor = step.compiled(**RTN)
        state = state_of(step.model)
        digest = weights.digest_of
        monkeypatch.setattr("river_compile.twins.weights.digest_of", lambda tensors: pytest.fail("weights were read"))
        with state.moving():
            layer = step.model.get_submodule(DOWN)
            layer.weight.data = layer.weight.data.clone()
        step.call(executor)
        assert digest(site_of(step.model, DOWN).parameters) == site_of(step.model, DOWN).digest

    @pytest.mark.filterwarnings("ignore::river_compile.RiverWarning")
    def test_unquantized_twins_have_no_weights_of_their_own(self, step):
        executor = step.compiled(kernels=UNQUANTIZED)
        before = step.call(executor)
        in_place(step.model.get_submodule(DOWN))
        after = step.call(executor)
        assert not torch.equal(before, after)
        torch.testing.assert_close(after, step.reference(dict(step.model.named_parameters())))


class TestGenerate:
    """Through Dynamo and transformers, whose guards and caches are real."""

    @pytest.fixture(scope="class")
    def model(self):
        model = make("qwen2", layers=2)  # with biases
        options = {"kernels": OPERATORS, "quantizer": "rtn", "group_size": 32, "first_exit": 1, "threshold": -1.0}
        model.compile(backend=river, options=options)
        return model

    def text(self, model, **arguments):
        ids = prompt()
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, **arguments)

    @pytest.mark.slow
    def test_reinforcement_learning(self, model):
        """Steps and generations in turn: no graph is traced again, and exact mode has the text of the new weights."""
        self.text(model)
        self.text(model, custom_generate=exact, num_assistant_tokens_schedule="constant")
        graphs = len(report(model).graphs)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        for round_number in range(2):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore" if round_number == 0 else "error", RiverWarning)
                drafted = self.text(model, custom_generate=exact, num_assistant_tokens_schedule="constant")
                self.text(model)
            assert all(site.is_current for site in report(model).packed)
            compiled, model._compiled_call_impl = model._compiled_call_impl, None
            assert torch.equal(drafted, self.text(model))
            model._compiled_call_impl = compiled
        assert len(report(model).graphs) == graphs
        assert state_of(model).changes == 2

    def test_another_dtype(self, model):
        """The model is traced again; its twins are made from the converted weights, and their biases are converted."""
        self.text(model)
        model.bfloat16()
        self.text(model)
        (executor,) = [e for e in executors_of(model) if e.decodes][-1:]
        dtypes = {t.dtype for step in executor.compiled.plain.steps.values() for t in step.packed[2:3]}
        assert dtypes == {torch.bfloat16}
        packed = report(model).packed
        assert {site.name for site in packed if site.is_current} == {site.name for site in packed}


class TestWhenItIsLookedAt:
    def test_a_step_that_goes_on_looks_at_nothing(self, step, executor, monkeypatch):
        """Looking takes a millisecond for 200 matrices, and is for the first token of a sequence."""
        seen = []
        take = ParameterStamp.__init__
        monkeypatch.setattr(
            ParameterStamp, "__init__", lambda self, tensors: seen.append(len(tensors)) or take(self, tensors)
        )
        step.call(executor)
        seen.clear()
        inputs = step.inputs()
        with forced_depth(0), torch.no_grad():
            executor(*inputs)
            executor(*inputs)
        assert len(seen) == 1
        step.call(executor)
        assert len(seen) == 2
