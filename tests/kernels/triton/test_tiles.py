"""Tiles: every shape gets a valid one; tuning files take precedence."""

import dataclasses
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from river_compile.kernels.triton.linear import NORMS, LinearTile, untiled
from river_compile.kernels.triton.spec import Cost, render
from river_compile.kernels.triton.tiles import (
    SHIPPED,
    attention_splits,
    best_tile,
    form_key,
    nearest_architecture,
    read_table,
    tuning_key,
)
from tests.support.examples import examples
from tools.kernels.cost_model import registers
from tools.kernels.search import MAX_REGISTERS, most_registers
from tools.kernels.shapes import MODELS, backbone_kernels
from tools.kernels.shipped import text_of

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


@st.composite
def problems(draw):
    weights = draw(st.sampled_from(("w4", "dense", "bf12")))
    experts = draw(st.sampled_from((0, 3, 128))) if weights == "w4" else 0
    gated = draw(st.booleans()) and not experts
    n, parts = draw(st.one_of(st.integers(1, 150).map(lambda n: 4 * n), st.sampled_from((4096, 151936)))), ()
    if weights == "dense" and n % 48 == 0 and draw(st.booleans()):
        parts = (n, n) if gated else (n // 3, n // 3, n // 3)
    return untiled(
        draw(st.integers(1, 40)),
        draw(st.one_of(st.integers(1, 600), st.sampled_from((576, 4096, 14336, 28672)))),
        n,
        weights=weights,
        group_size=draw(st.sampled_from((32, 64, 128))) if weights == "w4" else 0,
        dtype=draw(st.sampled_from(("float32", "float16", "bfloat16"))) if weights != "bf12" else "bfloat16",
        norm="none" if experts else draw(st.sampled_from(NORMS)),
        bias=not experts and draw(st.booleans()),
        gated=gated,
        experts=experts,
        matrices=parts,
    )


@given(problems(), st.sampled_from(ARCHITECTURES))
@examples(150)
def test_every_accepted_shape_has_a_legal_tile(problem, device):
    chosen = best_tile(problem, device)
    assert registers(chosen) <= most_registers(chosen) <= MAX_REGISTERS
    assert dataclasses.replace(chosen, tile=problem.tile) == problem
    assert chosen.tile.block_k * chosen.steps * chosen.tile.split_k >= chosen.in_features
    compile(render(chosen), "generated", "exec")


def test_the_roofline_is_the_longer_time():
    assert Cost(100, 10).seconds(10.0, 10.0) == 10.0
    assert Cost(10, 100).seconds(10.0, 10.0) == 10.0


@pytest.mark.parametrize(("weights", "widths"), [("dense", range(1, 17)), ("bf12", range(2, 17))])
@pytest.mark.parametrize("model", ["llama-3.2-1b", "llama-3.1-8b"])
def test_one_kernel_serves_passes_of_all_widths(model, weights, widths):
    """So that a row's bits do not depend on others; one 12-bit row has its own kernel."""
    kernels = [backbone_kernels(MODELS[model], weights, rows=rows) for rows in widths]
    assert all(found == kernels[0] for found in kernels)


def test_a_measured_tile_goes_before_the_shipped_one(tmp_path, monkeypatch):
    problem, tile = untiled(1, 256, 256), LinearTile(16, 64, 8, 2, 1, 1)
    path = tmp_path / "tuning.json"
    monkeypatch.setenv("RIVER_COMPILE_TUNING", str(path))
    shipped = best_tile(problem).tile
    assert shipped != tile
    measured = {form_key(problem): {"256x256": dataclasses.astuple(tile)}}
    path.write_text(json.dumps({tuning_key("sm_90"): measured}))
    assert best_tile(problem).tile == tile
    assert best_tile(problem, "sm_80").tile != tile
    assert best_tile(untiled(1, 256, 257)).tile == shipped  # (another shape's)
    path.write_text(json.dumps({"sm_90, triton 2.0": measured}))
    os.utime(path, ns=(1, 1))
    assert best_tile(problem).tile == shipped


@pytest.mark.parametrize("damage", ["", "[1]", "[" * 100_000, '{"sm_90": {"form": {"1x1": [3, 64]}}}'])
def test_a_damaged_tuning_file_is_ignored_with_a_warning(tmp_path, monkeypatch, damage):
    path = tmp_path / "tuning.json"
    path.write_text(damage)
    monkeypatch.setenv("RIVER_COMPILE_TUNING", str(path))
    with pytest.warns(UserWarning, match="^RC084: Cannot read the tuning file"):
        assert registers(best_tile(untiled(1, 256, 256))) <= MAX_REGISTERS


@pytest.mark.parametrize("device", ARCHITECTURES)
def test_a_shape_takes_the_nearest_entry_of_its_form(device):
    problem = untiled(1, 4096, 6144, norm="rms")
    entries = read_table(SHIPPED)[device][form_key(problem)]
    assert entries
    for (n, k), tile in entries.items():
        for near_n, near_k in ((n, k), (n + n // 64, k - k // 64)):
            found = best_tile(untiled(1, near_k, near_n, norm="rms"), device)
            assert found.tile == LinearTile(*tile)


def test_splits_of_attention_are_those_of_the_nearest_cache():
    """Llama-3.1-8B with 1 and 16 rows; a shorter cache has fewer splits."""
    assert attention_splits(8, 1024, 128) == attention_splits(9, 1100, 120) == 32
    assert attention_splits(128, 1024, 128) == 4
    assert attention_splits(8, 95, 128) == 2
    assert attention_splits(8, 31, 128) == 1


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("sm_90", "sm_90"), ("sm_86", "sm_80"), ("sm_89", "sm_80"), ("sm_103", "sm_100"), ("sm_120", "sm_100"),
        ("sm_75", "sm_80"), ("gfx942", "gfx942"), ("gfx950", "gfx942"), ("gfx90a", "gfx942"), ("a card", "sm_90"),
    ],
)  # fmt: skip
def test_an_unknown_architecture_takes_the_nearest_older_one(name, found):
    assert nearest_architecture(name, ARCHITECTURES) == found
    problem = untiled(4, 4096, 4096)
    assert best_tile(problem, name) == best_tile(problem, found)


def test_the_shipped_table_is_sorted():
    assert SHIPPED.read_text(encoding="utf-8") == text_of(read_table(SHIPPED))
    assert set(read_table(SHIPPED)) == set(ARCHITECTURES)
