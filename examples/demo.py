"""One answer three times: by transformers, by River in exact mode, which is the default, and by River in fast mode.

    python -m examples.demo
    python -m examples.demo --prompt "Why is the sky blue?" --new-tokens 64
    python -m examples.demo --record demo.svg

Not handled: batches, sampling, GPUs. One run is not a measurement: `river bench` and `benchmarks.decode` are.
"""

from __future__ import annotations

import argparse
import functools
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from river_compile.cli import shared
from river_compile.kernels.files import cache_folder
from river_compile.kernels.native.machine import processor_name
from river_compile.progress import stage_reached, stage_shown
from tools import demo_models

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from examples.columns import Answer
    from examples.parting import Parting
    from river_compile.reporting.timing import Generation

# No two tokens nearly tie in its answer by SmolLM2, so rounding changes none of them.
PROMPT = "Write a Python class for a stack."
WIDTH, WIDEST = 80, 120  # characters, without and with a terminal
PICTURE_WIDTH = 100  # characters
BUSY = 0.5  # load per core before the runs
PLAIN, EXACT, FAST = "transformers", "exact", "fast"
TITLES = {PLAIN: PLAIN, EXACT: "exact, the default", FAST: FAST}
NOTE = "Each ran alone, one after another; shown in real time from one common start."


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    options = _parse(arguments)
    shared.quiet()
    import torch

    import river_compile
    from examples.columns import Answer, Columns, play
    from examples.plots import plot_trace
    from river_compile.config import RiverConfig
    from river_compile.lowering.lower import begin_kernels
    from river_compile.reporting.timing import generate

    load = os.getloadavg()[0]
    if options.threads:
        torch.set_num_threads(options.threads)
    with stage_shown("preparing"):  # one bar from the download to the last run
        begin_kernels(RiverConfig(), torch.device("cpu"))  # while the model is fetched and converted
        model, tokenizer = demo_models.load_or_exit(options.model, dtype=options.dtype)
        prompt = shared.encode(tokenizer, options.prompt)
        runs, undrafted = _runs(model, prompt, options.new_tokens, options.repeats)
        with river_compile.trace() as trace:
            again = generate(model, prompt, options.new_tokens, end_early=True)
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    plot_trace(trace, options.picture, [tokenizer.decode([token]) for token in again.tokens[1:]])
    report = river_compile.report(model)
    decode = functools.partial(tokenizer.decode, skip_special_tokens=True)
    answers = [Answer.of(TITLES[way], run, decode) for way, run in runs.items()]
    depths = depth_line(trace.mean_depth, model.config.num_hidden_layers, report.to_dict()["exit_rule"])
    checks = _checks(model, tokenizer, prompt, options.new_tokens, runs, undrafted)
    lines = [NOTE, *checks, depths, f"Prompt: {options.prompt}", *_setting(options, load)]
    console = Console(highlight=False)
    if console.is_terminal:
        play(Columns(answers, min(console.width, WIDEST)), console, NOTE)
    _show(console, answers, lines)
    print(f"Exit depth of every token of the fast text: {options.picture}")
    if options.record:
        _record(options.record, answers, lines)
    if options.report:
        print(f"\n{report}")
    return 0


def _runs(
    model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int, repeats: int
) -> tuple[dict[str, Generation], Generation]:
    """Return each way's fastest run, and that of exact mode's passes without drafts; the model stays in fast mode."""
    import river_compile
    from river_compile.decoding.mode import decode
    from river_compile.exits import WHOLE, forced_depth
    from river_compile.reporting.timing import generate

    def timed(**more: object) -> Generation:
        return generate(model, prompt, new_tokens, end_early=True, **more)

    runs = {}
    for way in TITLES:
        with stage_shown(f"running {way} alone"):
            if way != PLAIN:
                river_compile.accelerate(model, way, background_packing=False)  # what is timed is at full speed
            timed()  # exact mode compiles a pass for each width as it needs it
            made = []
            for number in range(repeats):
                stage_reached((number + 1) / (repeats + 1))
                made.append(timed())
            runs[way] = min(made, key=lambda run: run.times[-1])
            if way == EXACT:
                with forced_depth(WHOLE):
                    undrafted = timed(custom_generate=decode)
    return runs, undrafted


def _checks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: torch.Tensor,
    new_tokens: int,
    runs: dict[str, Generation],
    undrafted: Generation,
) -> Iterator[str]:
    """Yield how exact mode's output compares with those without drafts and of transformers; restores the model."""
    import river_compile
    from examples.parting import parting, parts_at

    exact, plain = runs[EXACT].tokens, runs[PLAIN].tokens
    yield undrafted_line(exact, undrafted.tokens)
    if parts_at(plain, exact) is None:
        yield plain_line(None, tokenizer.decode)
    else:
        river_compile.restore(model)
        yield plain_line(parting(model, prompt, new_tokens, plain, exact), tokenizer.decode)


def undrafted_line(exact: Sequence[int], undrafted: Sequence[int]) -> str:
    """Return the sentence that compares exact mode's token ids with River's without drafts."""
    from examples.parting import parts_at

    index = parts_at(exact, undrafted)
    if index is None:
        return f"exact equals River without drafts token for token, {len(exact)} of {len(exact)}."
    return f"exact is NOT River without drafts: they part at token {index + 1}."


def depth_line(mean_depth: float, layers: int, rule: Mapping[str, Any] | None) -> str:
    """Return the sentence that says how deep tokens of the fast text ran, and by which rule."""
    said = f"fast runs {mean_depth:.1f} of {layers} layers in 16 bits on average"
    if rule is None or "kl" not in rule:  # the options have a rule, or none could be found
        return f"{said}."
    return f"{said}; its rule loses a KL of {rule['kl']:.3f} nats per token, by an estimate."


def plain_line(parting: Parting | None, decode: Callable[[Sequence[int]], str]) -> str:
    """Return the sentence that compares exact mode's text with transformers'; None: they have the same tokens."""
    if parting is None:
        return f"exact equals {PLAIN} token for token."
    return f"exact parts from {PLAIN}: {parting.text(decode)}."


def _setting(options: argparse.Namespace, load: float) -> Iterator[str]:
    """Yield what ran where, and a warning if other programs ran too."""
    import torch

    source = demo_models.MODELS.get(options.model)
    name = source.title if source else Path(options.model).name
    runs = f"; the fastest of {options.repeats} runs" if options.repeats > 1 else ""
    yield f"{name}, {options.dtype}, {torch.get_num_threads()} threads, {processor_name()}{runs}"
    if load > BUSY * (os.cpu_count() or 1):
        yield f"Other programs were busy (load {load:.1f}), which slows each way by another factor."


def _show(console: Console, answers: Sequence[Answer], lines: Sequence[str]) -> None:
    """Print the whole answers, in 80 columns and with stars if there is no terminal."""
    from examples.columns import Columns

    stars = not console.is_terminal
    width = WIDTH if stars else min(console.width, WIDEST)
    console = Console(width=width, highlight=False)
    console.print(Columns(answers, width, stars).at())
    for line in ("", *lines):
        console.print(Text(line))


def _record(file: Path, answers: Sequence[Answer], lines: Sequence[str]) -> None:
    from examples.columns import Columns

    console = Console(width=PICTURE_WIDTH, record=True, file=io.StringIO(), force_terminal=True, highlight=False)
    console.print(Columns(answers, PICTURE_WIDTH).at(), "", *lines, sep="\n")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(console.export_svg(title="python -m examples.demo"), encoding="utf-8")
    print(f"Recorded to {file}")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One answer by transformers, in exact mode and in fast mode.")
    parser.add_argument("--prompt", default=PROMPT, help="the question (default: %(default)s)")
    parser.add_argument("--new-tokens", type=_at_least(2), default=160, help="longest answer (default: %(default)s)")
    parser.add_argument(
        "--model", default="smollm2", help=f"{', '.join(demo_models.MODELS)}, or a model folder (default: %(default)s)"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--threads", type=int, help="threads of PyTorch (default: its own choice)")
    parser.add_argument(
        "--repeats", type=_at_least(1), default=1, help="runs of each way; the fastest is shown (default: %(default)s)"
    )
    parser.add_argument(
        "--picture",
        type=Path,
        default=cache_folder() / "exit_depths.png",
        help="where the picture of exit depths goes (default: %(default)s)",
    )
    parser.add_argument("--record", type=Path, metavar="FILE", help="write what a terminal shows in the end as an SVG")
    parser.add_argument("--report", action="store_true", help="also print River's report")
    return parser.parse_args(arguments)


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is too few; give {least} or more")
        return value

    return number


if __name__ == "__main__":
    sys.exit(main())
