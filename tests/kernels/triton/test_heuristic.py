"""Tiles: every shape that the generator accepts gets a legal one; tuning files are looked up first."""

import dataclasses
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from river_compile.kernels.triton import heuristic
from river_compile.kernels.triton.devices import DEVICES
from river_compile.kernels.triton.heuristic import (
    MAX_REGISTERS,
    attention_splits,
    best_tile,
    candidates,
    cost,
    most_registers,
    registers,
    seconds,
    untiled,
)
from river_compile.kernels.triton.linear import NORMS, LinearTile
from river_compile.kernels.triton.spec import Cost, render
from tests.support.examples import examples
from tools.kernels.shapes import MODELS, model_kernels


@st.composite
def problems(draw):
    dense = draw(st.booleans())
    return untiled(
        draw(st.integers(1, 40)),
        draw(st.one_of(st.integers(1, 600), st.sampled_from((576, 4096, 14336, 28672)))),
        draw(st.one_of(st.integers(1, 600), st.sampled_from((4096, 151936)))),
        weights="dense" if dense else "w4",
        group_size=0 if dense else draw(st.sampled_from((32, 64, 128))),
        dtype=draw(st.sampled_from(("float32", "float16", "bfloat16"))),
        norm=draw(st.sampled_from(NORMS)),
        gated=draw(st.booleans()),
    )


@given(problems(), st.sampled_from(sorted(DEVICES)))
@examples(150)
def test_every_accepted_shape_has_a_legal_tile(problem, device):
    chosen = best_tile(problem, device)
    assert registers(chosen) <= most_registers(chosen) <= MAX_REGISTERS
    assert dataclasses.replace(chosen, tile=problem.tile) == problem
    assert chosen.tile.block_k * chosen.steps * chosen.tile.split_k >= chosen.in_features
    compile(render(chosen), "generated", "exec")


def test_the_choice_is_the_cheapest_and_does_not_depend_on_the_given_tile():
    problem = untiled(1, 4096, 4096)
    other = dataclasses.replace(problem, tile=LinearTile(16, 64, 8))
    chosen = best_tile(problem)
    assert chosen == best_tile(other)
    costs = [cost(candidate, DEVICES["sm_90"]) for candidate in candidates(problem, DEVICES["sm_90"])]
    assert len(costs) > 5
    assert cost(chosen, DEVICES["sm_90"]) == min(costs)


def test_illegal_tiles_exist_and_are_seen():
    problem = untiled(1, 4096, 4096, gated=True)
    wide = dataclasses.replace(problem, tile=LinearTile(32, 4096, 8, num_warps=1))
    assert registers(wide) > most_registers(wide)


@pytest.mark.parametrize("model", MODELS)
def test_estimates_are_above_the_roofline_and_not_far_from_it(model):
    for label, spec in model_kernels(MODELS[model]).items():
        if hasattr(spec, "tile"):
            device = DEVICES["sm_90"]
            floor = spec.cost().seconds(device.bandwidth, device.dot_flops)
            assert floor <= seconds(spec, device) <= 2.5 * floor + 5e-6, label


def test_the_roofline_is_the_longer_time():
    assert Cost(100, 10).seconds(10.0, 10.0) == 10.0
    assert Cost(10, 100).seconds(10.0, 10.0) == 10.0


@pytest.mark.parametrize(
    ("heads", "slots", "splits"), [(8, 1024, 32), (1, 8192, 32), (8, 32, 1), (8, 33, 2), (1000, 4096, 1), (3, 512, 16)]
)
def test_splits_of_attention(heads, slots, splits):
    assert attention_splits(heads, slots, DEVICES["sm_90"]) == splits


def test_a_saved_tile_goes_before_the_model(tmp_path, monkeypatch):
    problem, tile = untiled(1, 256, 256), LinearTile(16, 64, 8, 2, 1, 1)
    path = tmp_path / "tuning.json"
    monkeypatch.setenv("RIVER_COMPILE_TUNING", str(path))
    modelled = best_tile(problem).tile
    assert modelled != tile
    path.write_text(
        json.dumps({heuristic.tuned_for("sm_90"): {heuristic.tuning_key(problem): dataclasses.asdict(tile)}})
    )
    assert best_tile(problem).tile == tile
    assert best_tile(problem, "sm_80").tile != tile
    other = {"sm_90, triton 2.0": {heuristic.tuning_key(problem): dataclasses.asdict(tile)}}
    path.write_text(json.dumps(other))
    os.utime(path, ns=(1, 1))
    assert best_tile(problem).tile == modelled


@pytest.mark.parametrize("damage", ["", "[1]", "[" * 100_000, '{"sm_90": {"key": {"block_n": 3, "block_k": 64}}}'])
def test_a_damaged_tuning_file_is_ignored_with_a_warning(tmp_path, monkeypatch, damage):
    path = tmp_path / "tuning.json"
    path.write_text(damage)
    monkeypatch.setenv("RIVER_COMPILE_TUNING", str(path))
    with pytest.warns(UserWarning, match="cannot be read and is ignored"):
        assert registers(best_tile(untiled(1, 256, 256))) <= MAX_REGISTERS
