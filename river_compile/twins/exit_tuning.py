"""The exit rule that `quality="fast"` finds by itself: most tokens exit whose mean KL from full depth is in a budget.

The model continues beginnings of the package's texts, and reads the result with twins in place of its layers.
Not handled: a guarantee, and other exit depths (`tune_exit`); rounding of activations in kernels, and the 4-bit head,
whose largest logits are exact; models that cannot be run from token ids alone, which stay at full depth.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn

from river_compile.compile_cache.folder import Entry
from river_compile.exits import ExitPolicy
from river_compile.kernels.portable import entropies, token_kl
from river_compile.progress import stage_shown
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
_ROWS, _CONTEXT, _MEASURED = 12, 16, 48  # of the text; tokens of a row that are not measured, and that are
_LEAST = 0.05  # share of the tokens that must exit for a rule to be worth its checks


@dataclass(frozen=True)
class TunedExit:
    """A rule of criterion "confidence", as estimated on text that the model wrote."""

    budget: float  # largest mean KL from full depth, in nats per token
    threshold: float  # entropy in nats below which a token exits before the first layer; 0: none does, infinity: each
    kl: float  # mean over all tokens
    share: float  # of tokens that exit
    tokens: int  # measured
    kl_of_all: float  # mean if every token exits

    def __str__(self) -> str:
        if not self.share:
            return f"none keeps KL {self.budget:g} (all in 4 bits lose {self.kl_of_all:.3f}), so no token exits"
        which = "each" if math.isinf(self.threshold) else f"those after an entropy below {self.threshold:.2f} nats"
        return (
            f"tokens exit before the first layer, {which}: {self.share:.0%} of {self.tokens} tokens of its own, "
            f"KL {self.kl:.3f} of {self.budget:g}"
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
            return f"none could be found, so no token exits: {self.refusal}"
        pending = "none yet; it is tuned in the background, and full depth answers until then"
        return pending if self.rule is None else str(self.rule)

    def applied_to(self, policy: ExitPolicy) -> ExitPolicy:
        """Return a policy with the rule, or of full depth if there is none."""
        if self.rule is None:
            return replace(policy, threshold=policy.criterion.never)
        return replace(policy, threshold=self.rule.threshold, first_exit=0)

    def find(self, key: str, budget: float, entry: Entry | None) -> bool:
        """Whether the rule of these twins is known, or stored with them; one of other twins is dropped."""
        key = f"{key} {budget:g}"
        if key != self._known[0]:
            stored = None if entry is None else entry.read(_file(budget))
            self._known = (key, None, "") if stored is None else (key, TunedExit(**json.loads(stored)), "")
        return self.rule is not None or bool(self.refusal)

    def tune(self, twins: Sequence[TwinWeight], budget: float, own: SelfCalibration, entry: Entry | None) -> None:
        """Find the rule of the twins that `find` has not found, and store it with them."""
        key, rule, refusal = self._known[0], None, own.refusal
        model = own.model
        if not refusal and model is not None:
            try:
                with NativeLinear(), stage_shown("tuning exits"):
                    rule = tuned(model, twins, budget)
            except Exception as error:  # any model's code may fail here
                refusal = f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.200}"
                log.info("no exit rule of %s: %s", type(model).__name__, refusal)
        self._known = key, rule, refusal
        if entry is not None and rule is not None and entry.folder.exists():
            entry.write(_file(budget), json.dumps(asdict(rule)).encode())


def _file(budget: float) -> str:
    return f"exits-{budget:g}.json"


@torch.no_grad()
def tuned(model: nn.Module, twins: Sequence[TwinWeight], budget: float) -> TunedExit:
    """Return the rule within a budget by which most tokens exit to all twins; raises as the model does."""
    ids = sample(model, _ROWS, _CONTEXT + _MEASURED, LOSS_SEED, beginnings(model, _ROWS, _CONTEXT))
    reference, logits = logits_of(model, ids), logits_of(model, ids, twins)
    before = logits[:, _CONTEXT - 1 : -1].flatten(0, 1)  # the predictions that decide
    pairs = (x[:, _CONTEXT:].flatten(0, 1).split(KL_TOKENS) for x in (reference, logits))
    kl = torch.cat([token_kl(a, b) for a, b in zip(*pairs, strict=True)]).clamp(min=0)
    entropy, order = torch.cat([entropies(part) for part in before.split(KL_TOKENS)]).sort()
    # All tokens exited in this run. By a rule some stay, and those after them lose a little less than is counted here.
    lost = kl[order].cumsum(0) / len(kl)
    count = int((lost <= budget).sum())
    if count < _LEAST * len(kl):
        count = 0
    return TunedExit(
        budget=budget,
        threshold=math.inf if count == len(kl) else entropy[count].item() if count else 0.0,
        kl=lost[count - 1].item() if count else 0.0,
        share=count / len(kl),
        tokens=len(kl),
        kl_of_all=kl.mean().item(),
    )
