"""The backend as a user meets it: the ways to switch it on, what it refuses, what it reports, and that it lets go."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import threading
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from torch._inductor import config as inductor
from transformers import pipeline

from river_compile import RiverWarning, collect_statistics, report, trace
from river_compile.backend import executors_of, river
from river_compile.errors import CacheFullError, UnsupportedGraphError
from river_compile.exits import forced_depth, forced_threshold
from river_compile.kernels import ops
from river_compile.reporting.report import histogram
from tests.support.decoding import CAPACITY, decode, new_cache
from tests.support.families import CONFIGS, make, prompt
from tests.support.lowerings import OPERATORS, UNQUANTIZED
from tests.support.tokenizers import byte_tokenizer
from tests.support.traced import TracedStep

ROOT = Path(__file__).parent.parent
EAGER = {"kernels": OPERATORS, "quantizer": "rtn", "group_size": 32, "first_exit": 1}
ALWAYS = {**EAGER, "threshold": -1.0}


def generate(model, batch=1, new_tokens=6, **options):
    ids = prompt(batch=batch)
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, **options
    )


@pytest.fixture(scope="module")
def always():
    """A model whose tokens all leave after one block, for tests that change nothing of it."""
    model = make("llama", layers=2)
    model.compile(backend=river, options=ALWAYS)
    return model


@pytest.fixture(scope="module")
def unquantized():
    """A model whose tokens all leave, through twins that hold the weights as they are."""
    model = make("llama", layers=2)
    model.compile(backend=river, options={**ALWAYS, "kernels": UNQUANTIZED})
    return model


def test_model_compile_and_compiled_forward_go_through_generate(always):
    """Both ways give the same text, the report says that tokens left, and nothing is warned of."""
    model = make("llama", layers=2)
    model.forward = torch.compile(model.forward, backend=river, options=ALWAYS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RiverWarning)
        with trace() as seen:
            text = generate(always)
        assert torch.equal(generate(model), text)
    assert [step.depth for step in seen.tokens] == [1] * 5
    assert report(model).decode_depths == {1: 5}


def test_wrapper_is_rewritten_when_called_but_its_generate_runs_the_original():
    """torch.compile(model)(ids) is rewritten; torch.compile(model).generate never is, and the report says so."""
    model = make("llama", layers=2)
    compiled = torch.compile(model, backend=river, options=ALWAYS)
    compiled.generate(prompt(), max_new_tokens=2, do_sample=False)
    assert not report(compiled).ran
    assert "never ran" in str(report(compiled))
    assert "model.compile" in str(report(compiled))
    with torch.no_grad():
        compiled(prompt())
    assert [g.kind for g in report(compiled).graphs] == ["prefill"]


@pytest.mark.slow
def test_a_mode_reaches_inductor():
    """torch.compile takes a mode or options, not both; Inductor compiles every segment with the mode's settings."""
    step, seen = TracedStep(), []

    def note(graph: torch.fx.Graph) -> None:
        seen.append((inductor.max_autotune, inductor.coordinate_descent_tuning))

    with inductor.patch(post_grad_custom_post_pass=note, force_disable_caches=True):
        step.rewrite(mode="max-autotune-no-cudagraphs")
    (graph,) = report(step.model).to_dict()["graphs"]
    assert seen == [(True, True)] * len(graph["segments"])
    assert len(seen) > 2


@pytest.mark.core
@pytest.mark.parametrize("arguments", [{"num_beams": 3}, {"do_sample": True, "top_k": 5, "num_return_sequences": 3}])
def test_beam_search_and_sampling_run_through_the_river(unquantized, arguments):
    """Twins that hold the weights as they are give the plain model's text, whose beams and draws change the cache."""
    ids = prompt(batch=2)

    def text(model) -> torch.Tensor:
        torch.manual_seed(0)
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, **arguments)

    with trace() as seen:
        assert torch.equal(text(unquantized), text(make("llama", layers=2)))
    assert {step.depth for step in seen.tokens} == {1}


def test_pipeline_goes_through_a_compiled_model(always):
    pipe = pipeline("text-generation", model=always, tokenizer=byte_tokenizer(), device="cpu")
    with torch.no_grad(), trace() as seen:
        pipe("abc", max_new_tokens=3, do_sample=False)
    assert [step.depth for step in seen.tokens] == [1, 1]


@torch.inference_mode()
def test_a_model_made_in_inference_mode_is_observed_packed_and_decoded():
    """PyTorch counts no changes of its weights."""
    model, texts = make("llama", layers=2), [prompt(8, seed=seed) for seed in range(2)]
    assert next(model.parameters()).is_inference()
    assert collect_statistics(model, texts, progress=False).tokens == 16
    model.compile(backend=river, options={"kernels": OPERATORS, "group_size": 32, "quantizer": "gptq"})
    logits = decode(model, new_cache(model, "static"), [2, 0], plain_prompt=True)
    expected = decode(model, new_cache(model, "static"), [None, None], compiled=False)
    torch.testing.assert_close(logits[1], expected[1])
    assert 1e-4 < (logits[2] - expected[2]).abs().max() < 1
    assert len(report(model).packed) > 0


class TestRefusals:
    """Graphs that are no decoder run as Inductor runs them, with one warning that names the reason."""

    def test_a_lone_mlp(self):
        mlp = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 4))
        compiled = torch.compile(mlp, backend=river)
        x = torch.randn(3, 8)
        with torch.no_grad(), pytest.warns(RiverWarning, match="one hidden state must pass") as seen:
            torch.testing.assert_close(compiled(x), mlp(x), rtol=1e-4, atol=1e-5)
        assert len([one for one in seen if issubclass(one.category, RiverWarning)]) == 1  # imports may warn too

    def test_a_graph_that_dynamo_broke_says_where(self):
        """A piece of a model holds no decoder because the model's code broke the graph: the warning names the line."""

        def broken(x):
            y = x + 1
            return y * y.sum().item()

        with (
            torch.no_grad(),
            pytest.warns(RiverWarning, match=r"Dynamo broke the graph here: .*\(test_backend.py:\d+\)"),
        ):
            torch.compile(broken, backend=river, options=EAGER)(torch.ones(3))

    def test_a_graph_that_needs_gradients(self):
        model = make("llama", layers=2)
        model.compile(backend=river, options=EAGER)
        with pytest.warns(RiverWarning, match="needs gradients; run generation under torch.no_grad"):
            loss = model(prompt(), labels=prompt()).loss
        loss.backward()
        assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
        assert "needs gradients" in str(report(model))

    def test_raise_on_request(self):
        compiled = torch.compile(torch.nn.Linear(4, 4), backend=river, options={"on_unsupported": "raise"})
        with (
            torch.no_grad(),
            pytest.raises(
                UnsupportedGraphError, match=r"^RC020: backend=.river. cannot rewrite this graph: no decoder"
            ),
        ):
            compiled(torch.randn(2, 4))


class TestRuntime:
    def test_a_score_that_is_no_number_never_leaves(self):
        step = TracedStep(layers=3)
        with torch.no_grad():
            step.model.model.layers[1].mlp.down_proj.weight.fill_(torch.nan)
        with trace() as t:
            step.run(None, first_exit=2, kernels=UNQUANTIZED)
        assert t.tokens[0].depth == 3
        assert t.tokens[0].scores[0] != t.tokens[0].scores[0]

    def test_a_prompt_may_leave_as_a_whole(self):
        model = make("llama", layers=3)
        model.compile(backend=river, options={**ALWAYS, "prefill": "exit"})
        decode(model, new_cache(model, "static"), [])
        assert report(model).prefill_depths == {1: 1}

    def test_a_forced_depth_needs_its_segments(self):
        with pytest.raises(ValueError, match="compiled with exit_depth=2 and has no other segments"):
            TracedStep().run(0, exit_depth=2)

    @pytest.mark.parametrize("lm_head", ["keep", "w4"])
    @pytest.mark.parametrize("depth", [0, 1, 2])
    def test_one_depth_for_all_needs_no_other_segments(self, depth, lm_head):
        """A fixed depth compiles what it runs and gives the logits of the same depth chosen by force."""
        step, options = TracedStep(), {"quantizer": "rtn", "lm_head": lm_head}
        assert torch.equal(step.run(None, exit_depth=depth, **options), step.run(depth, **options))

    def test_a_forced_threshold_and_first_exit(self):
        """They hold for decode steps inside the context alone, need checks, and a forced depth goes before them."""
        step = TracedStep(layers=4)
        executor = step.compiled(threshold=2.0, quantizer="rtn")
        with trace() as t:
            with forced_threshold(-1.0, first_exit=2):
                step.call(executor, None)
                step.call(executor, 3)
            step.call(executor, None)
        assert [token.depth for token in t.tokens] == [2, 3, 4]
        executor = step.compiled(exit_depth=2, quantizer="rtn")
        with forced_threshold(0.5), pytest.raises(ValueError, match=r"Threshold 0\.5 is not available: this model"):
            step.call(executor, None)

    def test_the_head_in_four_bits_serves_those_who_left(self, monkeypatch):
        """lm_head="w4" changes small logits of a token that left, not the largest, and none of one that stayed."""
        monkeypatch.setattr(ops, "RESCORED", 4)
        step, logits = TracedStep(), {}
        for lm_head in ("keep", "w4"):
            executor = step.compiled(quantizer="rtn", lm_head=lm_head)
            logits[lm_head] = [step.call(executor, depth) for depth in (2, 1)]
        assert torch.equal(logits["keep"][0], logits["w4"][0])
        kept, left = logits["keep"][1], logits["w4"][1]
        alike = torch.isclose(kept, left, rtol=1e-5, atol=1e-5)
        assert (alike.sum(-1) < 8).all()
        assert alike.gather(-1, left.argmax(-1, keepdim=True)).all()

    def test_threads_do_not_mix(self):
        """Two threads on one model and two models, each with its own depth: every text is what it is alone."""
        models = [make("llama", layers=2, seed=seed) for seed in (0, 0, 1)]
        models[1] = models[0]
        for model in {id(m): m for m in models}.values():
            model.compile(backend=river, options=EAGER)
        alone = [run_at(model, depth) for model, depth in zip(models, (1, 2, 0), strict=True)]
        together: list = [None] * 3
        threads = [
            threading.Thread(target=lambda i=i, m=m, d=d: together.__setitem__(i, run_at(m, d)))
            for i, (m, d) in enumerate(zip(models, (1, 2, 0), strict=True))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a, b)

    @pytest.mark.slow
    def test_models_of_one_class_have_twins_of_their_own(self):
        """Dynamo would run the second model with the first one's graph; only the parameters would be its own."""
        models = [make("llama", layers=2, seed=seed) for seed in (0, 1)]
        for model in models:
            model.compile(backend=river, options=EAGER)
        together = [run_at(model, 0) for model in models]
        assert all(executors_of(model) for model in models)
        for model, ids in zip(models, together, strict=True):
            torch._dynamo.reset()
            assert torch.equal(run_at(model, 0), ids)

    def test_a_model_with_other_scales_than_the_one_before_is_fused_whole(self, fresh_dynamo):
        """Dynamo makes a float that two models of a class differ in an input of the second one's graph."""
        for epsilon, head_dim in ((1e-6, 16), (1e-2, 32)):
            config = CONFIGS["llama"](2)
            config.rms_norm_eps, config.head_dim = epsilon, head_dim
            model = make("llama", config=config)
            text = generate(model, cache_implementation="static", disable_compile=True)
            model.compile(backend=river, options={**ALWAYS, "exit_depth": 2, "kernels": "native"})
            assert torch.equal(generate(model, cache_implementation="static"), text)
            assert "not fused" not in str(report(model))
            assert "uncaptured" not in str(report(model))

    def test_a_full_cache_is_an_error_before_anything_is_written(self, fresh_dynamo):
        """The message names slots, fill and fix; cache and counters stay as they were."""
        model = make("llama", layers=2)
        model.compile(backend=river, options=EAGER)
        cache = new_cache(model, "static")
        decode(model, cache, [2] * (CAPACITY - 9), plain_prompt=True)
        before = [(layer.keys.clone(), int(layer.get_seq_length())) for layer in cache.layers]
        with pytest.raises(CacheFullError, match="holds 24 tokens, 24 are filled, and this step adds 1"):
            decode_one(model, cache)
        for layer, (keys, length) in zip(cache.layers, before, strict=True):
            assert torch.equal(layer.keys, keys)
            assert int(layer.get_seq_length()) == length


class TestReport:
    def test_bars_are_in_proportion_and_name_full_depth(self):
        lines = histogram({30: 2, 2: 8}, num_blocks=30)
        assert [line.count("#") for line in lines] == [32, 8]
        assert "8 (80 %)" in lines[0]
        assert not lines[0].endswith("full depth")
        assert lines[1].endswith("full depth")

    def test_report_is_json_and_names_what_was_done(self):
        model = make("deepseek_v3", layers=2)
        model.compile(backend=river, options={**ALWAYS, "group_size": 64})
        decode(model, new_cache(model, "static"), [None] * 5, batch=1, plain_prompt=True)
        seen = json.loads(json.dumps(report(model).to_dict()))
        assert seen["exit_depths"] == {"1": 5}
        assert seen["packed_bytes"] > 0
        assert all(m["sqnr_db"] > 10 for m in seen["matrices"])
        assert any("no plain linear layer reads" in k["reason"] for g in seen["graphs"] for k in g["kept_in_16_bits"])
        text = str(report(model))
        assert "exits          5 decode steps, mean depth 1.00 layers" in text
        assert "in 16 bits" in text
        assert max(map(len, text.splitlines())) <= 120

    @pytest.mark.slow
    def test_one_model_packs_once(self):
        """A second graph of the same model takes the packed weights that are there."""
        model = make("llama", layers=2)
        model.compile(backend=river, options=ALWAYS)
        generate(model, cache_implementation="static")
        first = {p.name: p.tensors[0].data_ptr() for p in report(model).packed}
        generate(model, batch=2, cache_implementation="static")
        assert {p.name: p.tensors[0].data_ptr() for p in report(model).packed} == first
        assert report(model).recompiles > 0

    def test_a_freed_model_leaves_nothing_behind(self, fresh_dynamo):
        model = make("llama", layers=2)
        model.compile(backend=river, options=ALWAYS)
        decode(model, new_cache(model, "static"), [None], plain_prompt=True)
        watched = [weakref.ref(p.tensors[0]) for p in report(model).packed] + [weakref.ref(model)]
        assert len(watched) > 4
        del model
        torch._dynamo.reset()
        gc.collect()
        assert [w() for w in watched if w() is not None] == []

    def test_caches_that_were_let_go_are_freed_but_for_a_few(self, fresh_dynamo):
        """A captured step holds its cache: the latest four that generate has made stay, and none of those before."""
        model, caches = make("llama", layers=2), []
        model.compile(backend=river, options={**ALWAYS, "kernels": "native"})
        how = {"cache_implementation": "static", "disable_compile": True, "return_dict_in_generate": True}
        for _ in range(7):
            made = model.generate(prompt(), max_new_tokens=5, do_sample=False, **how).past_key_values
            caches.append(weakref.ref(made.layers[0].keys))
            del made
        gc.collect()
        assert [cache() is not None for cache in caches] == 3 * [False] + 4 * [True]

    @pytest.mark.slow
    def test_the_structured_trace_shows_the_passes(self, tmp_path):
        """TORCH_TRACE receives the plan, checks and twins by name, and what each pass changed, for tlparse."""
        code = """
from tests.support.traced import TracedStep
TracedStep().run(quantizer="rtn")
"""
        environment = {**os.environ, "TORCH_TRACE": str(tmp_path), "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, timeout=300)
        text = "".join(file.read_text(errors="replace") for file in tmp_path.rglob("*.log"))
        artifacts = {}
        for line in text.splitlines():
            if found := re.search(r'"artifact": {"name": "(river_\w+)"', line):
                artifacts[name := found[1]] = ""
            elif line.startswith("\t"):
                artifacts[name] = artifacts.get(name, "") + line[1:] + "\n"
            else:
                name = ""
        assert {"river_decode_1_twin_layers", "river_decode_report"} <= artifacts.keys()
        assert "exit checks after layers: 1" in artifacts["river_decode_plan"]
        _, twin = artifacts["river_decode_segments"].split("# twin_2 compiled")
        assert "torch.ops.river.linear" in twin
        assert "index_copy_" in twin
        before, after = artifacts["river_decode_3_exit_checks"].split("# block_1 after")
        assert "# block_1 before" in before
        assert "exit_score" not in before
        assert "exit_score" in after


def run_at(model, depth):
    with forced_depth(depth):
        return generate(model, new_tokens=12, cache_implementation="static")


@torch.no_grad()
def decode_one(model, cache):
    from tests.support.decoding import cache_argument

    ids = prompt(1, 2)
    mask = torch.ones(2, CAPACITY + 1, dtype=torch.long)
    return model(
        input_ids=ids, attention_mask=mask, position_ids=torch.full((2, 1), CAPACITY), use_cache=True,
        **{cache_argument(model): cache},
    )  # fmt: skip
