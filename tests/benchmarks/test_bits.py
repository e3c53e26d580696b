"""How `benchmarks.bits` shares bits out, and what its low-rank correction is."""

import pytest
import torch

from benchmarks.bits import Product, allocate, correction
from river_compile.twins.observe import InputMoments


def product(rows, columns, noise):
    """Returns a product whose outputs have this noise by group size, and whose inputs are uneven."""
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator)
    inputs = InputMoments(columns)
    inputs.add(torch.randn(4 * columns, columns, generator=generator) * torch.linspace(0.1, 3, columns))
    return Product(("weight",), weight, inputs, {group: weight for group in noise}, noise)


def test_bits_go_where_they_save_most():
    """Small groups first where the KL is; 16 bits where even they leave much; nothing beyond the budget."""
    even = {128: 1.0, 64: 0.9, 32: 0.8}
    products = [product(8, 128, even), product(16, 128, even), product(24, 128, even)]
    weights = [p.weight.numel() for p in products]
    cheapest = sum(4.25 * n for n in weights)
    assert allocate(products, [0.1, 0.1, 0.1], cheapest) == [128, 128, 128]
    assert allocate(products, [0.1, 0.1, 0.1], cheapest + 0.25 * weights[0]) == [64, 128, 128]  # fewest bytes for it
    assert allocate(products, [0.0, 0.0, 9.0], cheapest + 0.75 * weights[2]) == [128, 128, 32]
    assert allocate(products, [0.0, 0.0, 9.0], cheapest + 12 * weights[2])[2] == 0
    for budget in (4.3, 4.6, 5.0, 8.0, 16.0):
        chosen = allocate(products, [0.3, 0.2, 0.1], budget * sum(weights))
        assert sum(p.bits(group) for p, group in zip(products, chosen, strict=True)) <= budget * sum(weights)
    assert chosen == [0, 0, 0]


def test_a_product_has_the_group_sizes_that_divide_it():
    odd = product(8, 64, {64: 1.0, 32: 0.5})
    assert (odd.fitting(128), odd.fitting(64), odd.fitting(32)) == (64, 64, 32)


def test_a_correction_is_the_best_of_its_rank_for_the_inputs():
    """An error of low rank is made up for entirely; of any other, better than by the best one for even inputs."""
    p = product(48, 32, {32: 1.0})
    generator = torch.Generator().manual_seed(1)
    low = torch.randn(48, 4, generator=generator) @ torch.randn(4, 32, generator=generator)
    assert (correction(p, p.weight - low, 4) - low).norm() < 0.02 * low.norm()
    error = torch.randn(48, 32, generator=generator)
    moments = p.inputs.matrix()

    def left(found):
        rest = error - found
        return torch.trace(rest @ moments @ rest.T).item()

    u, s, v = torch.linalg.svd(error, full_matrices=False)
    even = (u[:, :4] * s[:4]) @ v[:4]
    assert left(correction(p, p.weight - error, 4)) < left(even) < left(0)
    assert left(correction(p, p.weight - error, 8)) == pytest.approx(0, abs=left(even))
