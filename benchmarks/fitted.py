"""Whether what is known before a token's first block tells what it loses in the twins: a fitted model and entropy.

    python -m benchmarks.fitted
    python -m benchmarks.fitted --model smollm2 --texts 16 --json fitted.json

Texts of three kinds are fed token by token; seven tokens of ten, drawn by chance, leave before the first block. A
logistic model learns from half of a kind's texts which tokens are among the fifth that lose most, and orders those of
the other half; then the halves change places. Shown is the share of their KL that is left when the least trusted 10 to
50 % of the tokens that left stay instead, and lose nothing.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import common
from benchmarks.quality import humaneval
from river_compile.cli import shared
from river_compile.cli.shared import topics
from river_compile.evaluation.meter import Meter, compiled
from river_compile.exits import CRITERIA
from river_compile.kernels.portable import token_kl
from river_compile.twins.own_text import sample
from tools import demo_models

CONTEXT, TOKENS, LEFT, HARD = 32, 64, 0.7, 0.2
STAYING = (0.1, 0.2, 0.3, 0.5)


def texts(model: PreTrainedModel, tokenizer: Callable, count: int) -> dict[str, list[Tensor]]:
    """Return `count` texts ``[1, CONTEXT + TOKENS]`` of each kind: sampled, Python's documentation, HumanEval."""
    kinds = {"own text": list(sample(model, count, CONTEXT + TOKENS, seed=1).split(1))}
    code = [problem["prompt"] + problem["canonical_solution"] for problem in humaneval.problems()]
    for kind, passages in (("documentation", topics()), ("code", code)):
        ids = [tokenizer(text)["input_ids"][: CONTEXT + TOKENS] for text in passages]
        kinds[kind] = [torch.tensor([row]) for row in ids if len(row) == CONTEXT + TOKENS][:count]
    return kinds


def features(ids: Sequence[int], logs_TV: Tensor, left: Sequence[bool]) -> Tensor:
    """Return what is known before a token's first block, ``[T, features]``, the entropy of the step before first.

    Args:
        ids: of the text up to the last of the T tokens.
        logs_TV: log probabilities that the steps before gave.
        left: whether they came from the twins.
    """
    entropy, best = -(logs_TV.exp() * logs_TV).sum(-1), logs_TV.topk(2, -1).values
    surprise = -logs_TV.gather(1, torch.tensor(ids[-len(logs_TV) :])[:, None])
    rows = []
    for i in range(len(logs_TV)):
        text, recent = ids[: len(ids) - len(logs_TV) + i + 1], left[max(0, i - 15) : i + 1]
        before = [n for n in (1, 2, 3) if any(text[at - n : at] == text[-n:] for at in range(n, len(text)))]
        follower = next((text[at + 1] for at in range(len(text) - 3, -1, -1) if text[at] == text[-2]), None)
        window = entropy[max(0, i - 7) : i + 1]
        rows.append([window[-2:].mean(), window.mean(), window.max(), recent[-1], sum(recent) / 16, len(before)])
        rows[-1] += [follower == text[-1], math.log(text.count(text[-1])), math.log(10 + text[-1]), math.log(len(text))]
    return torch.cat([entropy[:, None], best[:, :1] - best[:, 1:], surprise.clamp(max=15), torch.tensor(rows)], 1)


def fit(features_NF: Tensor, hard_N: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a logistic model of which tokens are hard, fitted by Newton's method: features to scores."""
    mean, spread = features_NF.mean(0), features_NF.std(0) + 1e-6

    def design(x: Tensor) -> Tensor:
        return torch.cat([torch.ones(len(x), 1), (x - mean) / spread], 1).double()

    x, weights = design(features_NF), torch.zeros(features_NF.shape[1] + 1, dtype=torch.float64)
    ridge = 0.01 * len(x) * torch.eye(len(weights), dtype=torch.float64)
    for _ in range(20):
        chance = (x @ weights).sigmoid()
        curvature = (x * (chance * (1 - chance))[:, None]).T @ x + ridge
        weights += torch.linalg.solve(curvature, x.T @ (hard_N.double() - chance) - ridge @ weights)
    return lambda features: design(features) @ weights


def kl_left(scores: Tensor, kl: Tensor) -> list[float]:
    """Return the share of the KL that is left when the tokens of the highest scores stay."""
    kept = kl[scores.argsort(descending=True, stable=True)]
    return [(kept[int(share * len(kept)) :].sum() / kept.sum()).item() for share in STAYING]


def compare(found: Sequence[dict[str, Tensor]]) -> dict[str, list[float]]:
    """Return the shares of KL left by order of staying; each of `found` has the tokens of one text that left."""
    halves, fitted = (found[::2], found[1::2]), []
    for learnt, tested in (halves[::-1], halves):
        x, kl = (torch.cat([text[name] for text in learnt]) for name in ("features", "kl"))
        score = fit(x, kl > kl.quantile(1 - HARD))
        fitted += [score(text["features"]) for text in tested]
    whole = {name: torch.cat([text[name] for half in halves for text in half]) for name in found[0]}
    kl, draws = whole["kl"], torch.Generator().manual_seed(0)
    orders = {"chance": torch.rand(len(kl), generator=draws), "confidence": whole["features"][:, 0]}
    orders |= {"fitted": torch.cat(fitted), "oracle": kl}
    return {"kl": [kl.mean().item()], **{name: kl_left(scores, kl) for name, scores in orders.items()}}


def measure(model: PreTrainedModel, kinds: dict[str, list[Tensor]], progress: bool, base: dict) -> dict[str, dict]:
    """Return by kind of text what :func:`compare` finds; `base` holds further options of the backend."""
    criterion, samples = CRITERIA["confidence"], [ids for found in kinds.values() for ids in found]
    with compiled(model, {**base, "criterion": criterion.name, "threshold": criterion.never, "first_exit": 1}):
        meter = Meter(model, criterion, samples, samples[0].shape[1] - TOKENS, progress)
        found = iter([_text(meter, i, ids[0].tolist()) for i, ids in enumerate(samples)])
    return {kind: compare([next(found) for _ in mine]) for kind, mine in kinds.items()}


def _text(meter: Meter, index: int, ids: Sequence[int]) -> dict[str, Tensor]:
    """Return KL and features of the tokens that left, but for the first of the text."""
    draw = random.Random(index)
    left = [draw.random() < LEFT for _ in range(TOKENS)]
    run = meter.run_at(index, [0 if leaves else meter.num_blocks for leaves in left])
    logs = run.logits.float().log_softmax(-1)
    found = {"kl": token_kl(meter.references[index].logits, run.logits)[1:]}
    found["features"] = features(ids, logs[:-1], left[:-1])
    return {name: values[torch.tensor(left[1:])] for name, values in found.items()}


@torch.inference_mode()
def _measure(options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    torch.set_num_threads(options.threads)
    shared.quiet()
    model, tokenizer = demo_models.load(options.model, dtype=options.dtype)
    return measure(model, texts(model, tokenizer, options.texts), options.progress, {})


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = common.command_line(__doc__, "model", "dtype", "threads", "no-progress", "json")
    parser.add_argument("--texts", type=common.number(2), default=40, help="texts of each kind (%(default)s)")
    options = parser.parse_args(arguments)
    found = common.attempted(_measure, options)
    if found is None:
        return 1
    outcome = {**common.setting("fitted", options), "kl_left": found}
    common.print_setting(outcome)
    for kind, rows in found.items():
        print(f"\n{kind}: {rows['kl'][0]:.4f} nats per token that left; the share left where some of them stay")
        shown = [(name, *(f"{share:.2f}" for share in shares)) for name, shares in rows.items() if name != "kl"]
        common.print_table(("order", *(f"{share:.0%}" for share in STAYING)), shown)
    common.write_outcome(outcome, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
