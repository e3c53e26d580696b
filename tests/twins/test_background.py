"""Twins that are packed in the background: exact mode answers without drafts meanwhile, with the same text."""

from __future__ import annotations

import copy
import faulthandler
import gc
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
import weakref

import pytest
import torch

import river_compile
from river_compile.building.graph_record import Graphs
from river_compile.errors import UnsupportedGraphError
from river_compile.record import find_record
from river_compile.runtime.state import on_step
from river_compile.twins import making, pack
from river_compile.twins.pack import TwinWeights
from tests.support.examples import slow
from tests.support.families import make, prompt
from tests.support.lowerings import OPERATORS

OPTIONS = {"kernels": OPERATORS, "group_size": 32, "quantizer": "rtn"}
EXACT = {**OPTIONS, "num_assistant_tokens": 2, "num_assistant_tokens_schedule": "constant"}


def packing_of(model):
    """Returns the latest making of a model's twins in the background."""
    return find_record(model).of(TwinWeights).background.packing


def plain():
    return make("llama", layers=2)


def generate(model, tokens=8, **options):
    ids = prompt()
    length = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **length, **options)


def drafted(model) -> int:
    by_source = river_compile.report(model).exact.by_source
    return by_source["river"][0] if "river" in by_source else 0


@pytest.fixture
def held(monkeypatch):
    """Every model's twins take as long as a test holds them."""
    release, make_weight = threading.Event(), making.make_weight

    def hold(matmul, *args):
        if not matmul.lossless:
            assert release.wait(60)
        return make_weight(matmul, *args)

    monkeypatch.setattr(making, "make_weight", hold)
    monkeypatch.setattr(pack, "_SMALL", 0)
    yield release
    release.set()


@pytest.fixture
def packing(held):
    """A model that has answered, and whose twins are held."""
    model = river_compile.accelerate(plain(), compile_cache=False, **EXACT)
    generate(model, prompt_lookup_num_tokens=0)
    assert find_record(model).of(TwinWeights).background.share is not None
    begun = packing_of(model)
    yield model
    held.set()
    begun.wait()


def finish(model, release):
    release.set()
    packing_of(model).wait()


def test_the_text_is_the_same_before_and_after(packing, held):
    expected, before = generate(plain()), generate(packing)
    assert drafted(packing) == 0
    finish(packing, held)
    after = generate(packing)
    assert drafted(packing) > 0
    assert before.tolist() == after.tolist() == expected.tolist()


def test_drafts_begin_within_a_call(packing, held):
    class Streamer:
        seen = 0

        def put(self, _):
            self.seen += 1
            if self.seen == 5:
                assert drafted(packing) == 0
                finish(packing, held)

        def end(self):
            pass

    assert generate(packing, 30, streamer=Streamer()).tolist() == generate(plain(), 30).tolist()
    assert drafted(packing) > 0


def test_tokens_of_the_context_are_drafted_meanwhile(packing):
    generate(packing, 200)
    assert set(river_compile.report(packing).exact.by_source) == {"lookup"}


def test_the_report_says_that_drafts_are_to_come(packing, held):
    report = river_compile.report(packing)
    assert "done in the background; drafts begin afterwards" in str(report)
    assert report.to_dict()["packing_in_background"] is not None
    finish(packing, held)
    generate(packing)
    report = river_compile.report(packing)
    assert "in the background" not in str(report)
    assert report.to_dict()["packing_in_background"] is None
    assert report.to_dict()["packing_seconds"] > 0


def test_a_batch_waits_for_nothing(packing, held):
    expected = generate(plain()).tolist()
    with river_compile.ContinuousBatch(packing, 2) as batch:
        calls = [batch.submit(lambda: generate(packing)) for _ in range(2)]
        assert [call.result().tolist() for call in calls] == [expected] * 2
        assert drafted(packing) == 0
        finish(packing, held)
        assert batch.submit(lambda: generate(packing)).result().tolist() == expected
    assert drafted(packing) > 0


def test_fast_and_saved_twins_wait_for_them(packing, held, tmp_path):
    threading.Timer(0.2, held.set).start()
    river_compile.save_twins(packing, tmp_path / "twins")
    assert (tmp_path / "twins" / "twins.safetensors").exists()
    assert find_record(packing).of(Graphs).packed


def test_without_the_option_or_in_a_small_model_the_first_call_waits(held, monkeypatch):
    held.set()
    waits = river_compile.accelerate(plain(), compile_cache=False, background_packing=False, **EXACT)
    generate(waits)
    monkeypatch.setattr(pack, "_SMALL", 20_000_000)
    small = river_compile.accelerate(plain(), compile_cache=False, **EXACT)
    generate(small)
    fast = river_compile.accelerate(plain(), "fast", compile_cache=False, **OPTIONS)
    generate(fast)
    assert all(map(drafted, (waits, small)))
    assert all(packing_of(model) is None for model in (waits, small, fast))


def test_weights_that_change_meanwhile_get_twins_of_their_own(packing, held):
    other = make("llama", layers=2, seed=1)
    packing.load_state_dict(other.state_dict())
    held.set()
    for _ in range(2):
        packing_of(packing).wait()
        assert generate(packing).tolist() == generate(other).tolist()
    packing_of(packing).wait()
    assert generate(packing).tolist() == generate(other).tolist()
    current = [twin.is_current for twin in find_record(packing).of(Graphs).packed]
    assert current == [True] * 8


def test_an_error_reaches_the_next_call(held):
    model = plain()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    river_compile.accelerate(model, compile_cache=False, **EXACT)
    generate(model, 2)
    finish(model, held)
    for _ in range(2):
        with pytest.raises(UnsupportedGraphError, match=r"Cannot make a 4-bit twin of .*layers\.1\.mlp"):
            generate(model)


def test_copies_that_are_made_meanwhile_are_plain_and_pack_on_their_own(packing, held):
    expected = generate(plain()).tolist()
    copies = copy.deepcopy(packing), pickle.loads(pickle.dumps(packing))
    for copied in copies:
        assert generate(copied).tolist() == expected
        assert find_record(copied) is None
    river_compile.accelerate(copies[0], compile_cache=False, **EXACT)
    generate(copies[0], prompt_lookup_num_tokens=0)
    assert find_record(copies[0]).of(TwinWeights).background.packing is not packing_of(packing)
    for model in (packing, copies[0]):
        finish(model, held)
        assert generate(model).tolist() == expected
        assert drafted(model) > 0


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("at", ["in the call", "in the wait"])
def test_ctrl_c_leaves_a_model_that_drafts_later(packing, held, at):
    """An interrupt ends the call or the wait for twins, not their making."""
    expected = generate(plain()).tolist()

    def interrupt(*_):
        signal.raise_signal(signal.SIGINT)

    if at == "in the call":
        with on_step(interrupt), pytest.raises(KeyboardInterrupt):
            generate(packing)
    else:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            packing_of(packing).wait()
    assert generate(packing).tolist() == expected
    finish(packing, held)
    assert generate(packing).tolist() == expected
    assert drafted(packing) > 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_process_that_is_forked_meanwhile_makes_them_anew(packing, held):
    """The thread that packs is missing there; torch allows a forked process one thread."""
    expected = generate(plain()).tolist()
    child = os.fork()
    if child == 0:
        try:
            faulthandler.dump_traceback_later(60, exit=True)
            torch.set_num_threads(1)
            same = [generate(packing).tolist() == expected]
            finish(packing, held)
            same += [generate(packing).tolist() == expected for _ in range(2)]
            os._exit(0 if all(same) and drafted(packing) > 0 else 3)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert generate(packing).tolist() == expected


def test_restore_ends_it(packing, held):
    packing_before = packing_of(packing)
    river_compile.restore(packing)
    held.set()
    packing_before.wait()
    assert packing_before.share < 1
    packing_before.check()


def test_a_model_that_goes_meanwhile_ends_it(held):
    """No process would use the twins, and the thread holds the weights."""
    model = river_compile.accelerate(plain(), compile_cache=False, **EXACT)
    generate(model, 2)
    begun, weight = (
        packing_of(model),
        weakref.ref(model.model.layers[0].mlp.up_proj.weight),
    )
    del model
    gc.collect()
    held.set()
    begun.join()
    gc.collect()
    assert begun.share < 1
    assert weight() is None


PROGRAM = """
import sys, torch, river_compile
from river_compile.twins import pack
from tests.twins.test_background import EXACT, generate, plain
pack._SMALL = 0
model = river_compile.accelerate(plain(), compile_cache=sys.argv[1] == "cache", **EXACT)
generate(model, 2)
"""


@pytest.mark.parametrize("cache", ["cache", slow("no cache")])
def test_a_process_ends_after_its_twins_are_stored_or_at_once(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("RIVER_COMPILE_CACHE_DIR", str(tmp_path))
    subprocess.run([sys.executable, "-c", PROGRAM, cache], check=True, timeout=120)
    stored = [*tmp_path.rglob("twins.safetensors")]
    assert len(stored) == (1 if cache == "cache" else 0), json.dumps([str(p) for p in tmp_path.rglob("*")])


INTERRUPTED = """
import os, signal, threading, time
from river_compile.progress import stage_reached
from river_compile.twins.background import Packing

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it

def work():
    for step in range(600):
        stage_reached(step / 600)
        time.sleep(0.05)
    print("finished")

def interrupt():
    while threading.main_thread().is_alive():
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGINT)

packing = Packing([work], finishes_at_exit=True)
threading.Thread(target=interrupt).start()
"""


def test_ctrl_c_ends_the_wait_of_a_process_that_ends():
    found = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=60)
    assert "before this one ends; Ctrl-C skips it" in found.stderr
    assert "finished" not in found.stdout
    assert "terminate called" not in found.stderr
    assert found.returncode >= 0
