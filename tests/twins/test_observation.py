"""What `observe` records: the second moments of every matrix's inputs, however the model writes the product."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from river_compile import collect_statistics
from river_compile.backend import river
from river_compile.building.graph_record import Graphs
from river_compile.errors import OptionError
from river_compile.kernels.quant.calibrated import RowMoments, WholeMoments
from river_compile.record import find_record
from river_compile.twins.making import Statistics
from river_compile.twins.observe import InputMoments, default_texts, record, visit
from tests.support.families import make, prompt


def inputs_by_hook(model, ids):
    """Returns the inputs ``[tokens, K]`` of every module that holds a matrix, seen from outside."""
    seen = {}

    def note(module, arguments):
        seen.setdefault(module, []).append(arguments[0].detach().flatten(0, -2))

    modules = [m for m in model.modules() if getattr(m, "weight", None) is not None and m.weight.dim() == 2]
    hooks = [m.register_forward_pre_hook(note) for m in modules if not isinstance(m, nn.Embedding)]
    with torch.no_grad():
        for row in ids:
            model(input_ids=row, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {module: torch.cat(parts) for module, parts in seen.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "phi"])
def test_moments_are_those_of_the_inputs(family):
    """F.linear, Conv1D's addmm and Falcon's ``x @ weight.T``, alone and side by side on one input."""
    model = make(family, layers=2)
    ids = [prompt(20, 2, seed=i) for i in range(3)]
    observed = collect_statistics(model, ids, progress=False)
    assert observed.tokens == 120
    expected = inputs_by_hook(model, ids)
    assert len(expected) >= 7
    for module, x in expected.items():
        moments = observed.moments_of(module.weight)
        assert moments.tokens == len(x) == 120
        torch.testing.assert_close(moments.matrix(), x.T @ x / len(x))


def test_matrices_that_read_one_value_share_its_moments():
    model = make("llama", layers=2)
    observed = collect_statistics(model, [prompt(20), prompt(20, seed=1)], progress=False)
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    q, k, v, o, gate, up = (
        observed.moments_of(m.weight)
        for m in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj)
    )
    assert q is k is v
    assert gate is up
    assert len({id(m) for m in (q, o, gate)}) == 3


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "mixtral"])
def test_a_visit_hands_over_what_a_record_keeps(family):
    """One matrix after another, without computing logits."""
    model, ids, seen, alive = make(family, layers=2), prompt(20, 3), {}, []
    recorded = record(model, [ids])
    weights = [weight for weight in model.parameters() if weight in recorded.moments]

    def see(weight, moments):
        of = moments.for_expert if weight.dim() == 3 else lambda _: (moments.cheapest(), moments.tokens)
        seen[weight] = [of(expert) for expert in range(len(weight) if weight.dim() == 3 else 1)]
        alive.append(weakref.ref(moments))
        assert sum(reference() is not None for reference in alive) <= 2  # (the two stacks of a block)

    def never(*_):
        raise AssertionError("logits were computed")

    handle = model.get_output_embeddings().register_forward_hook(never)
    visit(model, ids, weights, see)
    handle.remove()
    assert list(seen)[-1] is model.get_output_embeddings().weight
    assert set(seen) == set(weights)
    for weight, found in seen.items():
        expected = recorded.moments_of(weight)
        for expert, (of_visit, tokens) in enumerate(found):
            of = expected.for_expert(expert) if weight.dim() == 3 else (expected.cheapest(), expected.tokens)
            assert tokens == of[1]
            torch.testing.assert_close(of_visit.matrix(), of[0].matrix())


def test_a_visit_ends_with_the_last_matrix_that_is_wanted():
    model, ran = make("llama", layers=2), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: ran.append("block"))
    visit(model, prompt(20), [model.model.layers[0].mlp.down_proj.weight], lambda *_: ran.append("seen"))
    assert ran == ["seen"]


def test_a_compiled_model_is_observed_as_it_is():
    """No graph reaches the backend meanwhile, and the numbers are those of the model before it was compiled."""
    model = make("llama", layers=2)
    before = collect_statistics(model, [prompt(20)], progress=False)
    for compile_it in (
        lambda: model.compile(backend=river),
        lambda: setattr(model, "forward", torch.compile(model.forward, backend=river)),
    ):
        compile_it()
        after = collect_statistics(model, [prompt(20)], progress=False)
        weight = model.model.layers[0].mlp.down_proj.weight
        assert torch.equal(before.moments_of(weight).matrix(), after.moments_of(weight).matrix())
    state = find_record(model)
    assert state.of(Graphs) == []
    assert state.of(Statistics).observed is after


def test_inputs_are_summed_up_when_they_take_more_room_than_moments():
    x = torch.randn(5, 40, 16, generator=torch.Generator().manual_seed(0))
    moments = InputMoments(16)
    rooms = []
    for part in x:
        moments.add(part)
        rooms.append(moments.nbytes)
    assert max(rooms) == 4 * 16 * 16  # 40 rows of 16 float32 numbers would be more
    rows = x.reshape(-1, 16)
    torch.testing.assert_close(moments.matrix(), rows.T @ rows / 200)
    few = InputMoments(16)
    few.add(x[0, :3])
    few.add(x[0, 3:5])
    assert few.nbytes == 5 * 16 * 4
    torch.testing.assert_close(few.matrix(), rows[:5].T @ rows[:5] / 5)


@pytest.mark.parametrize(("tokens", "form"), [(4, RowMoments), (5, WholeMoments), (40, WholeMoments)])
def test_quantizers_are_given_inputs_themselves_where_they_are_few(tokens, form):
    """A quarter of the features; and both forms are the moments of all that was added."""
    moments, rows = InputMoments(16), torch.randn(tokens, 16, generator=torch.Generator().manual_seed(tokens))
    for part in rows.split(3):
        moments.add(part.bfloat16())
    given, rows = moments.cheapest(), rows.bfloat16().float()
    assert type(given) is form
    torch.testing.assert_close(given.matrix(), rows.T @ rows / tokens)
    assert given.diagonal.dtype == torch.float32


def test_texts_run_through_a_tokenizer():
    model = make("llama", layers=2)

    def tokenizer(text):
        return {"input_ids": [ord(c) % 127 + 1 for c in text]}

    assert collect_statistics(model, ["first", "second text"], tokenizer, progress=False).tokens == 16
    long = collect_statistics(model, ["x" * 1100], tokenizer, progress=False)
    assert long.tokens == 1100  # in several windows
    assert "observed 15 matrices on 1100 tokens" in str(long)


def test_texts_that_come_with_the_package():
    texts = default_texts()
    assert len(texts) > 10
    assert all(200 < len(text) < 1500 for text in texts)


def test_a_later_call_replaces_the_earlier_one_and_clear_frees():
    model = make("llama", layers=2)
    first, second = (collect_statistics(model, [prompt(20, seed=i)], progress=False) for i in range(2))
    assert find_record(model).of(Statistics).observed is second
    assert first.number != second.number
    assert second.nbytes > 0
    second.clear()
    assert second.nbytes == 0


def test_nothing_of_a_freed_model_stays():
    model = make("llama", layers=2)
    observed = collect_statistics(model, [prompt(20)], progress=False)
    moments = weakref.ref(observed.moments_of(model.model.layers[0].mlp.down_proj.weight))
    assert moments() is not None
    del model
    gc.collect()
    assert moments() is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Texts in calibration_data= require tokenizer="),
        ({"data": ["text"]}, "Texts in calibration_data= require tokenizer="),
        ({"data": "text", "tokenizer": dict}, "calibration_data='text' is not allowed"),
        ({"data": [3], "tokenizer": dict}, r"texts\[0\]=3 is not allowed"),
        ({"tokenizer": dict, "data": [prompt()]}, "need no tokenizer"),
        ({"data": []}, "has no token"),
        ({"data": [torch.empty(1, 0, dtype=torch.long)]}, "has no token"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(OptionError, match=message):
        collect_statistics(make("llama", layers=2), **arguments)
