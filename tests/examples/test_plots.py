"""The pictures of the examples."""

import pytest

from examples.plots import plot_calibration, plot_trace
from river_compile import ExitRule, Trace
from river_compile.exit_rule import Candidate
from river_compile.runtime.stats import CycleRecord, StepRecord


def drawn(path):
    return path.read_bytes().startswith(b"\x89PNG")


def test_depths_are_drawn_above_the_texts(tmp_path):
    steps = [StepRecord(2, (0.9,), True, 0, 0, 0.5)] * 39
    trace = Trace(steps, num_blocks=2)
    assert drawn(plot_trace(trace, tmp_path / "depths.png", texts=["a"] * 39))
    with pytest.raises(ValueError, match="texts has 1 entries for 39 decode steps"):
        plot_trace(trace, tmp_path / "depths.png", texts=["a"])
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_trace(Trace(), tmp_path / "depths.png")


def test_cycles_are_drawn(tmp_path):
    cycles = [CycleRecord(("river", "lookup"), ("river", "backbone"), 3, (0.0, 0.0, 0.0), thread=0, model=0)] * 20
    trace = Trace(cycles=cycles)
    assert drawn(plot_trace(trace, tmp_path / "cycles.png", [str(i) for i in range(40)]))
    with pytest.raises(ValueError, match="texts has 1 entries for 40 tokens"):
        plot_trace(trace, tmp_path / "cycles.png", ["a"])


@pytest.mark.parametrize("threshold", [0.5, (0.5, 0.6)])
def test_candidates_of_a_calibration_are_drawn(threshold, tmp_path):
    candidates = [Candidate(threshold, 2, 0.1, 0.9, 0.1, 2.0, 0.5, 16, passed) for passed in (True, False, None)]
    found = ExitRule("kl", 0.3, 0.9, 1.5, 3, 0.01, candidates[0], tuple(candidates), {"criterion": "similarity"})
    assert drawn(plot_calibration(found, tmp_path / "calibration.png"))
