"""The benchmark of early starts without a GPU: twins in the interpreter, and what it calls the same results."""

import dataclasses

import pytest
import torch

from benchmarks import early_start
from benchmarks.early_start import Twins, same_bits
from tools.kernels.shapes import ModelShape

TINY = ModelShape("tiny", 4, 64, 4, 2, 32, 96, 160)


class Graph:
    """Stands where a captured graph does: its replay runs the twins."""

    def __init__(self, twins, early, change=lambda hidden: None):
        self._twins, self._early, self._change = twins, early, change

    def replay(self):
        self._twins.run(self._early)
        self._change(self._twins.hidden)


def test_twins_run_on_what_the_one_before_wrote():
    twins, halves = Twins(TINY, 2, 20, "cpu"), []
    start = torch.randn(1, TINY.hidden).bfloat16()
    twins.hidden.copy_(start)
    twins.run(early=True)
    assert twins.counters.flatten().tolist() == [20, 20]
    both = twins.hidden.clone()
    assert both.isfinite().all()
    for own in twins._own:
        one = Twins(TINY, 1, 20, "cpu")
        one._own, one._tables = [own], twins._tables
        one.hidden.copy_(halves[-1] if halves else start)
        one.run(early=False)
        halves.append(one.hidden.clone())
    assert torch.equal(both, halves[-1])
    assert not torch.equal(halves[0], halves[1])


def test_both_ways_have_the_same_tiles(monkeypatch):
    """Those that were measured for ordinary launches, whatever a tuning file says of the others."""
    monkeypatch.setattr(early_start, "model_kernels", _with_other_tiles(early_start.model_kernels))
    plain, early = (Twins(TINY, 0, 20, "cpu").kernels(early=e) for e in (False, True))
    assert len(plain) == 5
    for name, spec in early.items():
        inner = {"fill": plain[name].fill} if hasattr(spec, "fill") else {}
        assert spec.dependent
        assert dataclasses.replace(spec, dependent=False, **inner) == plain[name]


def _with_other_tiles(kernels):
    def changed(*args, dependent=False, **options):
        found = kernels(*args, dependent=dependent, **options)
        for name, spec in found.items():
            if dependent and hasattr(spec, "tile"):
                found[name] = dataclasses.replace(spec, tile=dataclasses.replace(spec.tile, num_stages=7))
        return found

    return changed


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda hidden: None, True),
        (lambda hidden: hidden[0, 3].mul_(1.01), False),
        (lambda hidden: hidden.fill_(float("nan")), False),
    ],
)
def test_other_bits_are_seen(change, same, monkeypatch):
    monkeypatch.setattr(early_start, "_COMPARED", 2)
    twins = Twins(TINY, 1, 20, "cpu")
    assert same_bits(twins, [Graph(twins, False), Graph(twins, True, change)]) == same


def test_without_such_a_card_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert early_start.main([]) == 1
    assert "from sm_90 on and there is none here" in capsys.readouterr().err
