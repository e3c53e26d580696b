"""The lowering to the generated kernels, run in Triton's interpreter on CPU tensors.

Every family decodes at every depth with fused twins and, from the same traced graphs and the same 4-bit grids, with
unfused ones in float32: logits, cache entries, slots and lengths agree. The same runs give the table of
`docs/gpu.md`; RIVER_UPDATE_DOCS=1 writes it. A few models go the whole way through Inductor, captured too.
"""

from __future__ import annotations

import functools
import os
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._inductor import metrics

from river_compile import RiverWarning, report, save_twins, trace
from river_compile.backend import executors_of, river
from river_compile.config import RiverConfig
from river_compile.errors import OptionError
from river_compile.exits import forced_depth
from river_compile.lowering import lower
from river_compile.lowering.lower import choose_lowering
from river_compile.lowering.segments import SegmentCompiler
from river_compile.passes.program import Lowering, SegmentSpec
from tests.support.decoding import CAPACITY, cache_argument, cache_state, decode, left_padded, new_cache
from tests.support.examples import slow, slow_but
from tests.support.families import FAMILIES, REWRITTEN, each, make, prompt
from tests.support.lowerings import BLOCK_RULES, FUSED, OPERATORS, UNQUANTIZED
from tests.support.recorder import recording
from tools.kernels.shapes import ModelShape, model_kernels, token_cost
from tools.marked import filled

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"
LAYERS = 2
DEPTHS = [0, 1, LAYERS]
OPTIONS = {"quantizer": "rtn", "group_size": 32, "first_exit": 1}
WHOLE = [*(f for f in REWRITTEN if f.startswith(("llama", "qwen2", "qwen3", "mistral", "ministral"))), "smollm3"]


class Both:
    """A backend that lowers each traced graph in two ways, or more; `fused` says which one runs."""

    def __init__(self, *others: Lowering, **options) -> None:
        self.fused: bool | Lowering = True
        self.ways = {True: FUSED, False: OPERATORS} | {other: other for other in others}
        self.options = {**OPTIONS, **options}

    def __call__(self, graph_module, inputs):
        made = {}
        for way, lowering in self.ways.items():
            made[way] = river(graph_module, inputs, options={**self.options, "kernels": lowering})
        return lambda *args: made[self.fused](*args)


@torch.no_grad()
def steps(model, cache, depths=DEPTHS, batch: int = 2) -> list[Tensor]:
    """Feeds a left-padded prompt to the plain model, and a token for each depth to the compiled one; returns logits.

    The mask spans the cache from the start, so that one decode graph serves all steps.
    """
    held = {"use_cache": True, cache_argument(model): cache}
    ids, mask = (tensor.to(model.device) for tensor in left_padded(batch))
    logits = [model.forward(input_ids=ids, attention_mask=mask, **held).logits]
    mask = torch.cat([mask, torch.ones(batch, CAPACITY - mask.shape[1], dtype=mask.dtype, device=mask.device)], 1)
    tokens = prompt(len(DEPTHS), batch, seed=1).to(model.device)
    for step, depth in enumerate(depths):
        position = mask[:, : ids.shape[1] + step + 1].sum(-1, keepdim=True) - 1
        arguments = {"input_ids": tokens[:, step : step + 1], "attention_mask": mask, "position_ids": position}
        with forced_depth(depth):
            logits.append(model(**arguments, **held).logits)
    return logits


@functools.cache
def run(name: str, **options) -> dict[str, object]:
    torch._dynamo.reset()  # sizes that differ from the family's before would become dynamic ones
    model = make(name, layers=LAYERS)
    both = Both(**options)
    model.compile(backend=both)
    results = {}
    for fused in (True, False):
        both.fused = fused
        cache = new_cache(model, "full")
        logits = steps(model, cache)
        results[fused] = logits, cache_state(cache)
    graphs = [g for g in report(model).to_dict()["graphs"] if g["fused"]]
    twins = [operators(twin) for e in executors_of(model) if e.program.fusions for twin in e.program.twins]
    return {"results": results, "graphs": graphs, "twins": twins, "text": str(report(model))}


def operators(segment: SegmentSpec) -> list[str]:
    """Names River's operators in a segment: on a GPU, as many launches."""
    targets = [node.target for node in segment.code.module.graph.nodes]
    return [target._opname for target in targets if getattr(target, "namespace", "") == "river"]


def assert_same(first, second, **tolerance: float) -> None:
    """Compares the logits of every step, and keys, values and lengths of every layer."""
    for a, b in zip(first[0], second[0], strict=True):
        torch.testing.assert_close(a, b, **tolerance)
    for a, b in zip(first[1], second[1], strict=True):
        torch.testing.assert_close(a[:2], b[:2], **tolerance)
        assert a[2] == b[2]


@pytest.mark.parametrize("name", each(REWRITTEN, ["llama", "gemma3"]))
def test_fused_twins_compute_what_their_nodes_did(name):
    results = run(name)["results"]
    assert_same(results[True], results[False], rtol=1e-4, atol=1e-4)


SHAPES = ("llama", "qwen3", "mistral")  # plain, with norms of queries and keys, with a window that is full


@pytest.mark.parametrize("name", slow_but(SHAPES, (name for name in WHOLE if name != "qwen3_moe")))
def test_these_families_use_every_kernel(name):
    """Llama, Qwen, Mistral and what is shaped like them: each twin takes every rule, no graph misses one."""
    graphs = run(name)["graphs"]
    assert len(graphs) == 1
    for graph in graphs:
        assert graph["missed"] == []
        assert graph["fused"] == {rule: LAYERS for rule in BLOCK_RULES} | {"norm + head": 1, "exit score": 1}
    twins = run(name)["twins"]
    assert len(twins) == LAYERS * len(graphs)
    scaled = name == "ministral3"  # (it multiplies queries by a factor of the position, between write and attention)
    attention = ["kv_fill", "decode_attention"] if scaled else ["attend"]
    assert all(twin == ["linear", *attention, "linear", "linear", "linear"] for twin in twins)


@pytest.mark.parametrize(("name", "batches"), [("qwen3", (1, 2)), ("mistral", (2,)), ("gemma3", (2,))])
@pytest.mark.slow
def test_generate_reaches_the_kernels_in_16_bits(name, batches):
    """`generate` computes masks outside of the graph; its second batch size makes the graph's sizes dynamic."""
    model = make(name, layers=LAYERS, dtype=torch.float16)
    both = Both(exit_depth=0)
    model.compile(backend=both)
    how = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    for batch in batches:
        ids, mask = left_padded(batch)
        found = {}
        for both.fused in (True, False):
            cache = {cache_argument(model): new_cache(model, "full")}
            out = model.generate(ids, attention_mask=mask, max_new_tokens=2, **cache, **how)
            found[both.fused] = out.logits[-1].double()
        error = (found[True] - found[False]).norm() / found[False].norm()
        assert error < 0.004
    graphs = [g for g in report(model).to_dict()["graphs"] if g["fused"]]
    assert len(graphs) == len(batches)
    expected = {rule for rule in BLOCK_RULES if name != "gemma3" or "residual" not in rule}
    for graph in graphs:
        assert {rule for rule in BLOCK_RULES if graph["fused"].get(rule) == LAYERS} == expected


def test_fused_checks_measure_what_the_others_do():
    model = make("qwen2", layers=3)
    both = Both(threshold=2.0)  # nothing leaves, every check is asked
    model.compile(backend=both)
    scores = {}
    for both.fused in (True, False):
        with trace() as t:
            steps(model, new_cache(model, "full"), [None, None])
        scores[both.fused] = torch.tensor([token.scores for token in t.tokens])
    assert scores[True].shape == (2, 2)
    torch.testing.assert_close(scores[True], scores[False], rtol=1e-5, atol=1e-6)


def test_the_report_names_rule_segment_node_and_line_of_a_miss():
    found = run("gemma2")
    missed = found["graphs"][0]["missed"]
    assert {m["rule"] for m in missed} == {"o + residual", "down + residual"}
    assert {m["segment"] for m in missed} == {"twin_1", "twin_2"}
    assert all(m["reason"] == "a norm stands between it and the addition" for m in missed)
    assert all("modeling_gemma2.py:" in m["node"] for m in missed)
    assert (
        "not fused    o + residual in twin_1 and 1 more: a norm stands between it and the addition at" in found["text"]
    )
    assert "fused        exit score x1, norm + q|k|v x2" in found["text"]


def table() -> list[str]:
    """Returns the lines of the page's table of families."""
    lines = ["| family | kernels of a twin | missed |", "|---|---:|---|"]
    for name in FAMILIES:
        if name not in REWRITTEN:
            lines.append(f"| {name} | | not rewritten |")
            continue
        graph = run(name)["graphs"][0]
        twin = [m for m in graph["missed"] if m["segment"] == "twin_1"]
        missed = "; ".join(f"{m['rule']}: {m['reason']}".replace("|", "\\|") for m in twin)
        lines.append(f"| {name} | {len(BLOCK_RULES) - len(twin)} of {len(BLOCK_RULES)} | {missed or 'nothing'} |")
    return lines


@pytest.mark.slow
def test_the_page_lists_what_the_rules_make_of_each_family():
    """RIVER_UPDATE_DOCS=1 replaces the table between the page's marks."""
    new = filled(PAGE, "families", lambda _: "\n".join(table()) + "\n")
    if os.environ.get("RIVER_UPDATE_DOCS"):
        PAGE.write_text(new, encoding="utf-8")
    assert new == PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["llama", "olmo2"])
@pytest.mark.slow
@recording()
def test_through_inductor_and_captured(name):
    """The kernels as opaque operators among Inductor's code, and in recorded units, give what the graphs give alone.

    Four rules miss in OLMo 2: their nodes become Inductor's code, their products the kernel with nothing around it. The
    caches are written in place: Inductor's code is called without wrappers, and clones no cache.
    """
    expected = run(name)["results"][False]
    model = make(name, layers=LAYERS)
    model.compile(backend=river, options={**OPTIONS, "kernels": "triton", "graphs": True})
    cache = new_cache(model, "full")
    for _ in range(3):  # a cache has a state from its second step on, and what ran in that once is captured then
        cache.reset()
        assert_same((steps(model, cache), cache_state(cache)), expected, rtol=1e-4, atol=1e-4)
    (graph,) = report(model).to_dict()["graphs"]
    assert all(s["direct"] for s in graph["segments"])
    assert {c["unit"] for c in graph["captures"]["captures"]} == {
        "span 0-1",
        "last 0-2",
        "tail 0",
        "tail 1",
    }


@pytest.mark.parametrize(("name", "batch"), [("llama", 1), slow("llama", 2), slow("qwen3", 1)])
def test_a_twin_is_five_launches_and_none_of_inductors(name, batch, monkeypatch):
    """The tables of launches count as many. Inductor adds none for the slot, and none for the count of tokens."""
    found, compile_one = {}, SegmentCompiler.compile

    def counting(self, segment, operands):
        metrics.reset()
        known = len(self.compiled)
        result = compile_one(self, segment, operands)
        if len(self.compiled) > known:  # (the other twins are the same function)
            found[segment.name] = len(operators(segment)), metrics.generated_kernel_count
        return result

    monkeypatch.setattr(SegmentCompiler, "compile", counting)
    torch._dynamo.reset()
    model = make(name, layers=LAYERS)
    model.compile(backend=river, options={**OPTIONS, "kernels": "triton", "exit_depth": 0})
    steps(model, new_cache(model, "full"), [0], batch)
    assert {counts for name, counts in found.items() if re.fullmatch(r"twin_\d+", name)} == {(5, 0)}
    shape = ModelShape("tiny", LAYERS, 64, 4, 2, 16, 128, 96)
    assert token_cost(shape, model_kernels(shape))[0].launches == 5


@pytest.mark.slow
def test_generated_products_alone():
    """No rule is asked, each 4-bit product is a kernel, all else Inductor's code."""
    model = make("llama", layers=LAYERS)
    kernels = Lowering("inductor", "triton", fuse=False)
    model.compile(backend=river, options={**OPTIONS, "kernels": kernels, "exit_depth": 0})
    cache = new_cache(model, "full")
    logits = steps(model, cache, [0])
    for a, b in zip(logits, run("llama")["results"][False][0], strict=False):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    (graph,) = report(model).to_dict()["graphs"]
    assert graph["fused"] == {}
    assert graph["missed"] == []


@pytest.mark.parametrize(("policy", "depths"), [("exit", DEPTHS[:2]), ("fetch", DEPTHS)])
@pytest.mark.slow
@recording()
def test_offloaded_blocks_beside_fused_twins(policy, depths, tmp_path):
    model = make("llama", layers=LAYERS)
    options = {**OPTIONS, "offload": 1, "offload_policy": policy, "offload_dir": tmp_path, "graphs": True}
    model.compile(backend=river, options={**options, "kernels": FUSED})
    cache = new_cache(model, "full")
    for _ in range(4):  # a cache has a state from its second step on, and what ran in that once is captured then
        cache.reset()
        for a, b in zip(steps(model, cache, depths), run("llama")["results"][False][0], strict=False):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert report(model).to_dict()["offloaded"]["moved"] > 0
    graph = report(model).to_dict()["graphs"][-1]  # parameters that were moved away are another graph's for Dynamo
    expected = run("llama")["graphs"][0]["fused"]
    if policy == "exit":  # every token leaves after block 1 at the latest, so nothing is asked there
        expected = {rule: count for rule, count in expected.items() if rule != "exit score"}
    assert graph["fused"] == expected
    assert {"tail 0", "tail 1"} <= {c["unit"] for c in graph["captures"]["captures"]}


@pytest.mark.slow
def test_a_head_of_4_bits_takes_the_heads_kernel():
    found = run("llama", lm_head="w4")
    assert_same(found["results"][True], found["results"][False], rtol=1e-4, atol=1e-4)
    fused = found["graphs"][0]["fused"]
    assert fused["norm + head"] == fused["head + largest logits recomputed"] == 1


@pytest.mark.slow
def test_two_rows_of_a_prompt_leave_through_fused_twins():
    """prefill="exit": the rules around the cache stay out, the others hold for many positions, whatever the cache."""
    model, results = make("llama", layers=LAYERS), {}
    both = Both(prefill="exit", exit_depth=0)
    model.compile(backend=both)
    for kind in ("static", "dynamic"):
        for both.fused in (True, False):
            cache = new_cache(model, kind)
            results[both.fused] = decode(model, cache, []), cache_state(cache)
        assert_same(results[True], results[False], rtol=1e-4, atol=1e-4)
    graphs = [g for g in report(model).to_dict()["graphs"] if g["fused"]]
    assert [(g["kind"], g["cache"]) for g in graphs] == [("prefill", "static"), ("prefill", "dynamic")]
    rules = [r for r in BLOCK_RULES if r not in ("rope + kv write", "attention")]
    assert all(g["fused"] == {rule: LAYERS for rule in rules} and not g["missed"] for g in graphs)


def test_saved_twins_serve_both_layouts(tmp_path):
    """Saved twins are grids: whichever lowering saved them, the other one packs the same weights."""
    grids = {}
    for lowering, source in ((FUSED, None), (OPERATORS, "triton"), (FUSED, "plain")):
        torch._dynamo.reset()
        model = make("qwen2", layers=LAYERS)
        options = {**OPTIONS, "exit_depth": 1, "twins": tmp_path / source if source else None}
        model.compile(backend=river, options={**options, "kernels": lowering})
        steps(model, new_cache(model, "full"), [1])
        grids[lowering.layout, source] = {p.name: p.dequantize() for p in report(model).packed}
        if source != "plain":
            save_twins(model, tmp_path / lowering.layout)
    first, *others = grids.values()
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)
        assert len(first) == len(other) > 0


def test_which_lowering_is_chosen(monkeypatch):
    """By option and device; HIP devices are torch's "cuda" and need no special case."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    chosen = {
        (option, device.type): choose_lowering(RiverConfig(kernels=option), device)
        for option in ("auto", "triton", UNQUANTIZED)
        for device in (cpu, gpu)
    }
    assert chosen == {
        ("auto", "cpu"): Lowering("inductor", "native", True),
        ("auto", "cuda"): Lowering("inductor", "triton", True),
        ("triton", "cpu"): Lowering("inductor", "triton", True),
        ("triton", "cuda"): Lowering("inductor", "triton", True),
        (UNQUANTIZED, "cpu"): UNQUANTIZED,
        (UNQUANTIZED, "cuda"): UNQUANTIZED,
    }
    with pytest.raises(OptionError, match="River has no 4-bit kernels for a model on xpu"):
        choose_lowering(RiverConfig(), torch.device("xpu"))
    monkeypatch.setattr(lower.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match="kernels='triton' requires Triton here, which is not installed"):
        choose_lowering(RiverConfig(kernels="triton"), cpu)


def test_the_interpreter_is_announced_once():
    lower.warn_once.cache_clear()
    with pytest.warns(RiverWarning, match="Triton's interpreter"):
        lower.warn_of_slow_lowering(FUSED, torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lower.warn_of_slow_lowering(FUSED, torch.device("cpu"))
        lower.warn_of_slow_lowering(FUSED, torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma2", "gpt_neox", "mixtral", "gpt_oss"])
def test_compiled_kernels_on_the_card(name, dtype):
    """kernels="auto", captured: logits and caches of every depth are the CPU's; the report lists the same kernels."""
    expected = run(name)
    model = make(name, layers=LAYERS).to("cuda", dtype)
    model.compile(backend=river, options=OPTIONS)
    cache = new_cache(model, "full")
    for _ in range(3):  # a cache has a state from its second step on, and what ran in that once is captured then
        cache.reset()
        logits = [step.cpu().float() for step in steps(model, cache)]
        state = [(k.cpu().float(), v.cpu().float(), length) for k, v, length in cache_state(cache)]
        if dtype == torch.float32:
            assert_same((logits, state), expected["results"][False], rtol=1e-3, atol=1e-3)
        for a, b in zip(logits, expected["results"][False][0], strict=True):
            assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.99
    graphs = report(model).to_dict()["graphs"]
    assert [g["fused"] for g in graphs] == [g["fused"] for g in expected["graphs"]]
    assert any(g["captures"]["made"] > 0 for g in graphs)
