"""Tiles: every shape that the generator accepts gets a legal one; tuning files are looked up first."""

import dataclasses
import json
import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from river_compile.kernels.triton.cost_model import (
    Compiled,
    attention_estimate,
    estimate,
    registers,
    seconds,
    shared_bytes,
)
from river_compile.kernels.triton.devices import DEVICES
from river_compile.kernels.triton.linear import NORMS, LinearTile
from river_compile.kernels.triton.spec import Cost, render
from river_compile.kernels.triton.tiles import (
    MAX_REGISTERS,
    attention_splits,
    best_tile,
    candidates,
    cost,
    most_registers,
    untiled,
)
from river_compile.kernels.triton.tuned import tuned_for, tuning_key
from tests.support.examples import examples
from tools.kernels.shapes import MODELS, backbone_kernels, model_kernels


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
            floor = spec.cost(1).seconds(device.bandwidth, device.dot_flops)
            assert floor <= seconds(spec, device, 1) <= 2.5 * floor + 5e-6, label


def test_the_roofline_is_the_longer_time():
    assert Cost(100, 10).seconds(10.0, 10.0) == 10.0
    assert Cost(10, 100).seconds(10.0, 10.0) == 10.0


@pytest.mark.parametrize(
    ("heads", "slots", "group", "splits"),
    [(8, 1024, 4, 32), (8, 32768, 4, 64), (128, 1024, 4, 4), (1, 8192, 8, 64), (1, 32768, 8, 128), (8, 32, 4, 1)],
)
def test_splits_of_attention(heads, slots, group, splits):
    """Llama-3.1-8B with one row and with 16, and one rank of eight of the 70B: half and twice as many take longer."""
    sizes = (heads, slots, DEVICES["sm_90"], group, 128)
    assert attention_splits(*sizes) == splits
    halved, chosen, doubled = (attention_estimate(*sizes, n).total for n in (splits / 2, splits, 2 * splits))
    assert chosen < min(halved if splits > 1 else math.inf, doubled)


def test_attention_of_a_long_context_is_bound_by_bytes():
    sizes = (8, 32768, DEVICES["sm_90"], 4, 128)
    chosen = attention_estimate(*sizes, attention_splits(*sizes))
    assert chosen.bound == "bytes"
    assert pytest.approx(chosen.bytes) == 4 * 8 * 32768 * 128 / 3.35e12
    assert attention_estimate(*sizes, 8).bound in ("in flight", "tail")


@pytest.mark.parametrize("weights", ["dense", "bf12"])
def test_rows_of_the_backbone_wait_for_bytes(weights):
    """Copies of the steps to come are on their way; to unpack 12 bits takes about as long as to read them."""
    kernels = backbone_kernels(MODELS["llama-3.1-8b"], weights, rows=4)
    for label in ("norm + gate|up", "down + residual", "norm + head"):
        found = estimate(kernels[label], DEVICES["sm_90"])
        assert found.bound == "bytes" or weights == "bf12", (label, found)
        assert found.total < 1.5 * found.bytes, (label, found)
        alone = dataclasses.replace(kernels[label].tile, num_stages=1)
        assert estimate(dataclasses.replace(kernels[label], tile=alone), DEVICES["sm_90"]).total > found.total


@pytest.mark.parametrize(("weights", "widths"), [("dense", range(1, 17)), ("bf12", range(2, 17))])
@pytest.mark.parametrize("model", ["llama-3.2-1b", "llama-3.1-8b"])
def test_one_kernel_serves_passes_of_all_widths(model, weights, widths):
    """So that a row's bits depend on nobody beside it; of weights in 12 bits, one row has a kernel of its own."""
    kernels = [backbone_kernels(MODELS[model], weights, rows=rows) for rows in widths]
    assert all(found == kernels[0] for found in kernels)


def test_what_all_programs_read_counted_by_hand():
    tile = LinearTile(16, 512, 8)
    spec = dataclasses.replace(untiled(8, 4096, 1024, residual=True), tile=tile)
    assert shared_bytes(spec) == 64 * 8 * 4096 * 2
    behind_norm = dataclasses.replace(untiled(8, 4096, 1024, norm="rms"), tile=tile)
    assert shared_bytes(behind_norm) == 64 * (8 + 1) * 4096 * 2
    twice = untiled(8, 4096, 1024, norm="rms", weights="dense", group_size=0, dtype="float16")
    assert shared_bytes(best_tile(twice), 8) == 1024 // best_tile(twice).tile.block_n * (2 * 8 + 1) * 4096 * 2


def test_an_estimate_goes_by_what_was_compiled():
    spec, device = best_tile(untiled(1, 4096, 14336, norm="rms", gated=True)), DEVICES["sm_90"]
    many = estimate(spec, device, compiled=Compiled(resident=6, instructions=1e5))
    assert many.bound == "instructions"
    assert many.instructions > 10 * estimate(spec, device).instructions
    assert estimate(spec, device, compiled=Compiled(resident=1)).total > estimate(spec, device).total


def test_few_programs_get_more_warps():
    """q|k|v of one rank of eight of the 70B has programs for a third of the processors."""
    spec = model_kernels(MODELS["llama-3.1-70b/8"])["norm + q|k|v"]
    assert spec.out_features // spec.tile.block_n * spec.tile.num_warps >= 2 * DEVICES["sm_90"].processors


def test_a_saved_tile_goes_before_the_model(tmp_path, monkeypatch):
    problem, tile = untiled(1, 256, 256), LinearTile(16, 64, 8, 2, 1, 1)
    path = tmp_path / "tuning.json"
    monkeypatch.setenv("RIVER_COMPILE_TUNING", str(path))
    modelled = best_tile(problem).tile
    assert modelled != tile
    path.write_text(json.dumps({tuned_for("sm_90"): {tuning_key(problem): dataclasses.asdict(tile)}}))
    assert best_tile(problem).tile == tile
    assert best_tile(problem, "sm_80").tile != tile
    other = {"sm_90, triton 2.0": {tuning_key(problem): dataclasses.asdict(tile)}}
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
