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

from river_compile.cli.output import AsJson, Dtype, Model, Texts, Threads, needs, show, table
from river_compile.cli.ways import CALIBRATED, EXACT, FAST, PLAIN, RIVER, Calibrated, Rows, chosen, running

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ANSWERS = (PLAIN, EXACT, FAST, CALIBRATED)
SCORES = (PLAIN, FAST, RIVER, CALIBRATED)  # (exact keeps the plain model's)
ROWS = {"humaneval": ANSWERS, "reasoning": ANSWERS, "perplexity": SCORES}
_CONTEXT = 16  # tokens of a text that run as its prompt
_SURE = 1.96  # standard errors on each side of a 95 % interval

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
    dtype: Dtype = "bfloat16",
    threads: Threads = 0,
    as_json: AsJson = False,
) -> None:
    """Compares the plain model with exact mode and with tokens that leave early.

    `humaneval` runs programs that the model wrote: with limits, in a process of their own, but in no sandbox.
    """
    from river_compile.cli.models import start
    from river_compile.reporting.trace import trace

    if task not in ROWS:
        _check_task(task)
    ways = chosen(rows, ROWS.get(task, SCORES), calibration)
    if limit < 0 or new_tokens < 2:
        raise ValueError(f"--limit {limit} --new-tokens {new_tokens} is not allowed; give 0 or more, and 2 or more")
    network, tokenizer = start(model, dtype, threads)
    given = {"criterion": criterion or None, "threshold": threshold, "quantizer": quantizer or None}
    rule = {name: value for name, value in given.items() if value is not None}
    measure = _measure(task, tokenizer, limit, new_tokens, texts)
    results: dict[str, dict[str, Any]] = {}
    for way in ways:
        with running(network, way, calibration, **(rule if way in (FAST, RIVER) else {})), trace() as steps:
            row = measure(network, way)
        depth = steps.mean_depth if way in (FAST, CALIBRATED) and steps.tokens else None
        results[way] = {**row, "mean_depth": depth}
        # (Rows take long: one that is done is told, whatever becomes of the others.)
        print(f"{way}: {_said(row)}", file=sys.stderr)
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


def _measure(task: str, tokenizer: PreTrainedTokenizerBase, limit: int, new_tokens: int, texts: Path | None) -> Measure:
    from river_compile.cli.models import encode

    if task == "perplexity":
        from river_compile.cli.texts import passages

        return _perplexity([tokenizer(text)["input_ids"] for text in passages(texts)[: limit or 40]], new_tokens)
    if task == "humaneval":  # a completion of the problem's own text
        from river_compile.cli import humaneval

        problems = humaneval.problems()[: limit or None]
        prompts = [tokenizer(p["prompt"].rstrip("\n"), return_tensors="pt")["input_ids"] for p in problems]
        stops = {"stop_strings": list(humaneval.STOPS), "tokenizer": tokenizer}
        return _answers(tokenizer, prompts, lambda i, text: humaneval.passes(problems[i], text), new_tokens, **stops)
    if task == "reasoning":
        from river_compile.cli import reasoning

        made = reasoning.problems(limit or 40)
        prompts = [encode(tokenizer, problem.question) for problem in made]
        return _answers(tokenizer, prompts, lambda i, text: reasoning.solved(made[i], text), new_tokens)
    return _of_lm_eval(task, tokenizer, limit)


def _answers(
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Tensor],
    judge: Callable[[int, str], bool],
    new_tokens: int,
    **options: Any,
) -> Measure:
    """Returns a task of answers: generated in caches of one size, judged, and compared with the plain model's."""
    from tqdm import tqdm

    from river_compile.cli.timing import generate

    length = max(ids.shape[1] for ids in prompts) + new_tokens
    told: dict[str, list[str]] = {}

    def measure(model: PreTrainedModel, way: str) -> dict[str, Any]:
        runs = [
            generate(model, ids, length - ids.shape[1], stop_after=new_tokens, end_early=True, **options)
            for ids in tqdm(prompts, desc=way, unit="problem", leave=False, delay=1)
        ]
        told[way] = [tokenizer.decode(run.tokens, skip_special_tokens=True) for run in runs]
        right = sum(judge(i, text) for i, text in enumerate(told[way]))
        seconds = sum(run.times[-1] - run.times[0] for run in runs[1:] or runs)
        tokens = sum(len(run.tokens) - 1 for run in runs[1:] or runs)  # (the first one compiles)
        return {
            "score": right / len(prompts),
            "interval": wilson(right, len(prompts)),
            "solved": right,
            "problems": len(prompts),
            "same_texts": sum(map(str.__eq__, told[way], told[PLAIN])) if PLAIN in told else None,
            "tokens_per_s": tokens / seconds if seconds else None,
        }

    return measure


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


def wilson(right: int, asked: int) -> tuple[float, float]:
    """Returns Wilson's 95 % interval of a share, which holds for few problems and for shares near 0 and 1."""
    share, spread = right / asked, _SURE**2 / asked
    middle = (share + spread / 2) / (1 + spread)
    half = _SURE * math.sqrt(share * (1 - share) / asked + spread / asked / 4) / (1 + spread)
    return max(middle - half, 0.0), min(middle + half, 1.0)


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
