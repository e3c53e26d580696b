"""Bits where they count: KL against bytes when each 4-bit product takes its own group size, or stays in 16 bits.

    python -m benchmarks.bits
    python -m benchmarks.bits --model gemma3-270m --json bits.json

Nothing is compiled: the model runs as it is with matrices that were quantized and read back, every token of a text in
4 bits. All are quantized by "gptq" with what they read in text that the model samples.

What a product costs is the KL that it has alone in groups of 128, on other sampled text; in smaller groups, that KL
times what is left of its output's noise. A mixture begins with groups of 128 everywhere and takes the change that saves
most KL for its bytes until the mean of bits is reached. The KL of all products together is then measured, on the
model's greedy answers and on Python's documentation.

A low-rank correction adds A B to a matrix, in 16 bits: the best of its rank for what the matrix reads (LQER, Zhang et
al. 2024, arXiv 2402.02446). "worst" are the products that cost most KL alone. It has no kernel here.

The demo models come from files that hold groups of 32 in 4 bits, which groups of 32 reproduce: what those gain here
they gain on no model whose weights were never quantized.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from benchmarks import common
from benchmarks.texts import MEASURED, answers
from river_compile.cli import shared
from river_compile.cli.shared import topics
from river_compile.kernels.portable import token_kl
from river_compile.kernels.quant.calibrated import quantize_observed
from river_compile.twins.observe import InputMoments, record
from river_compile.twins.own_text import sample
from tools import demo_models

GROUPS = (128, 64, 32)
BUDGETS = (4.375, 4.5, 4.75, 5.0)
HEADERS = ("what", "bits", "MB", "KL own", "KL docs")
_16_BITS = 0  # in the place of a group size
_PARAMETER_BITS = 32  # of a group: scale and zero in bfloat16


@dataclass(frozen=True)
class Product:
    """Linears that read one value, and so take one group size.

    Attributes:
        names: of their weights.
        weight: ``[N, K]``, one below the other.
        inputs: second moments of what it reads, and over how many tokens.
        found: what it stands for, in the weight's dtype, by group size: those of `GROUPS` that divide K, the largest
            first.
        noise: energy of its output's error, by group size.
    """

    names: tuple[str, ...]
    weight: Tensor
    inputs: InputMoments
    found: dict[int, Tensor]
    noise: dict[int, float]

    def bits(self, group: int) -> float:
        """Return what it takes in all."""
        each = 4 + _PARAMETER_BITS / group if group else 16
        return each * self.weight.numel()

    def fitting(self, group: int) -> int:
        """Return the largest group size from its own list that is at most this one."""
        return max(size for size in self.found if size <= group)

    def parts(self, model: nn.Module, matrix: Tensor) -> dict[str, Tensor]:
        """Return weights by name from the merged matrix."""
        weights = [model.get_parameter(name) for name in self.names]
        pieces = matrix.split([len(weight) for weight in weights])
        return {name: part.to(w.dtype) for name, part, w in zip(self.names, pieces, weights, strict=True)}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    shared.quiet()
    model, tokenizer = demo_models.load_or_exit(options.model)
    own = [text.ids for text in answers(model, tokenizer, MEASURED[: options.texts], options.tokens)]
    passages = (tokenizer(text)["input_ids"][: 2 * options.tokens] for text in topics()[::-1])
    docs = [torch.tensor([ids]) for ids, _ in zip(passages, range(options.texts), strict=False)]
    with torch.no_grad():
        rows = measure(model, {"own": own, "docs": docs}, options.judged)
    common.print_table(HEADERS, [[_shown(name, row[name]) for name in HEADERS] for row in rows])
    common.write_outcome({**common.setting("bits", options), "rows": rows}, options.json)
    return 0


def measure(model: PreTrainedModel, texts: Mapping[str, Sequence[Tensor]], judged: int) -> list[dict]:
    """Return a row for each mixture; products are judged alone on so many sampled texts."""
    products = quantized(model)
    total = sum(product.weight.numel() for product in products)
    judge = sample(model, judged, 32, seed=1)
    plain = _logits(model, {}, [judge])
    alone = [kl(model, product.parts(model, product.found[max(product.found)]), [judge], plain) for product in products]
    references = {kind: _logits(model, {}, ids) for kind, ids in texts.items()}

    def row(what: str, weights: Mapping[str, Tensor], bits: float) -> dict:
        print(f"measuring {what} ...", file=sys.stderr, flush=True)
        found = {f"KL {kind}": kl(model, weights, texts[kind], ref) for kind, ref in references.items()}
        return {"what": what, "bits": bits / total, "MB": bits / 8e6, **found}

    def mixed(what: str, groups: Sequence[int]) -> dict:
        weights, bits = {}, 0.0
        for product, group in zip(products, groups, strict=True):
            bits += product.bits(group)
            weights |= product.parts(model, product.found[group]) if group else {}
        return row(what, weights, bits)

    rows = [mixed(f"groups of {group}", [product.fitting(group) for product in products]) for group in GROUPS]
    for budget in BUDGETS:
        rows.append(mixed(f"mixed to {budget} bits", allocate(products, alone, budget * total)))
    worst = sorted(range(len(products)), key=lambda i: -alone[i])[: len(products) // 4]
    for rank, chosen in ((16, range(len(products))), (32, range(len(products))), (32, worst)):
        weights, bits = {}, 0.0
        for i, product in enumerate(products):
            matrix = product.found[product.fitting(64)]
            bits += product.bits(product.fitting(64))
            if i in chosen:
                matrix = matrix + correction(product, matrix, rank)
                bits += 16 * rank * sum(product.weight.shape)
            weights |= product.parts(model, matrix)
        name = "all" if len(chosen) == len(products) else "the worst quarter"
        rows.append(row(f"groups of 64 and rank {rank} in {name}", weights, bits))
    return rows


def quantized(model: PreTrainedModel) -> list[Product]:
    """Return the products of a model's blocks, quantized in every group size that divides them."""
    observed = record(model, sample(model, 32, 32).split(16), own=True)
    by_inputs: dict[int, list[str]] = {}
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            by_inputs.setdefault(id(observed.moments_of(module.weight)), []).append(f"{name}.weight")

    def make(names: Sequence[str]) -> Product:
        weights = [model.get_parameter(name) for name in names]
        inputs, weight = observed.moments_of(weights[0]), torch.cat(weights)
        assert isinstance(inputs, InputMoments), "every linear of a block was read by something"
        exact, moments, found, noise = weight.float(), inputs.cheapest(weight.device), {}, {}
        for group in (group for group in GROUPS if weight.shape[1] % group == 0):
            grid, _ = quantize_observed(exact, group, "gptq", moments, torch.bfloat16, tokens=inputs.tokens)
            noise[group] = moments.energy(exact - grid.dequantize())
            found[group] = grid.dequantize().to(weight.dtype)
        return Product(tuple(names), weight, inputs, found, noise)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(torch.no_grad()(make), by_inputs.values()))


def allocate(products: Sequence[Product], alone: Sequence[float], budget: float) -> list[int]:
    """Return a group size for each product, or 16 bits: the greedy choice by KL saved for each bit."""
    chosen = [max(product.found) for product in products]
    steps = []
    for i, (product, cost) in enumerate(zip(products, alone, strict=True)):
        left = [(group, cost * noise / product.noise[max(product.noise)]) for group, noise in product.noise.items()]
        left.append((_16_BITS, 0.0))
        for (before, kl_before), (after, kl_after) in itertools.pairwise(left):
            more = product.bits(after) - product.bits(before)
            steps.append(((kl_before - kl_after) / more, i, before, after, more))
    spent = sum(product.bits(group) for product, group in zip(products, chosen, strict=True))
    for _, i, before, after, more in sorted(steps, key=lambda step: -step[0]):
        if chosen[i] == before and spent + more <= budget:
            chosen[i], spent = after, spent + more
    return chosen


def correction(product: Product, matrix: Tensor, rank: int) -> Tensor:
    """Return the matrix of this rank, in bfloat16 parts, that makes up for most of the output's error."""
    moments = product.inputs.matrix()
    moments.diagonal().add_(0.2 * moments.diagonal().mean())
    root = torch.linalg.cholesky(moments)  # E |e x|^2 = |e root|^2
    u, s, v = torch.svd_lowrank((product.weight.float() - matrix) @ root, q=rank + 8, niter=2)
    a = u[:, :rank] * s[:rank]
    b = torch.linalg.solve_triangular(root.T, v[:, :rank], upper=True).T
    return a.bfloat16().float() @ b.bfloat16().float()


def kl(model: nn.Module, weights: Mapping[str, Tensor], texts: Iterable[Tensor], reference: Sequence[Tensor]) -> float:
    """Return the mean KL of the logits with these weights from the model's own."""
    pairs = zip(reference, _logits(model, weights, texts), strict=True)
    return torch.cat([token_kl(a, b) for a, b in pairs]).mean().item()


def _logits(model: nn.Module, weights: Mapping[str, Tensor], texts: Iterable[Tensor]) -> list[Tensor]:
    return [
        functional_call(model, dict(weights), (), {"input_ids": ids, "use_cache": False}).logits.flatten(0, 1)
        for ids in texts
    ]


def _shown(name: str, value: str | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.4f}" if name.startswith("KL") else f"{value:.2f}"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = common.command_line(__doc__, "model", "threads", "json")
    parser.add_argument("--texts", type=int, default=12, help="texts of each kind to measure (default 12)")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of an answer, half of a passage (default 48)")
    parser.add_argument("--judged", type=common.number(1), default=16, help="sampled texts that judge a product (16)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
