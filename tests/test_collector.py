"""The garbage collector stands still while a program is made, and is afterwards what it was."""

import contextlib
import gc
import weakref

import pytest
import torch

from river_compile import accelerate, collector
from river_compile.collector import collector_paused
from river_compile.tracing import program_for
from tests.support.families import make, prompt


@pytest.mark.parametrize("on", [True, False])
def test_it_is_afterwards_what_it_was(on):
    """Also when blocks nest, and when one ends with an error."""
    before = gc.isenabled()
    (gc.enable if on else gc.disable)()
    try:
        with contextlib.suppress(ValueError), collector_paused():
            with collector_paused():
                assert not gc.isenabled()
            assert not gc.isenabled()
            raise ValueError
        assert gc.isenabled() == on
    finally:
        (gc.enable if before else gc.disable)()


class Ring:
    """An object that only a collection frees."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def thawed(monkeypatch):
    """No object is frozen, as in a user's process; `conftest.py` freezes what it has imported."""
    monkeypatch.setattr(collector, "_caller_freezes", False)
    gc.unfreeze()
    yield
    gc.freeze()


@pytest.mark.usefixtures("thawed")
def test_what_was_made_meanwhile_is_collected_later():
    """By a full collection: no younger one looks at it, and nothing stays frozen."""
    with collector_paused():
        ring = weakref.ref(Ring())
    assert gc.get_freeze_count() == 0
    gc.collect(1)
    assert ring() is not None
    gc.collect()
    assert ring() is None


def test_what_the_caller_froze_stays_frozen():
    frozen = gc.get_freeze_count()
    with collector_paused():
        pass
    assert gc.get_freeze_count() == frozen > 0


def test_no_collection_begins_in_a_trace(monkeypatch):
    states = []

    def watched(*arguments, stamped=program_for.stamped_program, **options):
        states.append(gc.isenabled())
        return stamped(*arguments, **options)

    monkeypatch.setattr(program_for, "stamped_program", watched)
    model, ids = make("llama", layers=6), prompt()
    accelerate(model, quantizer="rtn", group_size=32, compile_cache=False)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    assert states == [False]
    assert gc.isenabled()
