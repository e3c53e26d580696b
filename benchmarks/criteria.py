"""Exit criteria compared at equal cost: how much KL is left at which time per token.

    python -m benchmarks.criteria
    python -m benchmarks.criteria --own-text                   # what the model itself writes, not documentation
    python -m benchmarks.criteria --model smollm2 --json criteria.json

Texts are fed token by token, under each criterion at thresholds that let more and more tokens leave. For comparison
tokens leave by chance, or as an oracle says which lose least. "At equal time" reads each criterion's frontier, rules
mixed by chance between two of them. Time is that of a decode step as a share of full depth's, by the blocks it ran.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence

import torch
from transformers import PreTrainedModel

from benchmarks import common
from benchmarks.texts import collect
from river_compile.cli import shared
from river_compile.evaluation.meter import Measured, Meter, Rule, compiled
from river_compile.exits import CRITERIA, Criterion
from tools import demo_models

SHARES = (0.3, 0.5, 0.7, 0.85)
FIRST_EXIT = 2
TIMES = (0.6, 0.7, 0.8, 0.9)
COLUMNS = ("criterion", "first_exit", "threshold", "left", "depth", "time", "kl", "agreement")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    shared.quiet()
    results = {}

    def samples(model: PreTrainedModel, tokenizer: Callable) -> tuple[Sequence[torch.Tensor], int]:
        texts = collect(model, tokenizer, options.texts, options.tokens)
        return texts.own if options.own_text else texts.held_out, texts.context

    for name in options.model:
        model, tokenizer = demo_models.load_or_exit(name)
        with torch.inference_mode():
            results[name] = measure(model, *samples(model, tokenizer), options.progress)
        show(name, results[name])
    outcome = {
        "benchmark": "criteria",
        "texts": options.texts,
        "own_text": options.own_text,
        "tokens": options.tokens,
        "machine": common.machine_facts(options.threads),
        "models": {name: {"rows": rows, "at_equal_time": at_equal_time(rows)} for name, rows in results.items()},
    }
    common.write_outcome(outcome, options.json)
    return 0


def measure(
    model: PreTrainedModel,
    samples: Sequence[torch.Tensor],
    context: int,
    progress: bool,
    base: Mapping[str, object] = {"group_size": 64},
) -> list[dict]:
    """Return a row for each rule of each criterion, and for chance and oracle; `base` holds further options."""
    found: list[tuple[str, Measured]] = []
    prices = None
    for criterion in CRITERIA.values():
        settings = {"criterion": criterion.name, "threshold": criterion.never, "first_exit": 1}
        torch._dynamo.reset()
        with compiled(model, {**base, **settings}):
            meter = Meter(model, criterion, samples, context, progress)
            texts = range(len(samples))
            for rule in _rules(meter, criterion, texts):
                found.append((criterion.name, meter.measure(rule, texts, f"{criterion.name} {rule}")))
            if criterion.reads == "previous":
                found += _reference_lines(meter, criterion, texts)
                prices = meter
    return [_row(name, measured, prices) for name, measured in found]


def _rules(meter: Meter, criterion: Criterion, texts: Sequence[int]) -> list[Rule]:
    """Return thresholds under which shares of the tokens leave, and some other first exits."""
    if criterion.reads == "block":
        scores = [s.scores[FIRST_EXIT - 1] for i in texts for s in meter.references[i].steps]
        later = [round(meter.num_blocks * part) for part in (0.25, 0.5, 0.75)]
        rules = [(_quantile(scores, 1 - share), FIRST_EXIT) for share in SHARES]
        return [*rules, *((criterion.always, depth) for depth in (FIRST_EXIT, *later))]
    rules = []
    for first_exit in (FIRST_EXIT, 0):
        runs = [meter.run(i, (criterion.always, first_exit)) for i in texts]
        entropies = [step.entropy for run in runs for step in run.steps]
        rules += [(_quantile(entropies, share), first_exit) for share in SHARES]
        rules.append((criterion.always, first_exit))
    return rules


def _reference_lines(meter: Meter, criterion: Criterion, texts: Sequence[int]) -> list[tuple[str, Measured]]:
    """Measure tokens that leave by chance, and those that lose least when all leave."""
    all_left = meter.measure((criterion.always, FIRST_EXIT), texts, "oracle")
    losses = [loss for text in all_left.kl for loss in text]
    chance = random.Random(0)
    draws = [chance.random() for _ in losses]
    found = []
    for name, ranks in (("chance", draws), ("oracle", losses)):
        for share in SHARES:
            bound = _quantile(ranks, share)
            flat = iter(FIRST_EXIT if rank < bound else meter.num_blocks for rank in ranks)
            depths = [[next(flat) for _ in text] for text in all_left.kl]
            found.append((name, meter.measure_at(depths, texts, name)))
        found.append((name, all_left))
    return found


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def _row(name: str, measured: Measured, meter: Meter) -> dict:
    threshold, first_exit = measured.rule
    stayed = statistics.fmean(depth == meter.num_blocks for depth in measured.depths)
    return {
        "criterion": name,
        "first_exit": first_exit if threshold == threshold else FIRST_EXIT,
        "threshold": threshold if abs(threshold) < float("inf") else None,
        "left": 1 - stayed,
        "depth": measured.mean_depth,
        "time": meter.cost(measured),
        "kl": statistics.fmean(measured.text_losses("kl")),
        "agreement": 1 - statistics.fmean(measured.text_losses("agreement")),
    }


def at_equal_time(rows: Sequence[dict]) -> dict[str, list[float | None]]:
    """Return each criterion's KL at :data:`TIMES`, None where none of its rules is that quick."""
    names = dict.fromkeys(row["criterion"] for row in rows)
    points = {name: [(r["time"], r["kl"]) for r in rows if r["criterion"] == name] for name in names}
    return {name: [least_kl([*found, (1.0, 0.0)], time) for time in TIMES] for name, found in points.items()}


def least_kl(points: Sequence[tuple[float, float]], time: float) -> float | None:
    """Return the least KL at a mean time, of rules (time, KL) or of two of them mixed by chance."""
    quicker = [p for p in points if p[0] <= time]
    slower = [p for p in points if p[0] > time]
    mixed = [a[1] + (b[1] - a[1]) * (time - a[0]) / (b[0] - a[0]) for a in quicker for b in slower]
    return min([*(kl for _, kl in quicker), *mixed], default=None) if quicker else None


def show(name: str, rows: Sequence[dict]) -> None:
    """Print the rows, and the frontiers at equal time."""
    print(f"\n{name}")
    common.print_table(COLUMNS, [[_shown(row[column]) for column in COLUMNS] for row in rows])
    print("\nKL at equal time per token (share of never exit's)")
    common.print_table(
        ("criterion", *(f"{time:.0%}" for time in TIMES)),
        [(criterion, *map(_shown, values)) for criterion, values in at_equal_time(rows).items()],
    )


def _shown(value: object) -> object:
    return f"{value:.3f}" if isinstance(value, float) else value


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = common.command_line(__doc__, "threads", "no-progress", "json")
    parser.add_argument(
        "--model", action="append", help=f"{', '.join(demo_models.MODELS)} or a folder; may be repeated"
    )
    parser.add_argument("--own-text", action="store_true", help="measure the model's own greedy answers")
    parser.add_argument("--texts", type=int, default=12, help="texts to measure (at most 12, the default)")
    parser.add_argument("--tokens", type=int, default=16, help="tokens measured in each text (default 16)")
    options = parser.parse_args(arguments)
    options.model = options.model or ["smollm2", "gemma3-270m"]
    return options


if __name__ == "__main__":
    sys.exit(main())
