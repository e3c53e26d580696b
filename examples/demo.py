"""Generates one answer with the plain model and with River, and shows what River did to each token.

    python -m examples.demo
    python -m examples.demo --prompt "Why is the sky blue?" --threshold 0.9

Prints both texts, the speed of both, and the depths at which tokens left the backbone; writes a picture with each
token's exit depth above its text. One prompt, greedy, on the CPU. A demo is not a measurement: `benchmarks.decode` is.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from river_compile.kernels.files import cache_folder
from tools import models

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tools.timing import Generation

PROMPT = "Write a Python function that returns the n-th Fibonacci number."
WIDTH = 88


@dataclass(frozen=True)
class Run:
    """What one way of running the model gave.

    Attributes:
        first_call: generation of a few tokens with nothing prepared; packing and compilation happen here.
        text: the whole generation, everything prepared.
    """

    first_call: Generation
    text: Generation


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    options = _parse(arguments)
    models.quiet()
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    print(f"Loading {options.model} ...", flush=True)
    model, tokenizer = models.load_or_exit(options.model, dtype=options.dtype)
    prompt = models.encode(tokenizer, options.prompt)
    blocks = model.config.num_hidden_layers

    print(f"Generating with the plain model ({options.dtype}, {torch.get_num_threads()} threads) ...", flush=True)
    plain = _run(model, prompt, options.new_tokens)
    print("Generating with River: weights are packed and segments compiled once ...", flush=True)
    river, depths = _run_river(model, tokenizer, prompt, options)

    print()
    _print_text("Plain model", tokenizer, plain.text)
    _print_text("River", tokenizer, river.text)
    _print_speeds({"plain": plain, "river": river})
    _print_depths(depths, blocks)
    print(f"Exit depth of every token: {options.picture}")
    if options.report:
        import river_compile

        print(f"\n{river_compile.report(model)}")
    return 0


def _run(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> Run:
    from tools.timing import generate

    first_call = generate(model, prompt, new_tokens, stop_after=2)
    return Run(first_call, generate(model, prompt, new_tokens, end_early=True))


def _run_river(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: torch.Tensor, options: argparse.Namespace
) -> tuple[Run, list[int]]:
    """Compiles `model` in place and draws the picture; returns the run and the exit depth of each decoded token."""
    import river_compile
    from tools.timing import generate

    model.compile(backend="river", options={"threshold": options.threshold})
    first_call = generate(model, prompt, options.new_tokens, stop_after=2)
    with river_compile.trace() as trace:
        text = generate(model, prompt, options.new_tokens, end_early=True)
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    decoded = text.tokens[1:]  # the first new token comes from the prompt's pass, which runs all blocks
    trace.plot(options.picture, texts=[tokenizer.decode([token]) for token in decoded])
    return Run(first_call, text), [step.depth for step in trace.tokens]


def _print_text(title: str, tokenizer: PreTrainedTokenizerBase, text: Generation) -> None:
    print(f"── {title} ".ljust(WIDTH, "─"))
    for line in tokenizer.decode(text.tokens, skip_special_tokens=True).splitlines():
        print(textwrap.fill(line, WIDTH, replace_whitespace=False, drop_whitespace=False))
    print()


def _print_speeds(runs: dict[str, Run]) -> None:
    print(f"{'':8} {'decode tokens/s':>16} {'first token, s':>16} {'first token of the first call, s':>34}")
    for name, run in runs.items():
        rate, first, cold = run.text.decode_tokens_per_s, run.text.first_token_s, run.first_call.first_token_s
        print(f"{name:8} {rate:16.1f} {first:16.2f} {cold:34.2f}")
    print()


def _print_depths(depths: list[int], blocks: int) -> None:
    from river_compile.reporting.report import histogram

    mean = statistics.mean(depths) if depths else float("nan")
    print(f"Where tokens left (of {blocks} blocks; mean exit depth {mean:.1f}):")
    print("\n".join(histogram(Counter(depths), blocks)) or "(no token was decoded)")
    print()


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Generates one answer with the plain model and with River.")
    parser.add_argument("--prompt", default=PROMPT, help="the question (default: %(default)s)")
    parser.add_argument("--new-tokens", type=_at_least_two, default=128, help="longest answer (default: %(default)s)")
    parser.add_argument("--threshold", type=float, default=0.7, help="similarity to leave at (default: %(default)s)")
    parser.add_argument(
        "--model", default="smollm2", help=f"{', '.join(models.MODELS)}, or a model folder (default: %(default)s)"
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
