"""A program stamped from a trace of a few layers is the one that a trace of all layers gives, node by node."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters
from transformers.models.llama import modeling_llama

from river_compile import accelerate, report
from river_compile.decoding import inputs as decoding_inputs
from river_compile.passes.nodes import value_of
from river_compile.passes.normalize import normalized
from river_compile.passes.program import Refusal, RiverProgram
from river_compile.passes.segments import describe, graph_lines, recognise
from river_compile.tracing.forward import Forward
from river_compile.tracing.new_program import NewProgram, decode_variant, stamped_program
from river_compile.upstream.dynamo import trace
from river_compile.upstream.transformers import cache_argument, full_static_cache, mark_dynamic
from tests.support.families import FAMILIES, MORE_CONFIGS, each, make, prompt

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
LAYERS = 8
# (MPT asks a static cache for its length, which breaks the graph; a call of OPT does more than run one.)
TRACED = [name for name in (*FAMILIES, *MORE_CONFIGS) if name not in ("mpt", "opt")]


def prompt_of(model):
    """Returns the inputs of a prompt's pass over a full cache, and the cache."""
    cache, ids = full_static_cache(model, 64), prompt(6)
    given = {"attention_mask": torch.ones_like(ids), cache_argument(model): cache, "use_cache": True}
    with torch.no_grad():
        model(ids, **given)  # allocates it
    cache.reset()
    inputs = model.prepare_inputs_for_generation(ids, is_first_iteration=True, **given)
    return decoding_inputs.with_all_logits(decoding_inputs.with_masks(model, inputs)), cache


def stamped_and_whole(model) -> tuple[NewProgram | Refusal, RiverProgram, dict]:
    """Returns both programs, and the names of the inputs of the whole one."""
    inputs, cache = prompt_of(model)
    with torch.no_grad():
        stamped = stamped_program(Forward(model, inputs, cache), twins=True)
        mark_dynamic(inputs)
        graph_module, args = trace(model, inputs)
    whole = recognise(normalized(graph_module))
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    for i, layer in enumerate(cache.layers):
        names |= {id(value): f"['cache'].layers[{i}].{name}" for name, value in vars(layer).items()}
    return stamped, whole, {node: names.get(id(arg)) for node, arg in zip(whole.inputs, args, strict=True)}


def lines_of(program: RiverProgram, names: dict) -> list:
    """Returns each segment's nodes, the examples of what it reads, and the names of that."""
    crossing = {n: f"{s.name} {i}" for s in program.segments for i, n in enumerate(s.outputs)}
    return [
        (
            segment.name,
            graph_lines(segment.graph),
            [describe(value_of(node)) for node in segment.graph.nodes],
            [crossing.get(node) or names.get(node) or node.name for node in segment.inputs],
            len(segment.outputs),
        )
        for segment in program.segments
    ]


@pytest.fixture(scope="module", params=each(TRACED, ["llama", "gemma3"]))
def traced(request):
    return stamped_and_whole(make(request.param, layers=LAYERS))


def test_stamped_is_whole(traced):
    stamped, whole, names = traced
    assert isinstance(stamped, NewProgram), stamped
    located = dict(zip(stamped.found.inputs, stamped.inputs, strict=True))
    ours = {node: given.name for node, given in located.items() if given.source.kind in ("model", "cache")}
    for mine, theirs in zip(lines_of(stamped.found, ours), lines_of(whole, names), strict=True):
        assert mine == theirs
    assert {given.name for given in stamped.inputs} >= set(filter(None, names.values()))


def test_one_token_of_some_layers_is_that_of_all(traced):
    """The program of decode steps, derived before the other layers are stamped, and after."""
    stamped, *_ = traced
    some, whole = (decode_variant(stamped.found, stamped.inputs, of) for of in (stamped.template, None))
    assert [given.source for given in some.inputs] == [given.source for given in whole.inputs]
    assert some.conditions == whole.conditions
    assert lines_of(some.found, {}) == lines_of(whole.found, {})
    assert some.found.plan.is_decode


def scaled(i, layer):
    """A layer whose code is the others' and whose number is not."""
    layer.self_attn.scaling *= 2 - i % 2


class TestWhatDiffers:
    def test_layers_of_two_kinds_are_each_their_own(self):
        model, plain = (make("llama", layers=LAYERS) for _ in range(2))
        for each_model in (model, plain):
            for i, layer in enumerate(each_model.model.layers):
                scaled(i, layer)
        self.generates_as(model, plain, "stamped")

    def test_layers_of_many_kinds_are_all_traced(self):
        model, plain = (make("llama", layers=LAYERS) for _ in range(2))
        for each_model in (model, plain):
            for i, layer in enumerate(each_model.model.layers):
                layer.self_attn.scaling *= 1 + i / 10
        self.generates_as(model, plain, "traced")

    def test_code_that_counts_layers_is_traced_whole(self, monkeypatch):
        """Nothing in a layer tells that; the traces of the first and the last one do."""
        forward = modeling_llama.LlamaModel.forward

        def counting(self, *args, **kwargs):
            for i, layer in enumerate(self.layers):
                layer.self_attn.scaling = 0.25 * (1 + i / 10)
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(modeling_llama.LlamaModel, "forward", counting)
        model, plain = (make("llama", layers=LAYERS) for _ in range(2))
        self.generates_as(model, plain, "traced")

    @staticmethod
    def generates_as(model, plain, origin):
        ids = prompt(6)
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
        expected = plain.generate(ids, **options)
        accelerate(model, quantizer="rtn", group_size=32, compile_cache=False)
        assert torch.equal(model.generate(ids, **options), expected)
        assert report(model).to_dict()["graphs"][0]["origin"] == origin


def test_a_prompt_traces_two_blocks_of_eight():
    model = accelerate(make("llama", layers=LAYERS), quantizer="rtn", group_size=32, compile_cache=False)
    counters.clear()
    ids = prompt(6)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert counters["stats"]["unique_graphs"] == 1
    assert [graph["origin"] for graph in report(model).to_dict()["graphs"]] == ["stamped", "derived"]
