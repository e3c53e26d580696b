"""Tuning without a GPU: the order of candidates, the choice, the budget, and what the file keeps."""

import json

import pytest
import torch

from river_compile.kernels.triton.devices import DEVICES
from river_compile.kernels.triton.linear import LinearTile
from river_compile.kernels.triton.tiles import best_tile, cost, untiled
from river_compile.kernels.triton.tuned import saved_tiles, tuned_for, tuning_key
from tools.kernels import tune

SPECS = [untiled(1, 2048, n) for n in (256, 512)]


def test_the_shortlist_begins_with_the_models_choice():
    short = tune.shortlist(SPECS[0], "sm_90", 4)
    assert len(short) == 4
    assert short[0] == best_tile(SPECS[0], "sm_90")
    times = [cost(spec, DEVICES["sm_90"]) for spec in short]
    assert times == sorted(times)


def test_the_fastest_candidate_is_chosen():
    slowest_wins = {spec.tile: -i for s in SPECS for i, spec in enumerate(tune.shortlist(s, "sm_90", 5))}
    chosen = tune.tune(SPECS, "sm_90", lambda spec: slowest_wins[spec.tile], budget=60, top=5)
    for spec in SPECS:
        assert chosen[tuning_key(spec)] == min(
            (s.tile for s in tune.shortlist(spec, "sm_90", 5)), key=lambda tile: slowest_wins[tile]
        )


def test_a_candidate_that_fails_stops_nothing(capsys):
    """Nor do all those of one kernel; what the others chose is kept as soon as it is known."""
    kept = {}
    shortest = [spec.tile for spec in tune.shortlist(SPECS[1], "sm_90", 3)]

    def measure(spec):
        if spec.out_features == 256:
            assert not kept
            raise RuntimeError("out of resource: shared memory\nRequired: 999")
        if spec.tile == shortest[0]:
            raise ValueError
        return 1.0 + shortest.index(spec.tile)

    chosen = tune.tune(SPECS, "sm_90", measure, budget=60, top=3, keep=kept.__setitem__)
    assert chosen == kept == {tuning_key(SPECS[1]): shortest[1]}
    said = capsys.readouterr().err
    assert said.count("out of resource: shared memory\n") == 3
    assert said.count("ValueError\n") == 1


def test_the_command_saves_every_choice_at_once(monkeypatch, tmp_path):
    """A run that is killed keeps what it has."""
    path, calls = tmp_path / "tuning.json", []
    monkeypatch.setenv("RIVER_COMPILE_TUNING", str(path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune, "device_name", lambda index: "sm_90")

    def measure(spec):
        calls.append(spec)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(tune, "measure_on_gpu", measure)
    with pytest.raises(KeyboardInterrupt):
        tune.main(["--model", "smollm2-135m", "--top", "2"])
    assert saved_tiles(path) == {tuned_for("sm_90"): {tuning_key(calls[0]): calls[0].tile}}


def test_a_spent_budget_chooses_nothing():
    assert tune.tune(SPECS, "sm_90", lambda spec: 1.0, budget=0, top=5) == {}


def test_saving_keeps_other_devices_and_shapes(tmp_path, monkeypatch):
    path = tmp_path / "sub" / "tuning.json"
    monkeypatch.setenv("RIVER_COMPILE_TUNING", str(path))
    first, second = LinearTile(16, 128, 8, num_warps=1), LinearTile(32, 64, 8, num_warps=2)
    tune.save(path, "sm_90", {"a": first})
    tune.save(path, "gfx942", {"a": second})
    tune.save(path, "sm_90", {tuning_key(SPECS[0]): second})
    assert saved_tiles(path) == {
        tuned_for("sm_90"): {"a": first, tuning_key(SPECS[0]): second},
        tuned_for("gfx942"): {"a": second},
    }
    assert best_tile(SPECS[0], "sm_90").tile == second
    assert [p.name for p in path.parent.iterdir()] == ["tuning.json"]
    assert json.loads(path.read_text())[tuned_for("gfx942")]["a"]["block_n"] == 32


def test_weights_of_a_measurement_exceed_the_cache():
    spec = best_tile(SPECS[0])
    assert tune.copies_beyond_cache(spec) == 64
    large = best_tile(untiled(1, 4096, 14336))
    assert tune.copies_beyond_cache(large) * large.cost().bytes > 200e6


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU to tune on")
def test_without_a_gpu_the_command_says_so(capsys):
    assert tune.main([]) == 1
    assert "there is none here" in capsys.readouterr().err
