"""The program of a pass is found before the pass runs, and it is the one that a call of the model runs."""

from __future__ import annotations

import pytest
import torch

from river_compile import accelerate, report
from river_compile.building.graph_record import Graphs
from river_compile.compile_cache.codec import dumps
from river_compile.decoding import inputs as decoding_inputs
from river_compile.passes.program import Program
from river_compile.record import find_record
from river_compile.runtime.executor import through_dynamo
from river_compile.runtime.state import on_step
from river_compile.tracing.forward import Forward
from river_compile.tracing.program_for import Bindable, ModelRan, program_for
from river_compile.tracing.programs import ProgramCache
from river_compile.upstream.dynamo import OwnCall
from river_compile.upstream.transformers import cache_argument, full_static_cache, mark_dynamic
from tests.support.families import FAMILIES, each, make, prompt
from tests.support.lowerings import OPERATORS

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
OPTIONS = {"kernels": OPERATORS, "group_size": 32, "quantizer": "rtn", "compile_cache": False}
LAYERS = 3  # fewer than are stamped, so Dynamo traces all of them
WHOLE_CALLS = [name for name in FAMILIES if name != "mpt"]  # (whose code breaks the graph)


class Pass:
    """An accelerated model, and the inputs of a prompt on a full cache."""

    def __init__(self, name: str, layers: int = LAYERS) -> None:
        self.model = make(name, layers=layers)
        cache, ids = full_static_cache(self.model, 64), prompt(6)
        given = {"attention_mask": torch.ones_like(ids), cache_argument(self.model): cache, "use_cache": True}
        with torch.no_grad():
            self.model(ids, **given)  # allocates it
        cache.reset()
        inputs = self.model.prepare_inputs_for_generation(ids, is_first_iteration=True, **given)
        inputs = decoding_inputs.with_all_logits(decoding_inputs.with_masks(self.model, inputs))
        accelerate(self.model, **OPTIONS)
        self.forward, self.record = Forward(self.model, inputs, cache), find_record(self.model)

    @property
    def filled(self) -> int:
        return int(self.forward.cache.get_seq_length())

    @torch.no_grad()
    def call(self):
        mark_dynamic(self.forward.inputs)
        return self.record.find(OwnCall)(self.model, **self.forward.inputs, return_dict=True)

    @torch.no_grad()
    def program(self, identity: str | None = None) -> Bindable | ModelRan:
        programs = self.record.find(ProgramCache)
        if identity is not None:
            assert programs.begin(self.model, identity)
        return program_for(self.forward, self.record, None if identity is None else programs, self.call)

    @torch.no_grad()
    def called(self) -> tuple[Program, torch.Tensor]:
        """Runs a call of the model; returns the program that it ran, with its sources, and the logits."""
        reached = []
        with through_dynamo(lambda *call: reached.append(call)):
            logits = self.call().logits
        ((executor, args),) = reached
        traced = self.record.of(Graphs).of(executor).traced
        return self.forward.with_sources(executor.program, traced, args), logits

    @torch.no_grad()
    def run(self, found: Bindable) -> torch.Tensor:
        found.executor.begin(found.args)
        state = found.executor.bind(found.args, captured=False)
        state.step()
        return state.logits


@pytest.fixture(scope="module", params=each(WHOLE_CALLS, ["llama", "gemma3"]))
def called(request):
    """A family's name, and what a call of its model ran, computed and cached."""
    ran = Pass(request.param)
    program, logits = ran.called()
    return request.param, dumps(program), logits, ran.forward.cache.layers


@pytest.mark.parametrize("identity", [None, "an identity"], ids=["by guards", "by identity"])
def test_is_the_one_that_a_call_of_the_model_runs(called, identity):
    """The same program by its stored form, node by node, on the same tensors, to the same bits."""
    name, program, logits, layers = called
    ahead = Pass(name)
    with on_step(lambda *_: pytest.fail("a pass ran")):
        found = ahead.program(identity)
    assert isinstance(found, Bindable)
    assert ahead.filled == 0
    assert dumps(found.executor.program) == program
    assert torch.equal(ahead.run(found), logits)
    assert ahead.filled == 6
    for mine, theirs in zip(ahead.forward.cache.layers, layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys)
        assert torch.equal(mine.values, theirs.values)


def test_is_traced_once():
    """By guards it is the graph that Dynamo has; by identity it is known, whatever Dynamo forgets."""
    of_guards, of_identity = Pass("llama"), Pass("llama")
    first, second = of_guards.program(), of_guards.program()
    assert first.executor is second.executor
    assert of_guards.call() is not None
    assert len(report(of_guards.model).graphs) == 1
    known = of_identity.program("an identity")
    torch._dynamo.reset()
    assert of_identity.program("an identity").executor is known.executor
    assert of_identity.program("another one").executor is not known.executor


class TestACallThatDoesMore:
    """It runs, once, and as it would without the question."""

    def test_than_one_graph(self):
        found = (ran := Pass("mpt")).program()
        assert isinstance(found, ModelRan)
        assert found.executor is None
        self.is_plain(ran, found)

    @pytest.mark.parametrize("disabled", [True, False], ids=["a graph break", "an effect"])
    def test_than_to_compute(self, disabled):
        ran, seen = Pass("llama"), []

        def note(*args, **kwargs):
            seen.append(len(seen))

        ran.model.model.norm.register_forward_pre_hook(torch.compiler.disable(note) if disabled else note)
        found = ran.program()
        assert isinstance(found, ModelRan)
        assert len(seen) == 1
        self.is_plain(ran, found)

    def test_than_to_read_what_the_forward_is_given(self):
        """A tensor that a module keeps outside of its parameters may be another one at the next call."""
        ran = Pass("llama")
        ran.model.model.norm.own = [torch.zeros(())]
        ran.model.model.norm.register_forward_hook(lambda module, args, output: output + module.own[0])
        found = ran.program()
        assert isinstance(found, ModelRan)
        assert found.executor is not None
        self.is_plain(ran, found)

    @staticmethod
    def is_plain(ran, found):
        assert ran.filled == 6
        with torch.no_grad():
            plain = make(ran.model.config.model_type, layers=LAYERS)(prompt(6)).logits
        assert torch.allclose(found.outputs.logits, plain, atol=1e-5)


def test_a_hook_without_effects_is_in_the_program():
    passing = Pass("llama")
    passing.model.lm_head.register_forward_hook(lambda module, args, output: -2 * output)
    found = passing.program()
    assert isinstance(found, Bindable)
    plain = Pass("llama")
    assert torch.equal(passing.run(found), -2 * plain.run(plain.program()))


def test_models_that_differ_in_a_number_have_programs_of_their_own():
    """Dynamo makes an input of a number that differs from the last time; of another model, that is a constant here."""
    for epsilon in (1e-5, 1e-3):
        model = make("llama", layers=2)
        for module in model.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon = epsilon
        accelerate(model, **OPTIONS, background_packing=False)
        model.generate(prompt(6), max_new_tokens=4, do_sample=False)
        assert [graph.origin for graph in report(model).graphs] == ["traced", "derived"]
