"""Tuning without a GPU: the order of candidates, the choice, the budget, and what the file keeps."""

import dataclasses

import pytest
import torch

from river_compile.kernels.triton.linear import LinearTile, untiled
from river_compile.kernels.triton.tiles import SHIPPED, best_tile, form_key, read_table, tuning_key
from tools.kernels import shipped, tune
from tools.kernels.devices import DEVICES
from tools.kernels.search import cheapest, cost

SPECS = [untiled(1, 2048, n) for n in (256, 512)]


def test_the_shortlist_begins_with_the_models_choice():
    short = tune.shortlist(SPECS[0], "sm_90", 4)
    assert len(short) == 4
    assert short[0] == cheapest(SPECS[0], DEVICES["sm_90"])
    times = [cost(spec, DEVICES["sm_90"]) for spec in short]
    assert times == sorted(times)


def test_the_fastest_candidate_is_chosen():
    slowest_wins = {spec.tile: -i for s in SPECS for i, spec in enumerate(tune.shortlist(s, "sm_90", 5))}
    chosen = tune.tune(SPECS, "sm_90", lambda spec: slowest_wins[spec.tile], budget=60, top=5)
    for spec, found in zip(SPECS, chosen, strict=True):
        assert found == min(tune.shortlist(spec, "sm_90", 5), key=lambda candidate: slowest_wins[candidate.tile])


def test_a_candidate_that_fails_stops_nothing(capsys):
    """Nor do all those of one kernel; what the others chose is kept as soon as it is known."""
    kept = []
    shortest = [spec.tile for spec in tune.shortlist(SPECS[1], "sm_90", 3)]

    def measure(spec):
        if spec.out_features == 256:
            assert not kept
            raise RuntimeError("out of resource: shared memory\nRequired: 999")
        if spec.tile == shortest[0]:
            raise ValueError
        return 1.0 + shortest.index(spec.tile)

    chosen = tune.tune(SPECS, "sm_90", measure, budget=60, top=3, keep=kept.append)
    assert chosen == kept == [dataclasses.replace(SPECS[1], tile=shortest[1])]
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
    (first, *_), shape = calls, (calls[0].out_features, calls[0].in_features)
    assert read_table(path) == {tuning_key("sm_90"): {form_key(first): {shape: dataclasses.astuple(first.tile)}}}


def test_a_spent_budget_chooses_nothing():
    assert tune.tune(SPECS, "sm_90", lambda spec: 1.0, budget=0, top=5) == []


def test_saving_keeps_other_devices_and_shapes(tmp_path, monkeypatch):
    path = tmp_path / "sub" / "tuning.json"
    monkeypatch.setenv("RIVER_COMPILE_TUNING", str(path))
    first, second = LinearTile(16, 128, 8, num_warps=1), LinearTile(32, 64, 8, num_warps=2)
    gated = dataclasses.replace(untiled(1, 2048, 256, gated=True), tile=first)
    tune.save(path, "sm_90", [dataclasses.replace(SPECS[1], tile=first), gated])
    tune.save(path, "gfx942", [dataclasses.replace(SPECS[0], tile=second)])
    tune.save(path, "sm_90", [dataclasses.replace(SPECS[0], tile=second)])
    form, values = form_key(SPECS[0]), {tile: dataclasses.astuple(tile) for tile in (first, second)}
    assert read_table(path) == {
        tuning_key("sm_90"): {
            form: {(256, 2048): values[second], (512, 2048): values[first]},
            form_key(gated): {(256, 2048): values[first]},
        },
        tuning_key("gfx942"): {form: {(256, 2048): values[second]}},
    }
    assert best_tile(SPECS[0], "sm_90").tile == second
    assert [p.name for p in path.parent.iterdir()] == ["tuning.json"]
    assert path.read_text() == shipped.text_of(read_table(path))


def test_weights_of_a_measurement_exceed_the_cache():
    spec = best_tile(SPECS[0])
    assert tune.copies_beyond_cache(spec) == 64
    large = best_tile(untiled(1, 4096, 14336))
    assert tune.copies_beyond_cache(large) * large.cost().bytes > 200e6


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU to tune on")
def test_without_a_gpu_the_command_says_so(capsys):
    assert tune.main([]) == 1
    assert "there is none here" in capsys.readouterr().err


@pytest.mark.parametrize("device", DEVICES)
def test_the_shipped_table_is_the_cost_models(device):
    """A form of each kind; `python -m tools.kernels.tune --shipped` writes all."""
    table, every = read_table(SHIPPED)[device], list(shipped.forms())
    assert {shipped.form_of(fields) for fields in every} == {form for form in table if not form.startswith("attention")}
    for fields in every[:: len(every) // 3]:
        assert table[shipped.form_of(fields)] == shipped.tiles_of(fields, DEVICES[device])


def test_an_entry_that_its_neighbors_give_is_not_needed():
    entries = {(64, 64): (1,), (128, 64): (1,), (256, 64): (2,), (512, 64): (2,), (1024, 64): (2,)}
    kept = shipped.needed(entries)
    assert len(kept) < len(entries)
    assert all(kept[shipped.nearest(kept, shape)] == found for shape, found in entries.items())
