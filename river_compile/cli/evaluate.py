"""``river eval MODEL --task ...``: what each way of running a model does to its answers."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from river_compile.cli.output import AsJson, Dtype, Model, Threads, show, table, use_threads
from river_compile.cli.ways import CALIBRATED, EXACT, FAST, PLAIN, RIVER, Rows, chosen

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROWS = {
    "humaneval": (PLAIN, EXACT, FAST, CALIBRATED),
    "reasoning": (PLAIN, EXACT, FAST, CALIBRATED),
    "perplexity": (PLAIN, FAST, RIVER, CALIBRATED),  # (exact keeps the plain model's)
}
_SURE = 1.96  # standard errors on each side of a 95 % interval


def evaluate(
    model: Model,
    task: Annotated[str, typer.Option(help=f"{', '.join(ROWS)}.")] = "perplexity",
    rows: Rows = None,
    limit: Annotated[int, typer.Option(help="Problems or texts; 0: all there are (humaneval 164, others 40).")] = 0,
    new_tokens: Annotated[int, typer.Option(help="Of an answer, or measured in each text.")] = 128,
    texts: Annotated[Path | None, typer.Option(help="For perplexity: texts, separated by empty lines.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="A file of `river calibrate`, for its row.")] = None,
    criterion: Annotated[str, typer.Option(help="Of the row fast; empty: the backend's.")] = "",
    threshold: Annotated[float | None, typer.Option(help="Of the row fast; without: the criterion's.")] = None,
    quantizer: Annotated[str, typer.Option(help="Of the row fast; empty: the backend's.")] = "",
    dtype: Dtype = "bfloat16",
    threads: Threads = 0,
    as_json: AsJson = False,
) -> None:
    """Compares the plain model with exact mode and with tokens that leave early.

    `humaneval` runs programs that the model wrote: with limits, in a process of their own, but in no sandbox.
    """
    from river_compile.cli.models import load, quiet

    if task not in ROWS:
        raise ValueError(f"--task {task} is not known; use one of {', '.join(ROWS)}")
    ways = chosen(rows, ROWS[task], calibration)
    if limit < 0 or new_tokens < 2:
        raise ValueError(f"--limit {limit} --new-tokens {new_tokens} is not allowed; give 0 or more, and 2 or more")
    use_threads(threads)
    quiet()
    network, tokenizer = load(model, dtype)
    given = {"criterion": criterion or None, "threshold": threshold, "quantizer": quantizer or None}
    rule = {name: value for name, value in given.items() if value is not None}
    if task == "perplexity":
        from river_compile.cli.perplexity import measure
        from river_compile.cli.texts import passages

        results = measure(network, tokenizer, passages(texts)[: limit or 40], ways, new_tokens, calibration, rule)
    else:
        results = _answered(network, tokenizer, _asked(task, limit, tokenizer), ways, new_tokens, calibration, rule)
    result = {"model": model, "task": task, "rows": results}
    show("eval", result, as_json, lambda console: console.print(_table(task, results)))


@dataclass(frozen=True)
class Asked:
    """The prompts of a task ``[1, S]``, what judges the answer to one of them, and further arguments of `generate`."""

    prompts: list[Tensor]
    judge: Callable[[int, str], bool]
    options: dict[str, Any] = field(default_factory=dict)


def _asked(task: str, limit: int, tokenizer: PreTrainedTokenizerBase) -> Asked:
    from river_compile.cli.models import encode

    if task == "humaneval":  # a completion of the problem's own text
        from river_compile.cli import humaneval

        problems = humaneval.problems()[: limit or None]
        prompts = [tokenizer(p["prompt"].rstrip("\n"), return_tensors="pt")["input_ids"] for p in problems]
        stops = {"stop_strings": list(humaneval.STOPS), "tokenizer": tokenizer}
        return Asked(prompts, lambda i, text: humaneval.passes(problems[i], text), stops)
    from river_compile.cli import reasoning

    made = reasoning.problems(limit or 40)
    prompts = [encode(tokenizer, problem.question) for problem in made]
    return Asked(prompts, lambda i, text: reasoning.solved(made[i], text))


def _answered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Asked,
    ways: Sequence[str],
    new_tokens: int,
    calibration: Path | None,
    rule: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    from river_compile.cli.ways import running
    from river_compile.reporting.trace import trace

    rows: dict[str, dict[str, Any]] = {}
    texts: dict[str, list[str]] = {}
    for way in ways:
        with running(model, way, calibration, **(rule if way == FAST else {})), trace() as steps:
            runs = list(_generations(model, asked, new_tokens, way))
        texts[way] = [tokenizer.decode(run.tokens, skip_special_tokens=True) for run in runs]
        right = sum(asked.judge(i, text) for i, text in enumerate(texts[way]))
        seconds = sum(run.times[-1] - run.times[0] for run in runs[1:] or runs)
        tokens = sum(len(run.tokens) - 1 for run in runs[1:] or runs)  # (the first one compiles)
        same = sum(a == b for a, b in zip(texts[way], texts[PLAIN], strict=True)) if PLAIN in texts else None
        rows[way] = {
            "score": right / len(asked.prompts),
            "interval": wilson(right, len(asked.prompts)),
            "solved": right,
            "problems": len(asked.prompts),
            "same_texts": same,
            "mean_depth": steps.mean_depth if way in (FAST, CALIBRATED) and steps.tokens else None,
            "tokens_per_s": tokens / seconds if seconds else None,
        }
        # (Rows take long: one that is done is told, whatever becomes of the others.)
        print(f"{way}: {right} of {len(asked.prompts)} solved", file=sys.stderr)
    return rows


def wilson(right: int, asked: int) -> tuple[float, float]:
    """Returns Wilson's 95 % interval of a share, which holds for few problems and for shares near 0 and 1."""
    share, spread = right / asked, _SURE**2 / asked
    middle = (share + spread / 2) / (1 + spread)
    half = _SURE * math.sqrt(share * (1 - share) / asked + spread / asked / 4) / (1 + spread)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def _generations(model: PreTrainedModel, asked: Asked, new_tokens: int, way: str) -> Iterator[Any]:
    """Generates an answer to each question, in caches of one size."""
    from tqdm import tqdm

    from river_compile.cli.timing import generate

    room = max(ids.shape[1] for ids in asked.prompts) + new_tokens
    for ids in tqdm(asked.prompts, desc=way, unit="problem", leave=False, delay=1):
        yield generate(model, ids, room - ids.shape[1], stop_after=new_tokens, end_early=True, **asked.options)


def _table(task: str, rows: dict[str, dict[str, Any]]) -> Any:
    if task == "perplexity":
        return table(["", "perplexity", "tokens"], [[way, row["score"], row["tokens"]] for way, row in rows.items()])
    return table(
        ["", "score", "95 %", "solved", "same texts", "mean depth", "tokens/s"],
        [
            [
                way,
                f"{row['score']:.1%}",
                "{:.1%} to {:.1%}".format(*row["interval"]),
                f"{row['solved']} of {row['problems']}",
                row["same_texts"],
                row["mean_depth"],
                row["tokens_per_s"],
            ]
            for way, row in rows.items()
        ],
    )
