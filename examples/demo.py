"""One answer three times: by the plain model, in exact mode, which keeps the text, and fast, which changes it.

    python -m examples.demo
    python -m examples.demo --prompt "Why is the sky blue?" --new-tokens 64

Prints the three texts side by side in 80 columns, with the words that differ from the plain text marked, and the speed
of each; writes a picture with the exit depth of each token of the fast one. One prompt, greedy, on the CPU. A demo is
not a measurement: `river bench` and `benchmarks.decode` are.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from river_compile.cli import shared
from river_compile.kernels.files import cache_folder
from tools import demo_models

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from river_compile.reporting.timing import Generation

PROMPT = "Write a Python function that returns the n-th Fibonacci number."
WIDTH, COLUMN = 80, 25
WAYS = ("plain", "exact", "fast")


@dataclass(frozen=True)
class Run:
    """What one way of running the model gave.

    Attributes:
        first_call: generation of a few tokens with nothing prepared; packing and compilation happen here.
        whole: the whole generation, everything prepared.
    """

    first_call: Generation
    whole: Generation


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    options = _parse(arguments)
    shared.quiet()
    import torch

    import river_compile
    from examples.plots import plot_trace
    from river_compile.reporting.timing import generate

    if options.threads:
        torch.set_num_threads(options.threads)
    model, tokenizer = demo_models.load_or_exit(options.model, dtype=options.dtype)
    print(f"Loaded {model.name_or_path}", flush=True)
    prompt = shared.encode(tokenizer, options.prompt)
    runs: dict[str, Run] = {}
    for way in WAYS:
        print(f"Generating: {way} ({options.dtype}, {torch.get_num_threads()} threads) ...", flush=True)
        if way != "plain":
            river_compile.accelerate(model, way, background_packing=False)  # what is timed is at full speed
        runs[way] = _run(model, prompt, options.new_tokens)
    with river_compile.trace() as trace:
        again = generate(model, prompt, options.new_tokens, end_early=True)
    texts = {way: tokenizer.decode(run.whole.tokens, skip_special_tokens=True) for way, run in runs.items()}
    console = Console(width=WIDTH, highlight=False)
    print()
    console.print(side_by_side(texts, marks=not console.is_terminal))
    console.print(speeds(runs))
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    plot_trace(trace, options.picture, [tokenizer.decode([token]) for token in again.tokens[1:]])
    print(f"Exit depth of every token of the fast text: {options.picture}")
    if options.report:
        print(f"\n{river_compile.report(model)}")
    return 0


def _run(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> Run:
    from river_compile.reporting.timing import generate

    first_call = generate(model, prompt, new_tokens, stop_after=2)
    generate(model, prompt, new_tokens, end_early=True)  # exact mode compiles a pass for each width as it needs it
    return Run(first_call, generate(model, prompt, new_tokens, end_early=True))


def side_by_side(texts: dict[str, str], marks: bool = False) -> Table:
    """Return a table with a column for each text, whose title says how it compares with the plain one.

    Args:
        texts: "plain" and others, by name.
        marks: stars around changed words, for output that has no colours.
    """
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    cells = []
    for name, text in texts.items():
        words = list(compared(texts["plain"], text))
        changed = sum(differs for _, differs in words)
        title = name if name == "plain" else f"{name}: {_verdict(text == texts['plain'], changed)}"
        table.add_column(
            title, width=COLUMN, overflow="fold", header_style="bold green" if not changed else "bold yellow"
        )
        cell = Text()
        for piece, differs in words:
            starred = f"*{piece}*" if differs and marks else piece
            cell.append(starred, style="reverse" if differs else "")
        cells.append(cell)
    table.add_row(*cells)
    return table


def _verdict(same: bool, changed: int) -> str:
    if same:
        return "the same text"
    return f"{changed} words changed" if changed else "words left out"


def compared(plain: str, text: str) -> Iterator[tuple[str, bool]]:
    """Yield a text's words and the spaces between them, each with whether the plain text has another word there."""
    before, after = (_pieces(t) for t in (plain, text))
    for kind, _, _, start, end in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        for piece in after[start:end]:
            yield piece, kind != "equal" and not piece.isspace()


def _pieces(text: str) -> list[str]:
    return re.findall(r"\s+|\S+", text)


def speeds(runs: dict[str, Run]) -> Table:
    """Return a table of the speeds."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("")
    for title in ("tokens/s", "times plain", "first token, s", "the first call's, s"):
        table.add_column(title, justify="right")
    plain = runs["plain"].whole.decode_tokens_per_s
    for name, run in runs.items():
        rate = run.whole.decode_tokens_per_s
        numbers = (rate, rate / plain, run.whole.first_token_s, run.first_call.first_token_s)
        table.add_row(name, *(f"{number:.2f}" for number in numbers))
    return table


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One answer: plain, exact (the same text), and fast.")
    parser.add_argument("--prompt", default=PROMPT, help="the question (default: %(default)s)")
    parser.add_argument("--new-tokens", type=_at_least_two, default=96, help="longest answer (default: %(default)s)")
    parser.add_argument(
        "--model", default="smollm2", help=f"{', '.join(demo_models.MODELS)}, or a model folder (default: %(default)s)"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--threads", type=int, help="threads of PyTorch (default: its own choice)")
    parser.add_argument(
        "--picture",
        type=Path,
        default=cache_folder() / "exit_depths.png",
        help="where the picture goes (default: %(default)s)",
    )
    parser.add_argument("--report", action="store_true", help="also print River's report")
    return parser.parse_args(arguments)


def _at_least_two(text: str) -> int:
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"{number} is too few to measure a rate; give 2 or more")
    return number


if __name__ == "__main__":
    sys.exit(main())
