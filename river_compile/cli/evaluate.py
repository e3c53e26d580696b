"""``river eval MODEL --task ...``: answers of each way of running a model.

A task is a function that measures a model that runs in one of the ways; all tasks go through one loop. Those of lm-eval
are scored through the exits, as the model `river` scores them (evaluation/harness.py).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from river_compile.cli.answers import AnswerFile, Problems, ask, run_of, summary
from river_compile.cli.output import AsJson, Dtype, Model, Texts, Threads, needs, show, table
from river_compile.cli.ways import CALIBRATED, EXACT, FAST, NEVER, PLAIN, RIVER, Calibrated, Rows, chosen, running

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ANSWERS = (PLAIN, NEVER, EXACT, FAST, RIVER, CALIBRATED)
SCORES = (PLAIN, FAST, RIVER, CALIBRATED)  # (exact keeps the plain model's)
ROWS = {"humaneval": ANSWERS, "humaneval-chat": ANSWERS, "reasoning": ANSWERS, "gsm": ANSWERS, "perplexity": SCORES}
_CONTEXT = 16  # tokens of a text that run as its prompt

Measure = Callable[[Any, str], dict[str, Any]]  # (model, way) -> a row


def evaluate(
    model: Model,
    task: Annotated[
        str, typer.Option(help=f"{', '.join(ROWS)}, or a task of lm-eval (a name or a YAML file).")
    ] = "perplexity",
    rows: Rows = None,
    limit: Annotated[int, typer.Option(help="Problems or texts; 0: all (humaneval 164, lm-eval's), or 40.")] = 0,
    new_tokens: Annotated[int, typer.Option(help="Of an answer, or measured in each text.")] = 128,
    texts: Texts = None,
    calibration: Calibrated = None,
    criterion: Annotated[str, typer.Option(help="Of the row fast; empty: the backend's.")] = "",
    threshold: Annotated[float | None, typer.Option(help="Of the row fast; without: the criterion's.")] = None,
    quantizer: Annotated[str, typer.Option(help="Of the row fast; empty: the backend's.")] = "",
    batch: Annotated[int, typer.Option(help="Problems that are answered at once; of the row plain one.")] = 1,
    answers: Annotated[Path | None, typer.Option(help="A file of answers: a run that was stopped goes on.")] = None,
    dtype: Dtype = "bfloat16",
    threads: Threads = 0,
    as_json: AsJson = False,
) -> None:
    """Compares the plain model with exact mode and with tokens that leave early.

    `humaneval` runs programs that the model wrote: with limits, in a process of their own, but in no sandbox.
    """
    from river_compile.cli.models import start

    if task not in ROWS:
        _check_task(task)
    answering = ROWS.get(task) == ANSWERS
    for name, given, why in (("--batch", batch != 1, "one text after another"), ("--answers", answers, "no answers")):
        if given and not answering:
            raise ValueError(f"{name} does not go with --task {task}, which has {why}; leave it out")
    ways = chosen(rows, ROWS.get(task, SCORES), calibration, (NEVER, RIVER) if answering else ())
    if limit < 0 or new_tokens < 2 or batch < 1:
        raise ValueError(
            f"--limit {limit} --new-tokens {new_tokens} --batch {batch} is not allowed; give 0 or more, 2 or more, and "
            "1 or more"
        )
    file = AnswerFile(answers)
    network, tokenizer = start(model, dtype, threads)
    options = {"criterion": criterion or None, "threshold": threshold, "quantizer": quantizer or None}
    rule = {name: value for name, value in options.items() if value is not None}
    settings = {way: rule if way in (FAST, RIVER) else {} for way in ways}
    if answering:
        runs = {
            way: run_of(model, dtype, way, settings[way], calibration if way == CALIBRATED else None) for way in ways
        }
        measure = _answering(Problems.of(task, tokenizer, limit, new_tokens), file, batch, runs)
    elif task == "perplexity":
        from river_compile.cli.texts import passages

        ids = [tokenizer(text)["input_ids"] for text in passages(texts)[: limit or 40]]
        measure = _traced(_perplexity(ids, new_tokens))
    else:
        measure = _traced(_of_lm_eval(task, tokenizer, limit))
    results: dict[str, dict[str, Any]] = {}
    for way in ways:
        with running(network, way, calibration, **settings[way]):
            row = measure(network, way)
        results[way] = row if way in (FAST, RIVER, CALIBRATED) else {**row, "mean_depth": None}
        # (Rows take long: one that is done is told, whatever becomes of the others.)
        print(f"{way}: {_said(results[way])}", file=sys.stderr)
    show("eval", {"model": model, "task": task, "rows": results}, as_json, lambda c: c.print(_table(task, results)))


def _check_task(task: str) -> None:
    from river_compile.cli.models import loading

    with needs("eval"):
        import yaml
        from lm_eval.tasks import TaskManager
    if Path(task).is_file():
        with loading(task):
            yaml.compose(Path(task).read_text(encoding="utf-8"))  # (lm-eval would say so after the model is loaded)
    elif task not in TaskManager().all_tasks:
        raise ValueError(f"--task {task} is not known; use one of {', '.join(ROWS)}, or a task of lm-eval")


def _answering(problems: Problems, file: AnswerFile, batch: int, runs: Mapping[str, str]) -> Measure:
    """Returns a task of answers, which are judged and compared with the plain model's.

    Args:
        problems: to solve.
        file: of answers.
        batch: answers at once.
        runs: what each way's answers depend on.
    """
    told = {}

    def measure(model: PreTrainedModel, way: str) -> dict[str, Any]:
        at_once = 1 if way == PLAIN else batch
        told[way] = ask(model, problems, file, runs[way], at_once, way)
        return summary(told[way], told.get(PLAIN, told.get(NEVER)))

    return measure


def _traced(measure: Measure) -> Measure:
    """Returns a measure whose rows tell the mean depth of all steps."""
    from river_compile.reporting.trace import trace

    def traced(model: PreTrainedModel, way: str) -> dict[str, Any]:
        with trace() as steps:
            row = measure(model, way)
        return {**row, "mean_depth": steps.mean_depth if steps.tokens else None}

    return traced


def _perplexity(texts: list[list[int]], tokens: int) -> Measure:
    """Returns the perplexity task: texts are decoded one token at a time, as generation runs them.

    Raises:
        ValueError: no text is long enough.
    """
    import torch
    from torch.nn.functional import cross_entropy

    from river_compile.decoding.given_text import TextDecoder

    length = _CONTEXT + tokens
    samples = [torch.tensor([ids[:length]]) for ids in texts if len(ids) >= length]
    if not samples:
        raise ValueError(f"no text has {length} tokens; give longer ones, or a smaller --new-tokens")

    def measure(model: PreTrainedModel, way: str) -> dict[str, Any]:
        decoder = TextDecoder(model, length)
        losses: list[float] = []
        for ids in samples:
            logits = decoder.logits(ids[:, :-1], _CONTEXT).float()
            losses += cross_entropy(logits, ids[0, _CONTEXT + 1 :], reduction="none").tolist()
        mean = sum(losses) / len(losses)
        return {"score": math.exp(mean), "tokens": len(losses), "nats_per_token": mean, "scoring": "decode"}

    return measure


def _of_lm_eval(task: str, tokenizer: PreTrainedTokenizerBase, limit: int) -> Measure:
    """Returns a task of lm-eval, scored by the first of its metrics."""
    from lm_eval import simple_evaluate

    from river_compile.evaluation.harness import RiverLM

    def measure(model: PreTrainedModel, way: str) -> dict[str, Any]:
        lm = RiverLM(model, quality="plain", tokenizer=tokenizer)  # (as it runs now)
        name = str(Path(task).absolute()) if Path(task).is_file() else task
        (found,) = simple_evaluate(lm, tasks=[name], limit=limit or None, bootstrap_iters=0)["results"].values()
        numbers = {name: value for name, value in found.items() if isinstance(value, float)}
        metric = next(name for name in numbers if "," in name and "_stderr" not in name)  # such as "acc,none"
        return {"score": numbers[metric], "metric": metric.partition(",")[0], "scoring": lm.scoring}

    return measure


def _said(row: Mapping[str, Any]) -> str:
    return f"{row['solved']} of {row['problems']} solved" if "solved" in row else f"{row['score']:.4g}"


def _table(task: str, rows: Mapping[str, Mapping[str, Any]]) -> Any:
    if ROWS.get(task) != ANSWERS:
        score = next(iter(rows.values())).get("metric", "perplexity")
        names = (score, "tokens", "mean depth")
        return table(
            ["", *names], [[way, *map(row.get, ("score", "tokens", "mean_depth"))] for way, row in rows.items()]
        )
    cells = [
        [
            way,
            f"{row['score']:.1%}",
            "{:.1%} to {:.1%}".format(*row["interval"]),
            _said(row).removesuffix(" solved"),
            *map(row.get, ("same_texts", "mean_depth", "tokens_per_s")),
        ]
        for way, row in rows.items()
    ]
    return table(["", "score", "95 %", "solved", "same texts", "mean depth", "tokens/s"], cells)
