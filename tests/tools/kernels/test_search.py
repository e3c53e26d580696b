"""The search for tiles: every shape has a legal candidate, and the cheapest by the cost model is chosen."""

import dataclasses
import math

import pytest

from river_compile.kernels.triton.linear import LinearTile, untiled
from river_compile.kernels.triton.tiles import best_tile
from tools.kernels.cost_model import attention_seconds, registers, seconds, shared_bytes
from tools.kernels.devices import DEVICES
from tools.kernels.search import candidates, cheapest, cheapest_splits, cost, most_registers
from tools.kernels.shapes import MODELS, backbone_kernels, model_kernels


def test_the_choice_is_the_cheapest_and_does_not_depend_on_the_given_tile():
    problem = untiled(1, 4096, 4096)
    other = dataclasses.replace(problem, tile=LinearTile(16, 64, 8))
    chosen = cheapest(problem, DEVICES["sm_90"])
    assert chosen == cheapest(other, DEVICES["sm_90"])
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


@pytest.mark.parametrize(
    ("heads", "slots", "group", "splits"),
    [(8, 1024, 4, 32), (8, 32768, 4, 64), (128, 1024, 4, 4), (1, 8192, 8, 64), (1, 32768, 8, 128), (8, 32, 4, 1)],
)
def test_splits_of_attention(heads, slots, group, splits):
    """Llama-3.1-8B with one row and with 16, and one rank of eight of the 70B: half and twice as many take longer."""
    sizes = (heads, slots, DEVICES["sm_90"], group, 128)
    assert cheapest_splits(*sizes) == splits
    halved, chosen, doubled = (attention_seconds(*sizes, n) for n in (splits / 2, splits, 2 * splits))
    assert chosen < min(halved if splits > 1 else math.inf, doubled)


def test_attention_of_a_long_context_is_bound_by_bytes():
    sizes = (8, 32768, DEVICES["sm_90"], 4, 128)
    by_bytes = 4 * 8 * 32768 * 128 / 3.35e12
    assert by_bytes < attention_seconds(*sizes, cheapest_splits(*sizes)) < 1.25 * by_bytes
    assert attention_seconds(*sizes, 8) > 2 * by_bytes


@pytest.mark.parametrize("weights", ["dense", "bf12"])
def test_rows_of_the_backbone_wait_for_bytes(weights):
    """Copies of the steps to come are on their way; to unpack 12 bits takes about as long as to read them."""
    kernels = backbone_kernels(MODELS["llama-3.1-8b"], weights, rows=4)
    for label in ("norm + gate|up", "down + residual", "norm + head"):
        found, device = seconds(kernels[label], DEVICES["sm_90"]), DEVICES["sm_90"]
        assert found < 1.5 * kernels[label].cost(4).bytes / device.bandwidth, label
        alone = dataclasses.replace(kernels[label].tile, num_stages=1)
        assert seconds(dataclasses.replace(kernels[label], tile=alone), device) > found


def test_what_all_programs_read_counted_by_hand():
    tile = LinearTile(16, 512, 8)
    spec = dataclasses.replace(untiled(8, 4096, 1024, residual=True), tile=tile)
    assert shared_bytes(spec) == 64 * 8 * 4096 * 2
    behind_norm = dataclasses.replace(untiled(8, 4096, 1024, norm="rms"), tile=tile)
    assert shared_bytes(behind_norm) == 64 * (8 + 1) * 4096 * 2
    twice = untiled(8, 4096, 1024, norm="rms", weights="dense", group_size=0, dtype="float16")
    assert shared_bytes(best_tile(twice), 8) == 1024 // best_tile(twice).tile.block_n * (2 * 8 + 1) * 4096 * 2


def test_few_programs_get_more_warps():
    """q|k|v of one rank of eight of the 70B has programs for a third of the processors."""
    spec = model_kernels(MODELS["llama-3.1-70b/8"])["norm + q|k|v"]
    assert spec.out_features // spec.tile.block_n * spec.tile.num_warps >= 2 * DEVICES["sm_90"].processors


@pytest.mark.parametrize("bias", [False, True])
def test_a_product_of_one_matrix_may_be_split_with_a_bias(bias):
    spec = untiled(1, 4096, 512, weights="dense", group_size=0, bias=bias)
    assert {candidate.tile.split_k for candidate in candidates(spec, DEVICES["sm_90"])} == {1, 2, 4}
