"""Quick twins draft until better ones take their place: the same text, and in the end the same bytes."""

from __future__ import annotations

import threading

import pytest
import torch

import river_compile
from river_compile.errors import UnsupportedGraphError
from river_compile.twins import making, pack
from tests.support.families import make
from tests.twins.test_background import EXACT, drafted, finish, generate, packing_of

GPTQ = {**EXACT, "quantizer": "gptq"}
POLL = 0.01  # seconds


def twins_of(model):
    return {twin.name: twin for twin in river_compile.report(model).packed if not twin.matmul.lossless}


def bits_of(model):
    return {name: [t.clone() for t in twin.tensors] for name, twin in twins_of(model).items()}


def wait_for_quick(model):
    while not packing_of(model).usable:
        threading.Event().wait(POLL)
    packing_of(model).check()


@pytest.fixture
def held(monkeypatch):
    """Better twins than quick ones take as long as a test holds them."""
    release, make_weight = threading.Event(), making.make_weight

    def hold(matmul, parameters, digest, asked, *args):
        if asked == "gptq":
            assert release.wait(60)
        return make_weight(matmul, parameters, digest, asked, *args)

    monkeypatch.setattr(making, "make_weight", hold)
    monkeypatch.setattr(pack, "_SMALL", 0)
    yield release
    release.set()


@pytest.fixture
def quick(held):
    """A model that drafts with quick twins, while better ones are held."""
    model = river_compile.accelerate(make("llama", layers=2), compile_cache=False, **GPTQ)
    generate(model)
    wait_for_quick(model)
    yield model
    held.set()
    packing_of(model).wait()


def test_they_draft_the_same_text_until_the_bytes_of_better_ones_lie_in_their_place(quick, held):
    expected = generate(make("llama", layers=2), 20).tolist()
    assert generate(quick, 20).tolist() == expected
    assert drafted(quick) > 0
    assert {twin.quantizer for twin in twins_of(quick).values()} == {"mse"}
    before, places = bits_of(quick), {name: twin.tensors[0].data_ptr() for name, twin in twins_of(quick).items()}
    finish(quick, held)
    assert generate(quick, 20).tolist() == expected
    assert {twin.quantizer for twin in twins_of(quick).values()} == {"gptq"}
    assert {name: twin.tensors[0].data_ptr() for name, twin in twins_of(quick).items()} == places
    after = bits_of(quick)
    assert all(not torch.equal(after[name][0], before[name][0]) for name in before)
    at_once = river_compile.accelerate(make("llama", layers=2), compile_cache=False, background_packing=False, **GPTQ)
    assert generate(at_once, 20).tolist() == expected
    for name, tensors in bits_of(at_once).items():
        assert all(map(torch.equal, tensors, after[name]))


def test_the_report_says_that_better_ones_are_to_come(quick, held):
    generate(quick)
    report = river_compile.report(quick)
    assert "in the background; drafts get better twins" in str(report)
    assert report.to_dict()["drafts_with_quick_twins"]
    finish(quick, held)
    assert "in the background" not in str(river_compile.report(quick))
    assert not river_compile.report(quick).to_dict()["drafts_with_quick_twins"]


@pytest.mark.parametrize("kind", ["saved", "fast"])
def test_whoever_reads_more_than_drafts_waits_for_better_ones(quick, held, kind, tmp_path):
    generate(quick)
    threading.Timer(0.2, held.set).start()
    if kind == "saved":
        river_compile.save_twins(quick, tmp_path / "twins")
    else:
        options = {"compile_cache": False, "group_size": 32, "kernels": GPTQ["kernels"]}
        river_compile.accelerate(quick, "fast", exit_depth=1, **options)
        generate(quick)
    assert {twin.quantizer for twin in twins_of(quick).values()} == {"gptq"}


@pytest.mark.parametrize("reads_quick", [False, True])
def test_weights_that_change_meanwhile_are_quantized_again(quick, held, reads_quick):
    if reads_quick:  # programs that read twins of weights that changed get the better ones immediately
        generate(quick)
        assert drafted(quick) > 0
    other = make("llama", layers=2, seed=1)
    quick.load_state_dict(other.state_dict())
    expected = generate(other).tolist()
    threading.Timer(0.2, held.set).start()
    assert generate(quick).tolist() == expected
    finish(quick, held)
    for _ in range(3):
        assert generate(quick).tolist() == expected
        packing_of(quick).wait()
    twins = twins_of(quick).values()
    assert {twin.quantizer for twin in twins} == {"gptq"}
    assert all(twin.is_current for twin in twins)


def test_an_error_of_better_ones_reaches_the_next_call(quick, held, monkeypatch):
    def fail(*_):
        raise ValueError("no better ones")

    monkeypatch.setattr("river_compile.twins.quantize.quantize_observed", fail)
    finish(quick, held)
    with pytest.raises(UnsupportedGraphError, match="no better ones"):
        generate(quick)


def test_a_file_holds_the_better_ones(held, tmp_path, monkeypatch):
    monkeypatch.setenv("RIVER_COMPILE_CACHE_DIR", str(tmp_path))
    first = river_compile.accelerate(make("llama", layers=2), **GPTQ)
    generate(first)
    wait_for_quick(first)
    generate(first)
    assert {twin.quantizer for twin in twins_of(first).values()} == {"mse"}
    finish(first, held)
    second = river_compile.accelerate(make("llama", layers=2), **GPTQ)
    generate(second)
    assert packing_of(second) is None
    assert {twin.quantizer for twin in twins_of(second).values()} == {"gptq"}
    for name, tensors in bits_of(second).items():
        assert all(map(torch.equal, tensors, bits_of(first)[name]))


def test_a_quantizer_that_is_as_quick_has_one_stage(held):
    model = river_compile.accelerate(make("llama", layers=2), compile_cache=False, **{**GPTQ, "quantizer": "rtn"})
    generate(model)
    packing_of(model).wait()
    generate(model)
    assert {twin.quantizer for twin in twins_of(model).values()} == {"rtn"}
    assert not river_compile.report(model).to_dict()["drafts_with_quick_twins"]
