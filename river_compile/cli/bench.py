"""``river bench``: prompt and decode speed of each way of running a model, with llama-bench's flags and columns."""

from __future__ import annotations

import contextlib
import csv
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from river_compile.cli.shared import Assistant, Dtype, Threads, context_of, show
from river_compile.version import __version__

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

PLAIN, INDUCTOR, NO_DRAFT, EXACT, ASSISTED, STRICT, FAST, CALIBRATED, ALL_4BIT = ROWS = (
    "eager",  # transformers, uncompiled
    "inductor",  # torch.compile with Inductor
    "no-draft",  # River's kernels, without drafts
    "exact",  # `accelerate(model)`: the twins draft, the model verifies
    "assistant",  # exact with `assistant_model=`, which drafts in place of the twins
    "strict",  # exact, or an error if it may not be bit-identical
    "fast",  # tokens exit by the default rule: other output
    "calibrated",  # tokens exit by a tuned rule
    "all-4bit",  # every token through all twins (depth 0): the fastest; other output
)
_DEFAULT = (PLAIN, NO_DRAFT, EXACT, FAST, ALL_4BIT)
# One text of each kind that drafts depend on; none of them calibrates twins.
PROMPTS = {
    "chat": "What should I think about before I adopt a dog?",
    "code": "Write a Python function that checks a date such as 2024-02-30 and says what is wrong with it.",
    "story": "Write the beginning of a story about a clockmaker who finds a small door behind her workbench.",
    "edit": (
        "Rewrite this text in the past tense: The ferry leaves the harbor at seven and crosses the bay in an hour. "
        "Most passengers stay on deck, where they drink coffee and watch the gulls. The captain knows every sandbank "
        "and never looks at his map. When fog comes in, he slows down, rings the bell and listens for an answer."
    ),
}
FORMATS = ("md", "json", "jsonl", "csv")
COLUMNS = ("model", "size", "params", "backend", "threads", "test", "t/s")


def bench(
    model: Annotated[str, typer.Option("--model", "-m", help="A model folder, or a name on the hub.")],
    n_prompt: Annotated[int, typer.Option("--n-prompt", "-p", help="Prompt tokens (0: skip).")] = 512,
    n_gen: Annotated[int, typer.Option("--n-gen", "-n", help="Tokens to generate (0: skip).")] = 128,
    repetitions: Annotated[int, typer.Option("--repetitions", "-r", help="Repetitions of each test.")] = 3,
    output: Annotated[str, typer.Option("--output", "-o", help="Format: md, json, jsonl or csv.")] = "md",
    rows: Annotated[list[str] | None, typer.Option("--row", help="Measure only this row; may be repeated.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Exit rule written by `river tune`, for the row `calibrated`.")
    ] = None,
    assistant: Assistant = None,
    dtype: Dtype = "bfloat16",
    threads: Threads = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Same as `-o json`.")] = False,
) -> None:
    """Measure tokens per second: `pp512` processes a prompt of 512 tokens, `tg128` generates 128 tokens.

    `tg` is the mean over four prompts (chat, code, a story, an edit), because the speed of drafts depends on the text.
    `±` is the standard deviation over all samples. JSON has each prompt's mean. Decode speed excludes the first
    token. Rows run one after another in one process, warmed up, with the defaults of `accelerate`. Without `--row` they
    are eager, no-draft, exact, fast and all-4bit, and those of `--assistant` and `--calibration` (whose exit rule names
    its twins); others are inductor and strict. Twins are quantized once, into a temporary folder (`TMPDIR`).
    """
    import torch

    from river_compile.cli.shared import load_assistant, start

    output = "json" if as_json else output
    if output not in FORMATS:
        raise ValueError(f"-o {output} is not known; use one of {', '.join(FORMATS)}")
    if min(n_prompt, n_gen) < 0 or n_gen == 1 or repetitions < 1 or not n_prompt + n_gen:
        raise ValueError(f"-p {n_prompt} -n {n_gen} -r {repetitions} measures nothing; give -n 2 or more, -r 1 or more")
    wanted = chosen(rows, calibration, assistant)
    network, tokenizer = start(model, dtype, threads)
    given = {CALIBRATED: {"calibration": calibration}, ASSISTED: load_assistant(assistant, dtype)}
    prompts = {"pp": {"": beginning(tokenizer, max(n_prompt, 1))}, "tg": encoded(tokenizer)}
    context, longest = context_of(network), max(ids.shape[1] for ids in prompts["tg"].values())
    takes = max(n_prompt, longest + n_gen if n_gen else 0)
    if context is not None and takes > context:
        raise ValueError(
            f"-p {n_prompt} -n {n_gen} takes {takes} tokens (-n continues {longest}), and {model} has {context} "
            "positions"
        )
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
            # A calibration says what its twins are, and with an assistant none are made.
            with running(network, row, **given.get(row, packed_once)):
                for test, count in tests:
                    speed = _measured(network, prompts[test], test, count, repetitions)
                    results.append({**shared, "backend": row, "test": f"{test}{count}", **speed})
                    _print_last(results, output)
    if output == "json":
        show("bench", {"results": results}, True, print)


def chosen(rows: Sequence[str] | None, calibration: Path | None, assistant: str | None = None) -> list[str]:
    """Return the rows that `--row` asked for, in the order of `ROWS`; without it what users run, or have a file for.

    Raises:
        ValueError: a row that is none of them, or one whose file or assistant is missing.
    """
    for row in rows or ():
        if row not in ROWS:
            raise ValueError(f"--row {row} is not known here; use one of {', '.join(ROWS)}")
    if CALIBRATED in (rows or ()) and calibration is None:
        raise ValueError("--row calibrated needs --calibration FILE, which `river tune` writes")
    if ASSISTED in (rows or ()) and assistant is None:
        raise ValueError("--row assistant needs --assistant MODEL, a smaller model with the same tokens")
    usual = {*_DEFAULT, *([CALIBRATED] if calibration else []), *([ASSISTED] if assistant else [])}
    return [row for row in ROWS if row in (rows or usual)]


@contextlib.contextmanager
def running(model: PreTrainedModel, row: str, **options: Any) -> Iterator[None]:
    """Inside, a plain model runs as one of `ROWS`, with options of `accelerate`; afterwards it is plain again."""
    from river_compile.api.accelerate import accelerate, restore

    if row == INDUCTOR:
        model.compile()
    elif row != PLAIN:
        if row == STRICT:
            options["strict"] = True
        elif row == NO_DRAFT:
            options["exit_depth"] = model.config.get_text_config(decoder=True).num_hidden_layers
        elif row == ALL_4BIT:
            options["exit_depth"] = 0
        quality = EXACT if row in (EXACT, ASSISTED, STRICT) else FAST
        accelerate(model, quality, background_packing=False, **options)
    try:
        yield
    finally:
        restore(model)
        model._compiled_call_impl = None


def encoded(tokenizer: Any) -> dict[str, Tensor]:
    """Return the ids ``[1, length]`` of each of `PROMPTS`."""
    from river_compile.cli.shared import encode

    return {kind: encode(tokenizer, prompt) for kind, prompt in PROMPTS.items()}


def beginning(tokenizer: Any, length: int) -> Tensor:
    """Return the first ids ``[1, length]`` of `PROMPTS`, repeated if they are too short."""
    import torch

    ids: list[int] = tokenizer("\n\n".join(PROMPTS.values()))["input_ids"]
    if not ids:
        raise ValueError("this model's tokenizer gives no token for English text")
    return torch.tensor([(ids * (length // len(ids) + 1))[:length]])


def _measured(
    model: PreTrainedModel, prompts: Mapping[str, Tensor], test: str, count: int, repetitions: int
) -> dict[str, Any]:
    """Return the speeds of a test, which warms up first: of each sample, of each prompt, and over all."""
    tokens = count if test == "pp" else count - 1
    samples: dict[str, list[float]] = {kind: [] for kind in prompts}
    for repetition in range(repetitions + 1):
        for kind, ids in prompts.items():
            seconds = _seconds(model, ids, test, count)
            if repetition:
                samples[kind].append(tokens / seconds)
    speeds = [speed for of_prompt in samples.values() for speed in of_prompt]
    found = {
        "avg_ts": statistics.fmean(speeds),
        "stddev_ts": statistics.stdev(speeds) if len(speeds) > 1 else 0.0,
        "samples_ts": speeds,
    }
    means = {kind: statistics.fmean(of_prompt) for kind, of_prompt in samples.items()}
    return found | ({"prompts_ts": means} if test == "tg" else {})


def _seconds(model: PreTrainedModel, ids: Tensor, test: str, count: int) -> float:
    """Return the seconds that a prompt takes, or that generation takes after its first token."""
    from river_compile.reporting.timing import generate

    if test == "pp":
        return generate(model, ids[:, :count], 2, stop_after=1).first_token_s
    times = generate(model, ids, count).times
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
        columns = [name for name in result if name not in ("samples_ts", "prompts_ts")]
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
