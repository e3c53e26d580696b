"""The joint loss of a model's twins, estimated on a few tokens that the model samples itself.

The text is sampled with another seed than the statistics' text, so that nothing was fitted to it. It runs twice, in one
pass each: as the model is, and with every packed matrix in its place, read back from its 4 bits when it is needed, one
at a time. The estimate is of tokens that leave before the first block, after a prompt in 4 bits: the most that leaving
costs. Not handled: rounding of activations in kernels, and text of another kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from river_compile.kernels.portable import token_kl
from river_compile.twins.calibration_stats import Products
from river_compile.twins.observe import one_expert_at_a_time
from river_compile.twins.sampling import enough, everything_counts, sample
from river_compile.twins.weights import TwinWeight
from river_compile.upstream.dynamo import uncompiled_forward

ROWS, MOST_TOKENS, SEED = 32, 8, 1  # (a longer row takes a step more)
LARGE = 0.2  # nats
_AT_ONCE = 64  # tokens: large vocabularies take memory in float32


@dataclass(frozen=True)
class TwinLoss:
    """The joint loss of all twins of a model.

    Attributes:
        kl: mean KL divergence from the backbone, in nats per token.
        agreement: share of tokens whose most likely successor stays the same.
        tokens: how many were sampled for it.
    """

    kl: float
    agreement: float
    tokens: int

    @property
    def large(self) -> bool:
        """Whether tokens that leave early are likely to be other ones than the model's."""
        return self.kl > LARGE

    def __str__(self) -> str:
        return f"KL {self.kl:.3f}, {100 * self.agreement:.0f} % of next tokens, on {self.tokens} tokens of its own"


@torch.no_grad()
def estimate_loss(model: nn.Module, packed: Iterable[TwinWeight]) -> TwinLoss:
    """Samples a little text and compares the logits of the model in 16 and in 4 bits; raises as `sample` does."""
    ids = sample(model, ROWS, enough(model, ROWS, MOST_TOKENS), SEED)
    forward, inputs = uncompiled_forward(model), {"input_ids": ids, "use_cache": False, **everything_counts(model, ids)}
    with one_expert_at_a_time(model):
        reference = forward(**inputs).logits.flatten(0, 1)
        with _InTwins(model.parameters(), list(packed)):
            logits = forward(**inputs).logits.flatten(0, 1)
    pairs = zip(reference.split(_AT_ONCE), logits.split(_AT_ONCE), strict=True)
    kl = torch.cat([token_kl(a, b) for a, b in pairs]).mean().item()
    agreement = (reference.argmax(-1) == logits.argmax(-1)).float().mean().item()
    return TwinLoss(kl, agreement, ids.numel())


class _InTwins(Products):
    """Multiplies by the 4-bit matrices of twins."""

    def __init__(self, parameters: Iterable[Tensor], packed: Sequence[TwinWeight]) -> None:
        super().__init__(parameters)
        self._parts: dict[int, tuple[TwinWeight, int]] = {}  # by parameter: its product, and which part of it
        for site in packed:
            weights = site.parameters[: len(site.matmul.weights)]
            self._parts |= {id(weight): (site, i) for i, weight in enumerate(weights)}
        self._last: tuple[TwinWeight, Tensor] | None = None

    def instead(self, matrix: Tensor, parameter: Tensor, index: int | None) -> Tensor:
        found = self._parts.get(id(parameter))
        if found is None:
            return matrix
        site, part = found
        whole = self._of(site)
        if site.matmul.experts:
            stack = whole.unflatten(0, (site.matmul.experts, -1))
            weight = stack if index is None else stack[index]
        else:
            weight = whole.split(site.matmul.out_features)[part]
        weight = weight.to(matrix.dtype)
        # A block may read its parameter transposed: it then has the strides of the transposed matrix.
        as_stored = weight.mT if site.matmul.transposed else weight
        same = matrix.stride()[-2:] == parameter.stride()[-2:] and matrix.shape[-2:] == parameter.shape[-2:]
        return as_stored if same else as_stored.mT

    def _of(self, site: TwinWeight) -> Tensor:
        if self._last is None or self._last[0] is not site:
            self._last = site, site.dequantize()
        return self._last[1]
