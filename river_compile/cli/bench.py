"""``river bench``: prompt and decode speed of each way of running a model, with llama-bench's flags and columns."""

from __future__ import annotations

import contextlib
import csv
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from river_compile.cli.shared import Dtype, Threads, context_of, show
from river_compile.version import __version__

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

PLAIN, INDUCTOR, ALL_4BIT, FAST, CALIBRATED, EXACT, STRICT = ROWS = (
    "eager",  # transformers, uncompiled
    "inductor",  # torch.compile with Inductor
    "all-4bit",  # every token through all twins (depth 0): the fastest; other output
    "fast",  # tokens exit by the default rule: other output
    "calibrated",  # tokens exit by a tuned rule
    "exact",  # the twins draft, the model verifies: the same output
    "strict",  # exact, or an error if it may not be bit-identical
)
FORMATS = ("md", "json", "jsonl", "csv")
COLUMNS = ("model", "size", "params", "backend", "threads", "test", "t/s")


def bench(
    model: Annotated[str, typer.Option("--model", "-m", help="A model folder, or a name on the hub.")],
    n_prompt: Annotated[int, typer.Option("--n-prompt", "-p", help="Prompt tokens (0: skip).")] = 512,
    n_gen: Annotated[int, typer.Option("--n-gen", "-n", help="Tokens to generate (0: skip).")] = 128,
    repetitions: Annotated[int, typer.Option("--repetitions", "-r", help="Repetitions of each test.")] = 5,
    output: Annotated[str, typer.Option("--output", "-o", help="Format: md, json, jsonl or csv.")] = "md",
    rows: Annotated[list[str] | None, typer.Option("--row", help="Measure only this row; may be repeated.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Exit rule written by `river tune`, for the row `calibrated`.")
    ] = None,
    dtype: Dtype = "bfloat16",
    threads: Threads = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Same as `-o json`.")] = False,
) -> None:
    """Measure tokens per second: `pp512` processes a prompt of 512 tokens, `tg128` generates 128 tokens.

    Rows run one after another in one process. Twins are quantized once, into a temporary folder (`TMPDIR`). The row
    `calibrated` takes the options of its twins from its exit rule. Decode speed excludes the first token. The speed of
    exact and strict depends on the text, which is prose and code from the package.
    """
    import torch

    from river_compile.cli.shared import start

    output = "json" if as_json else output
    if output not in FORMATS:
        raise ValueError(f"-o {output} is not known; use one of {', '.join(FORMATS)}")
    if min(n_prompt, n_gen) < 0 or n_gen == 1 or repetitions < 1 or not n_prompt + n_gen:
        raise ValueError(f"-p {n_prompt} -n {n_gen} -r {repetitions} measures nothing; give -n 2 or more, -r 1 or more")
    wanted = chosen(rows, calibration)
    network, tokenizer = start(model, dtype, threads)
    context, longest = context_of(network), max(n_prompt, 64 + n_gen if n_gen else 0)
    if context is not None and longest > context:
        raise ValueError(
            f"-p {n_prompt} -n {n_gen} takes {longest} tokens (-n continues 64), and {model} has {context} positions"
        )
    ids = beginning(tokenizer, max(n_prompt, 64))
    shared = {
        "build": __version__,
        "model": model,
        "size": sum(p.numel() * p.element_size() for p in network.parameters()),
        "params": network.num_parameters(),
        "dtype": dtype,
        "threads": torch.get_num_threads(),
    }
    tests = [("pp", n_prompt)] * bool(n_prompt) + [("tg", n_gen)] * bool(n_gen)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        packed_once: dict[str, Any] = {"twins": f"{folder}/twins", "on_missing_twins": "save"}
        for row in wanted:
            options = {} if row == CALIBRATED else packed_once.copy()  # (a calibration says what its twins are)
            if row in (EXACT, STRICT):
                options["num_assistant_tokens_schedule"] = "constant"  # the same work in every run
            with running(network, row, calibration, **options):
                for test, count in tests:
                    speed = _measured(network, ids, test, count, repetitions)
                    results.append({**shared, "backend": row, "test": f"{test}{count}", **speed})
                    _print_last(results, output)
    if output == "json":
        show("bench", {"results": results}, True, print)


def chosen(rows: Sequence[str] | None, calibration: Path | None) -> list[str]:
    """Return the rows that `--row` asked for, in the order of `ROWS`; without it all, calibrated if it has a file.

    Raises:
        ValueError: a row that is none of them, or "calibrated" without a calibration.
    """
    for row in rows or ():
        if row not in ROWS:
            raise ValueError(f"--row {row} is not known here; use one of {', '.join(ROWS)}")
    if CALIBRATED in (rows or ()) and calibration is None:
        raise ValueError("--row calibrated needs --calibration FILE, which `river tune` writes")
    return [row for row in ROWS if (row in rows if rows else row != CALIBRATED or calibration)]


@contextlib.contextmanager
def running(model: PreTrainedModel, row: str, calibration: Path | None, **options: Any) -> Iterator[None]:
    """Inside, a plain model runs as one of `ROWS`, with options of the backend; afterwards it is plain again."""
    from river_compile.api.accelerate import accelerate, restore
    from river_compile.exits import forced_depth

    if row == INDUCTOR:
        model.compile()
    elif row != PLAIN:
        if row == CALIBRATED:
            options["calibration"] = calibration
        elif row == STRICT:
            options["strict"] = True
        accelerate(model, EXACT if row in (EXACT, STRICT) else FAST, background_packing=False, **options)
    try:
        with forced_depth(0) if row == ALL_4BIT else contextlib.nullcontext():
            yield
    finally:
        restore(model)
        model._compiled_call_impl = None


def beginning(tokenizer: Any, length: int) -> Tensor:
    """Return the first ids ``[1, length]`` of the package's texts, repeated if they are too short."""
    import torch

    text = (Path(__file__).parents[1] / "twins" / "default_texts.txt").read_text(encoding="utf-8")
    ids: list[int] = tokenizer(text.replace("%%", ""))["input_ids"]
    if not ids:
        raise ValueError("this model's tokenizer gives no token for English text")
    return torch.tensor([(ids * (length // len(ids) + 1))[:length]])


def _measured(model: PreTrainedModel, ids: Tensor, test: str, count: int, repetitions: int) -> dict[str, Any]:
    """Return the speeds of a test, which warms up first."""
    seconds = [_seconds(model, ids, test, count) for _ in range(repetitions + 1)][1:]
    speeds = [(count if test == "pp" else count - 1) / s for s in seconds]
    deviation = statistics.stdev(speeds) if len(speeds) > 1 else 0.0
    return {"avg_ts": statistics.fmean(speeds), "stddev_ts": deviation, "samples_ts": speeds}


def _seconds(model: PreTrainedModel, ids: Tensor, test: str, count: int) -> float:
    """Return the seconds that a prompt takes, or that generation takes after its first token."""
    from river_compile.reporting.timing import generate

    if test == "pp":
        return generate(model, ids[:, :count], 2, stop_after=1).first_token_s
    times = generate(model, ids[:, :64], count).times
    return times[-1] - times[0]


def _print_last(results: list[dict[str, Any]], output: str) -> None:
    """Print the last result as soon as it is there, but in one document of JSON, and the head before the first."""
    result, is_first = results[-1], len(results) == 1
    if output == "md":
        if is_first:
            print(f"| {' | '.join(COLUMNS)} |\n| --- | ---: | ---: | --- | ---: | ---: | ---: |")
        print(markdown(result), flush=True)
    elif output == "jsonl":
        print(json.dumps(result), flush=True)
    elif output == "csv":
        columns = [name for name in result if name != "samples_ts"]
        writer = csv.DictWriter(sys.stdout, columns, extrasaction="ignore")
        if is_first:
            writer.writeheader()
        writer.writerow(result)
        sys.stdout.flush()


def markdown(result: dict[str, Any]) -> str:
    """Return a row as llama-bench prints it."""
    speed = f"{result['avg_ts']:.2f} ± {result['stddev_ts']:.2f}"
    size, params = f"{result['size'] / 2**20:.2f} MiB", f"{result['params'] / 1e6:.2f} M"
    name = f"{Path(result['model']).name} {result['dtype']}"
    return f"| {name} | {size} | {params} | {result['backend']} | {result['threads']} | {result['test']} | {speed} |"
