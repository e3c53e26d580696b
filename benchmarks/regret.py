"""How much time the rule for a draft's length loses against the best fixed length, which only hindsight knows.

    python -m benchmarks.exact --regret
    python -m benchmarks.exact --regret --repeats 5 --prompts 4

An accelerated model answers every prompt with drafts of the twins alone: by the rule
(`num_assistant_tokens_schedule=None`), and with each of `LENGTHS` for every draft ("constant"). The rows alternate.
*Regret* is the rule's time over that of the prompt's best length, less 1. The best of several noisy times is too good:
so half of the repeats tell which length is best and the other half what both take, the least time each; then the halves
change places. "one length" is the regret of the length that is best for all prompts together.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from tqdm import tqdm

from benchmarks import common

FIXED = "fixed"  # with a number: a row whose drafts all have so many tokens
LENGTHS = (1, 2, 3, 4, 5, 6, 8, 11, 15)
RULE = "rule"
ROWS = (RULE, *(f"{FIXED} {length}" for length in LENGTHS))
Times = dict[str, list[float]]  # by row: seconds a token of each repeat


class Bench(Protocol):
    """Answers prompts."""

    batches: Mapping[str, Sequence[Any]]  # by kind: of one prompt each

    def seconds_per_token(self, row: str, batch: Any) -> float:
        """Answer a prompt as a row does; return the seconds of a token after the first."""
        ...


def run(bench: Bench, options: argparse.Namespace) -> dict:
    """Measure, print the table, and return the outcome."""
    outcome = {**common.setting("regret", options), **summarize(measure(bench, options.repeats))}
    show(outcome)
    return outcome


def measure(bench: Bench, repeats: int) -> dict[str, list[Times]]:
    """Return the times of each prompt by kind; the first round warms up and is dropped."""
    found: dict[str, list[Times]] = {kind: [{} for _ in batches] for kind, batches in bench.batches.items()}
    total = (repeats + 1) * sum(map(len, bench.batches.values()))
    with tqdm(total=total, unit="prompt", desc="regret") as bar:
        for turn in range(repeats + 1):
            for kind, batches in bench.batches.items():
                for batch, times in zip(batches, found[kind], strict=True):
                    for row in ROWS:
                        seconds = bench.seconds_per_token(row, batch)
                        if turn:
                            times.setdefault(row, []).append(seconds)
                    bar.update()
    return found


def summarize(found: dict[str, list[Times]]) -> dict:
    """Return regrets by kind of prompt, and of one length for all."""
    every = [times for several in found.values() for times in several]
    one = min(ROWS[1:], key=lambda row: sum(min(times[row]) for times in every))
    kinds = {
        kind: {
            "rule": statistics.fmean(_regret(times, RULE) for times in several),
            "one_length": statistics.fmean(_regret(times, one) for times in several),
            "tokens_per_s": 1 / statistics.fmean(min(times[RULE]) for times in several),
            "best": [int(_best(times).split()[-1]) for times in several],
        }
        for kind, several in found.items()
    }
    mean = {row: statistics.fmean(_regret(times, row) for times in every) for row in (RULE, one)}
    return {"kinds": kinds, "one_length": int(one.split()[-1]), "regret": mean[RULE], "regret_one_length": mean[one]}


def _best(times: Times) -> str:
    return min(ROWS[1:], key=lambda row: min(times[row]))


def _regret(times: Times, row: str) -> float:
    halves = [{row: of[half::2] for row, of in times.items()} for half in range(2)]
    regrets = (min(told[row]) / min(told[_best(chosen)]) - 1 for chosen, told in (halves, reversed(halves)))
    return statistics.fmean(regrets)


def show(outcome: dict) -> None:
    """Print a line for each kind of prompt."""
    common.print_setting(outcome)
    common.print_table(
        ["", "tokens/s", "best lengths", "regret, %", "one length, %"],
        [
            [kind, row["tokens_per_s"], " ".join(map(str, row["best"])), 100 * row["rule"], 100 * row["one_length"]]
            for kind, row in outcome["kinds"].items()
        ],
    )
    one = f"{outcome['one_length']} for all: {100 * outcome['regret_one_length']:.1f} %"
    print(f"\nRegret of the rule {100 * outcome['regret']:.1f} %; of {one}")
