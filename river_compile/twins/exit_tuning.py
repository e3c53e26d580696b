"""The exit rule that `quality="fast"` finds by itself: the fastest whose KL from full depth is within a budget.

The model continues beginnings of the package's texts, and reads the result with twins in place of its layers.
Not handled: a guarantee (`tune_exit` has one); rounding of activations in kernels, and the 4-bit head, whose largest
logits are exact; models that cannot be run from token ids alone, which stay at full depth.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from river_compile.compile_cache.folder import Entry
from river_compile.exits import ExitPolicy, first_exits
from river_compile.kernels.portable import entropies, token_kl
from river_compile.passes.program import Matmul
from river_compile.progress import stage_reached, stage_shown
from river_compile.twins.making import ExitPlan
from river_compile.twins.own_text import (
    KL_TOKENS,
    LOSS_SEED,
    NativeLinear,
    SelfCalibration,
    beginnings,
    logits_of,
    sample,
)
from river_compile.twins.weights import TwinWeight

log = logging.getLogger("river_compile.twins")
_ROWS, _CONTEXT, _TOKENS = 12, 16, 48  # of the text; of a row, how many are given or not measured, and all
_LEAST = 0.05  # share of the tokens that must exit for a rule to be worth its checks


@dataclass(frozen=True)
class TunedExit:
    """A rule of criterion "confidence", as estimated on text that the model wrote."""

    budget: float  # largest mean KL from full depth, in nats per token
    num_blocks: int
    threshold: float  # entropy in nats below which a token exits; 0: none does, infinity: each
    first_exit: int  # depth at which it does
    kl: float  # mean over all tokens
    share: float  # of tokens that exit
    tokens: int  # measured
    least_kl: float  # of the candidate depths', if every token exits there

    def __str__(self) -> str:
        if not self.share:
            return (
                f"none keeps KL {self.budget:g}: if all tokens exit, the least is {self.least_kl:.3f}. Every token "
                "runs at full depth"
            )
        which = "every token" if math.isinf(self.threshold) else f"after an entropy below {self.threshold:.2f} nats"
        return (
            f"{which} exits at depth {self.first_exit}: KL {self.kl:.3f} of {self.budget:g}, "
            f"{self.share:.0%} of {self.tokens} tokens of its own"
        )


class TunedExits:
    """The rule of a model's latest twins, in memory and with their file in the compile cache."""

    def __init__(self) -> None:
        self._known: tuple[str, TunedExit | None, str] = "", None, ""  # of which twins, the rule or why there is none

    @property
    def rule(self) -> TunedExit | None:
        """The rule; None if it is not known yet, or `refusal` has a reason."""
        return self._known[1]

    @property
    def refusal(self) -> str:
        """Why no rule can be found, else empty."""
        return self._known[2]

    def __str__(self) -> str:
        """The state in words."""
        if self.refusal:
            return f"none could be found, so every token runs at full depth: {self.refusal}"
        pending = "none yet; it is tuned in the background, and full depth answers until then"
        return pending if self.rule is None else str(self.rule)

    def applied_to(self, policy: ExitPolicy) -> ExitPolicy:
        """Return a policy with the rule, or of full depth if there is none."""
        if self.rule is None:
            return replace(policy, threshold=policy.criterion.never)
        return replace(policy, threshold=self.rule.threshold, first_exit=self.rule.first_exit)

    def find(self, key: str, budget: float, entry: Entry | None) -> bool:
        """Whether the rule of these twins is known, or stored with them; one of other twins is dropped."""
        key = f"{key} {budget:g}"
        if key != self._known[0]:
            stored = None if entry is None else entry.read(_file(budget))
            self._known = (key, None, "") if stored is None else (key, TunedExit(**json.loads(stored)), "")
        return self.rule is not None or bool(self.refusal)

    def tune(
        self, plan: ExitPlan, twins: Mapping[Matmul, TwinWeight], own: SelfCalibration, entry: Entry | None
    ) -> None:
        """Find the rule of the twins that `find` has not found, and store it with them."""
        key, rule, refusal = self._known[0], None, own.refusal
        model = own.model
        if not refusal and model is not None:
            try:
                with NativeLinear(), stage_shown("tuning exits"):
                    rule = tuned(model, [[twins[matmul] for matmul in block] for block in plan.blocks], plan.budget)
            except Exception as error:  # any model's code may fail here
                refusal = f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.200}"
                log.info("no exit rule of %s: %s", type(model).__name__, refusal)
        self._known = key, rule, refusal
        if entry is not None and rule is not None and entry.folder.exists():
            entry.write(_file(plan.budget), json.dumps(asdict(rule)).encode())


def _file(budget: float) -> str:
    return f"exits-{budget:g}.json"


@torch.no_grad()
def tuned(model: nn.Module, twins: Sequence[Sequence[TwinWeight]], budget: float) -> TunedExit:
    """Return the fastest rule within a budget, by the twins of each block; raises as the model does."""
    ids = sample(model, _ROWS, _TOKENS, LOSS_SEED, beginnings(model, _ROWS, _CONTEXT))
    depths = first_exits(len(twins))
    reference = logits_of(model, ids)[:, _CONTEXT:].flatten(0, 1)
    found: list[TunedExit] = []
    losses = []
    for number, depth in enumerate(depths):
        stage_reached((number + 1) / (len(depths) + 1))
        logits = logits_of(model, ids, [twin for block in twins[depth:] for twin in block])
        kl, entropy = _compared(reference, logits)
        losses.append(kl.mean().item())
        found.append(_at_depth(kl, entropy, depth, len(twins), budget))
    best = min(found, key=lambda rule: 1 - rule.share * (1 - _price(twins, rule.first_exit)))
    if best.share < _LEAST:
        best = replace(best, threshold=0.0, first_exit=len(twins), kl=0.0, share=0.0)
    return replace(best, least_kl=min(losses))


def _compared(reference: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return each token's KL and the entropy of the prediction before it, which decides its exit."""
    before = logits[:, _CONTEXT - 1 : -1].flatten(0, 1)
    pairs = zip(reference.split(KL_TOKENS), logits[:, _CONTEXT:].flatten(0, 1).split(KL_TOKENS), strict=True)
    kl = torch.cat([token_kl(a, b) for a, b in pairs]).clamp(min=0)
    return kl, torch.cat([entropies(part) for part in before.split(KL_TOKENS)])


def _at_depth(kl: Tensor, entropy: Tensor, depth: int, num_blocks: int, budget: float) -> TunedExit:
    """Return the highest threshold within the budget if tokens exit at a depth."""
    # All tokens exited in this run, so tokens after one that would have stayed lose a little less than is counted.
    entropy, order = entropy.sort()
    lost = kl[order].cumsum(0) / len(kl)
    count = int((lost <= budget).sum())
    return TunedExit(
        budget=budget,
        num_blocks=num_blocks,
        threshold=math.inf if count == len(kl) else entropy[count].item(),
        first_exit=depth,
        kl=lost[count - 1].item() if count else 0.0,
        share=count / len(kl),
        tokens=len(kl),
        least_kl=math.nan,
    )


def _price(twins: Sequence[Sequence[TwinWeight]], depth: int) -> float:
    """Return what a token that exits at a depth reads of the blocks, as a share of full depth."""
    whole = [sum(p.nbytes for twin in block for p in twin.parameters) for block in twins]
    packed = [sum(twin.nbytes for twin in block) for block in twins]
    return (sum(whole[:depth]) + sum(packed[depth:])) / sum(whole)
