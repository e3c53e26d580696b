"""The paper's table: problems that a model solves, its speed and depth, by exit rule and quantizer.

    python -m benchmarks.tasks --answers answers.jsonl
    python -m benchmarks.tasks --model smollm2 --task gsm --limit 200 --quantizers hqq --answers answers.jsonl
    python -m benchmarks.tasks --task perplexity       # of Python's documentation, decoded through the exits

Rows are plain transformers, full depth ("never"), exact mode, all twins ("4-bit"), and exits by similarity above each
of `--similarity`, by confidence, or by files of `river tune`. Answers go into `--answers` as they come; a stopped run
continues. Problems are answered one after another.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import common
from benchmarks.quality.answers import Answer, AnswerFile, Problems, ask, run_of, summary
from benchmarks.quality.perplexity import perplexity, samples_of
from river_compile.cli import shared
from river_compile.cli.bench import ALL_4BIT, CALIBRATED, EXACT, FAST, PLAIN, running
from tools import demo_models

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TASKS = ("humaneval-chat", "humaneval", "gsm", "reasoning", "perplexity")
KINDS = ("never", "exact", "4-bit", "budget", "similarity", "confidence", "calibrated")


@dataclass(frozen=True)
class Rule:
    """One row of the table.

    Attributes:
        name: of the row.
        way: of running, a row of `river bench`.
        options: of the backend.
        calibration: a file, for "calibrated".
    """

    name: str
    way: str
    options: dict[str, Any] = field(default_factory=dict)
    calibration: Path | None = None

    @property
    def leaves(self) -> bool:
        """Whether a score decides where a token leaves."""
        return self.way in (FAST, CALIBRATED) and "exit_depth" not in self.options

    @property
    def accelerated(self) -> dict[str, Any]:
        """The options of `accelerate`."""
        return self.options if self.calibration is None else {**self.options, "calibration": self.calibration}


def rules(options: argparse.Namespace, blocks: int) -> Iterator[Rule]:
    """Yield the rows that were asked for, of a model with so many blocks; those with twins once for each quantizer."""
    if "plain" in options.rules:
        yield Rule("plain", PLAIN)
    if "never" in options.rules:
        yield Rule("never", FAST, {"exit_depth": blocks})
    for quantizer in options.quantizers:
        twins = {"quantizer": quantizer}
        if "exact" in options.rules:
            yield Rule(f"exact, {quantizer}", EXACT, twins)
        if "4-bit" in options.rules:
            yield Rule(f"4-bit, {quantizer}", ALL_4BIT, twins)
        if "budget" in options.rules:
            yield Rule(f"budget, {quantizer}", FAST, {**twins, "budget": options.budget})
        leaving = [("similarity", threshold) for threshold in options.similarity] + [("confidence", None)]
        for criterion, threshold in leaving:
            if criterion in options.rules:
                given = {**twins, "criterion": criterion} | ({} if threshold is None else {"threshold": threshold})
                yield Rule(f"{criterion}{'' if threshold is None else f' {threshold:g}'}, {quantizer}", FAST, given)
    for file in options.calibration if "calibrated" in options.rules else ():
        yield Rule(f"calibrated, {file.stem}", CALIBRATED, calibration=file)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    options = _parse(arguments)
    try:
        model, tokenizer = shared.start(demo_models.resolve(options.model), options.dtype, options.threads)
        wanted = list(rules(options, model.config.get_text_config().num_hidden_layers))
        measure = _perplexities if options.task == "perplexity" else _answered
        rows = measure(model, tokenizer, wanted, options)
    except (ValueError, demo_models.ModelUnavailable) as error:
        sys.exit(f"error: {error}")
    outcome = {**common.setting("tasks", options), "task": options.task, "rows": rows}
    show(outcome)
    common.write_outcome(outcome, options.json)
    return 0


def _perplexities(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, wanted: Sequence[Rule], options: argparse.Namespace
) -> dict[str, dict]:
    samples, rows = samples_of(tokenizer, options.limit or 40, options.new_tokens), {}
    for rule in wanted:
        with running(model, rule.way, **rule.accelerated):
            rows[rule.name] = perplexity(model, samples) | ({} if rule.leaves else {"mean_depth": None})
    return rows


def _answered(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, wanted: Sequence[Rule], options: argparse.Namespace
) -> dict[str, dict]:
    file = AnswerFile(options.answers)
    problems = Problems.of(options.task, tokenizer, options.limit, options.new_tokens)
    told: dict[str, list[Answer]] = {}
    for rule in wanted:
        run = run_of(options.model, options.dtype, rule.way, rule.options, rule.calibration)
        with running(model, rule.way, **rule.accelerated):
            told[rule.name] = ask(model, problems, file, run, rule.name)
        solved = sum(answer.solved for answer in told[rule.name])
        print(f"{rule.name}: {solved} of {len(problems.prompts)} solved", file=sys.stderr, flush=True)
    rows = {rule.name: summary(told[rule.name], told.get("never")) for rule in wanted}
    return {rule.name: rows[rule.name] | ({} if rule.leaves else {"mean_depth": None}) for rule in wanted}


def show(outcome: dict) -> None:
    """Print the table."""
    common.print_setting(outcome)
    print(outcome["task"])
    rows = outcome["rows"]
    if outcome["task"] == "perplexity":
        names = ("perplexity", "nats_per_token", "tokens", "mean_depth")
        common.print_table(["", *names], [[name, *map(row.get, names)] for name, row in rows.items()])
        return
    never = rows.get("never", {}).get("tokens_per_s")
    cells = [
        [
            name,
            f"{row['solved']} of {row['problems']}",
            "{:.1%} to {:.1%}".format(*row["interval"]),
            row["same_texts"],
            row["mean_depth"],
            row["tokens_per_s"],
            row["tokens_per_s"] / never if never and row["tokens_per_s"] else None,
        ]
        for name, row in rows.items()
    ]
    common.print_table(["", "solved", "95 %", "never's texts", "depth", "tokens/s", "of never"], cells)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = common.command_line(__doc__, "model", "dtype", "threads", "json", model="qwen-coder-1.5b")
    parser.add_argument("--task", choices=TASKS, default=TASKS[0], help="%(choices)s (default: %(default)s)")
    parser.add_argument("--limit", type=common.number(0), default=0, help="problems or texts; 0: all of humaneval, 40")
    parser.add_argument("--new-tokens", type=common.number(2), default=200, help="of an answer or text (%(default)s)")
    parser.add_argument("--quantizers", nargs="*", default=["gptq"], help="of the twins (gptq)")
    parser.add_argument("--rules", nargs="+", choices=("plain", *KINDS), default=KINDS, help="rows (all but plain)")
    parser.add_argument("--similarity", nargs="*", type=float, default=[0.5, 0.7, 0.9], help="thresholds (0.5 0.7 0.9)")
    parser.add_argument("--budget", type=float, default=0.05, help="KL of the row `budget` (%(default)s)")
    parser.add_argument("--calibration", nargs="*", type=Path, default=[], metavar="FILE", help="of `river tune`")
    parser.add_argument("--answers", type=Path, metavar="FILE", help="where answers are kept, and looked for")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
