"""The lowering to C++ products: which one is chosen, what twins then compute, and what happens without a compiler."""

import warnings

import pytest
import torch

import river_compile
from river_compile import RiverWarning, report
from river_compile.backend import river
from river_compile.config import RiverConfig
from river_compile.errors import OptionError
from river_compile.exits import WHOLE, forced_depth
from river_compile.kernels.native.build import CannotBuild
from river_compile.lowering import lower
from river_compile.lowering.lower import choose_lowering
from river_compile.passes.program import Lowering
from river_compile.upstream.transformers import cache_argument
from tests.support.decoding import CAPACITY, cache_state, decode, left_padded, new_cache
from tests.support.examples import slow
from tests.support.families import CONFIGS, each, make, prompt
from tests.support.lowerings import OPERATORS

OPTIONS = {"quantizer": "rtn", "group_size": 32, "first_exit": 1}
CPU = torch.device("cpu")


class Ways:
    """A backend that lowers each traced graph in several ways; `now` says which one runs."""

    def __init__(self, *ways: Lowering) -> None:
        self.ways, self.now = ways, ways[0]

    def __call__(self, graph_module, inputs):
        made = {way: river(graph_module, inputs, options={**OPTIONS, "kernels": way}) for way in self.ways}
        return lambda *args: made[self.now](*args)


@pytest.mark.parametrize(("family", "product"), [("qwen2", "linear"), ("mixtral", "experts")])
def test_twins_compute_what_their_grids_say(family, product):
    """Logits and cache entries are close to those of float32 products, and not the same: activations have 8 bits."""
    rounded = Lowering("eager", "native", False)
    model, backend = make(family, layers=2), Ways(OPERATORS, rounded)
    model.compile(backend=backend)
    logits, caches = {}, {}
    for way in backend.ways:
        backend.now, cache = way, new_cache(model, "full")
        with torch.profiler.profile() as profile:
            logits[way], caches[way] = decode(model, cache, [0, 1, 2], plain_prompt=True), cache_state(cache)
        called = {event.name for event in profile.events()}
        assert (f"river_native::{product}" in called) == (way is not OPERATORS)
    assert not torch.equal(logits[OPERATORS][1], logits[rounded][1])
    for a, b in zip(logits[OPERATORS], logits[rounded], strict=True):
        assert torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.98
    for a, b in zip(caches[OPERATORS], caches[rounded], strict=True):
        for x, y in zip(a[:2], b[:2], strict=True):
            assert torch.cosine_similarity(x.flatten(), y.flatten(), dim=0) > 0.98
        assert a[2] == b[2]


@torch.no_grad()
def test_the_option_reaches_the_kernels_through_inductor():
    """Compiled twins give the logits of the same products called operator by operator."""
    model, found = make("llama", layers=2), []
    ids, mask = left_padded(2)
    for kernels in ("native", Lowering("eager", "native", False)):
        torch._dynamo.reset()
        model.compile(backend=river, options={**OPTIONS, "kernels": kernels, "exit_depth": 0})
        cache = new_cache(model, "full")
        model.forward(input_ids=ids, attention_mask=mask, past_key_values=cache)
        longer = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        found.append(model(input_ids=ids[:, -1:], attention_mask=longer, past_key_values=cache).logits)
        assert {site.weight.layout for site in report(model).packed} == {"native"}
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-2)


@torch.no_grad()
def passes(model, widths: list[int], batch: int = 2) -> list[torch.Tensor]:
    """Feeds a left-padded prompt and then fixed tokens, so many in each pass; returns the logits ``[B, T, V]``.

    Those of padding, which reads no slot and which no kernel reads, are 0.
    """
    ids, mask = left_padded(batch)
    tokens = prompt(sum(widths), batch, seed=1)
    mask = torch.cat([mask, torch.ones(batch, CAPACITY - mask.shape[1], dtype=mask.dtype)], 1)
    held = {"use_cache": True, cache_argument(model): new_cache(model, "full")}
    padding = mask[:, : ids.shape[1], None] == 0
    logits = [model(input_ids=ids, attention_mask=mask[:, : ids.shape[1]], **held).logits.masked_fill(padding, 0.0)]
    start = 0
    for width in widths:
        position = mask.cumsum(1)[:, ids.shape[1] + start : ids.shape[1] + start + width] - 1
        new = tokens[:, start : start + width]
        with forced_depth(WHOLE):
            logits.append(model(input_ids=new, attention_mask=mask, position_ids=position, **held).logits)
        start += width
    return logits


FEW = ("llama", "qwen3", "gpt2", "opt", "phi", "falcon", "gemma2", "gemma3", "mixtral", "gpt_oss")


@pytest.mark.parametrize("compiler", ["eager", slow("inductor")])
@pytest.mark.parametrize("name", each(FEW, quick=("llama", "gemma3", "mixtral", "gpt_oss")))
def test_passes_of_several_tokens_compute_what_the_model_does(name, compiler):
    """A prompt, and then passes of three tokens, of one and of four; nothing leaves.

    What no kernel computes runs operator by operator, or goes through Inductor, which takes ten times as long.
    """
    widths = [3, 1, 4]
    model = make(name, layers=2)
    expected = passes(model, widths)
    torch._dynamo.reset()
    model.compile(backend=river, options={**OPTIONS, "kernels": Lowering(compiler, "native", fuse=True)})
    for found, plain in zip(passes(model, widths), expected, strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
    if name in ("gemma2", "gpt_oss"):  # whose scores are capped, or have sinks
        several = [graph for graph in report(model).to_dict()["graphs"] if graph["kind"] == "prefill"]
        assert several
        assert all(graph["fused"]["attention"] for graph in several)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
@pytest.mark.slow
def test_a_token_has_the_same_bits_in_passes_of_any_width(name):
    """Only a step's embedding stage goes through Inductor; up to eight rows no sum depends on the others."""
    model = make(name, layers=2, dtype=torch.bfloat16)
    model.compile(backend=river, options={**OPTIONS, "kernels": "native"})
    found = [torch.cat(passes(model, widths, batch=1)[1:], 1) for widths in ([1] * 8, [8], [3, 5], [2, 4, 2])]
    assert all(torch.equal(logits, found[0]) for logits in found[1:])
    for graph in report(model).to_dict()["graphs"]:
        assert graph["missed"] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_prologue_of_an_embedding_and_rotary_tables_is_recorded_with_what_follows(dtype):
    """Every unit of a step is captured; with another embedding stage that would be a separate unit, which is not."""
    model = make("llama", layers=2, dtype=torch.bfloat16)
    model.model.rotary_emb.to(dtype)  # (float32 where a model is loaded, the model's where it was cast)
    options = {"quantizer": "rtn", "group_size": 32, "kernels": "native", "exit_depth": 0}
    river_compile.accelerate(model, "fast", compile_cache=False, **options)
    model.generate(prompt(), max_new_tokens=4, do_sample=False, pad_token_id=0)
    graphs = [graph for graph in report(model).to_dict()["graphs"] if graph["captures"]["captures"]]
    assert all(graph["captures"]["uncaptured_units"] == {} for graph in graphs)
    assert "tail 0" in {capture["unit"] for graph in graphs for capture in graph["captures"]["captures"]}


def test_which_layout_is_chosen(monkeypatch):
    chosen = choose_lowering(RiverConfig(kernels="native"), CPU)
    assert chosen == Lowering("inductor", "native", True)
    with pytest.raises(OptionError, match="kernels='native' has no kernel for a model on a GPU"):
        choose_lowering(RiverConfig(kernels="native"), torch.device("cuda", 0))
    monkeypatch.setenv("RIVER_COMPILE_ISA", "portable")
    assert choose_lowering(RiverConfig(), CPU) == chosen
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lower.warn_of_slow_lowering(chosen, CPU)


@pytest.mark.parametrize("quality", ["exact", "fast"])
def test_where_the_compiler_refuses_the_kernels_a_model_runs_plainly_and_it_is_said_once(monkeypatch, quality):
    def refuses(*_):
        raise CannotBuild("it knows\nno such flag")

    ids, plain = prompt(), make("llama", layers=2)
    expected = plain.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    monkeypatch.setattr(lower.native_kernels, "load", refuses)
    monkeypatch.setattr("river_compile.lowering.inductor.compile_fx", lambda graph, *_, **__: graph.forward)
    model = river_compile.accelerate(make("llama", layers=2), quality)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", RiverWarning)
        found = [model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0) for _ in range(2)]
    assert all(torch.equal(text, expected) for text in found)
    (said,) = (str(warning.message) for warning in said if issubclass(warning.category, RiverWarning))
    assert "it knows no such flag. If the compiler is the cause, set CXX to another g++ or clang++" in said
    assert all(graph.refusal for graph in report(model).graphs)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.slow
def test_passes_of_gemma_are_recorded_whole(kv_heads):
    """Heads are normalised after positions and heads change places, and one head needs no change; of each pass only the
    embedding stage goes through Inductor, also where the head's entropy decides."""
    config = CONFIGS["gemma3"](2)
    config.sliding_window, config.num_key_value_heads = 2 * CAPACITY, kv_heads
    model = make("gemma3", dtype=torch.bfloat16, config=config)
    model.compile(backend=river, options={**OPTIONS, "kernels": "native", "criterion": "confidence", "threshold": 0.0})
    passes(model, [1, 4, 2, 1], batch=1)
    for graph in report(model).to_dict()["graphs"]:
        assert graph["missed"] == []
        assert set(graph["captures"]["uncaptured_units"]) <= {"prologue"}
