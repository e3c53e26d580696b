"""How often a smaller model and the model's own twins have the next token right, and what drafts by both would gain.

    python -m benchmarks.acceptance --model qwen-coder-1.5b --json acceptance.json
    python -m benchmarks.acceptance --recorded acceptance.json --assistant-ms 7 --twins-ms 110 \\
        --target-ms 1=370 2=375 4=380 8=390 16=410     # the same texts at the speed of a larger model

The text is the model's own greedy one; each drafter is asked for every next token of it. Twins read the cache of the
model, as when they draft. The replay takes seconds of draft steps and passes as measured here, or as given. "Two
levels": the assistant drafts, a pass of the twins checks that, and the model verifies what came of it. Such a pass is
taken to last as much longer than a step of the twins as one of the model does with as many tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common, prompt_sets, replay
from benchmarks.prompt_sets import ALL
from benchmarks.replay import Seconds, Text
from river_compile import accelerate, trace
from river_compile.cli import shared
from river_compile.evaluation.meter import TextDecoder
from river_compile.exits import forced_depth
from river_compile.reporting import timing
from tools import demo_models

DRAFTED = (1, 3, 5, 7, 15)  # tokens of the drafts whose passes are timed
_TIMED_TOKENS = 48
Agreement = dict[str, list[bool]]  # by drafter, as in `agreement`


def own_text(model: Any, prompt: list[int], tokens: int) -> Tensor:
    """Return a prompt with the greedy text of an accelerated model, past any end, ``[1, prompt + tokens]``."""
    made = timing.generate(model, torch.tensor([prompt]), tokens, static_cache=False)
    return torch.tensor([[*prompt, *made.tokens]])


@torch.inference_mode()
def choices_of_twins(model: Any, decoder: TextDecoder, ids: Tensor, prompt: int) -> list[int]:
    """Return the twins' choice after each token behind a prompt but the last, each time on the model's own cache."""
    chosen = []
    decoder.prompt(ids[:, :prompt])
    for end in range(prompt + 1, ids.shape[1]):
        before = decoder.save()
        with forced_depth(0):
            chosen.append(int(decoder.step(ids[:, :end]).argmax()))
        decoder.resume(before)
        with forced_depth(model.config.num_hidden_layers):
            decoder.step(ids[:, :end])
    return chosen


def choices_of_all_twins(decoder: TextDecoder, ids: Tensor, prompt: int) -> list[int]:
    """Return the same of a model whose tokens all run by twins, as an assistant's do."""
    with forced_depth(0):
        chosen: list[int] = decoder.logits(ids[:, :-1], prompt).argmax(-1).tolist()
    return chosen


@torch.inference_mode()
def choices(model: Any, ids: Tensor, prompt: int) -> list[int]:
    """Return the same of a model that nothing has changed."""
    chosen: list[int] = model(ids[:, :-1]).logits[0, prompt:].argmax(-1).tolist()
    return chosen


def agreement(text: Sequence[int], full: Sequence[int], assistant: Sequence[int], twins: Sequence[int]) -> Agreement:
    """Return by token whether the choices of the assistant, in 16 bits and in 4, and of the twins are it."""
    return {
        "assistant_16bit": [a == b for a, b in zip(full, text, strict=True)],
        "assistant": [a == b for a, b in zip(assistant, text, strict=True)],
        "twins": [a == b for a, b in zip(twins, text, strict=True)],
        "same": [a == b for a, b in zip(assistant, twins, strict=True)],
    }


def passes(model: Any, prompt: list[int]) -> tuple[float, dict[int, float]]:
    """Return the seconds of a draft step of an accelerated model's twins, and of a pass by its width."""
    ids, constant = torch.tensor([prompt]), {"num_assistant_tokens_schedule": "constant", "prompt_lookup_num_tokens": 0}
    steps: list[float] = []
    by_width: dict[int, list[float]] = {}
    for length in DRAFTED:
        for _ in range(2):  # the first time of a width prepares its program
            with trace() as seen:
                timing.generate(model, ids, _TIMED_TOKENS, static_cache=False, num_assistant_tokens=length, **constant)
        for cycle in seen.cycles:
            drafting, verifying, accepting = cycle.seconds
            by_width.setdefault(cycle.width, []).append(verifying + accepting)
            steps += [drafting / len(cycle.drafted)] if cycle.drafted else []
    with trace() as seen:
        timing.generate(model, ids, _TIMED_TOKENS, static_cache=False, num_assistant_tokens=0)
    by_width[1] = [step.seconds for step in seen.tokens]
    return statistics.median(steps), {width: statistics.median(by_width[width]) for width in sorted(by_width)}


def measure(options: argparse.Namespace, **backend: Any) -> dict[str, Any]:
    """Return the agreement of each text, and the seconds of steps and passes; `backend` has options of both models."""
    folder = demo_models.resolve(options.model)
    prompts = prompt_sets.encoded(folder, options)
    model, _ = demo_models.load(folder, options.dtype)
    accelerate(model, "exact", background_packing=False, **backend)
    texts = [own_text(model, prompt.ids, options.new_tokens) for prompt in prompts]
    lengths = [len(prompt.ids) for prompt in prompts]
    pairs = list(zip(texts, lengths, strict=True))
    print("texts are there; asking the twins ...", file=sys.stderr)
    longest = max(ids.shape[1] for ids in texts)  # (another capacity would be another graph)
    decoder = TextDecoder(model, longest)
    twins = [choices_of_twins(model, decoder, *pair) for pair in pairs]
    step, by_width = passes(model, prompts[0].ids)
    del model, decoder
    print("asking the assistant ...", file=sys.stderr)
    small, _ = demo_models.load(demo_models.SMALLER[options.model], options.dtype)
    full = [choices(small, *pair) for pair in pairs]
    accelerate(small, "exact", background_packing=False, **backend)
    decoder = TextDecoder(small, longest)
    assistant = [choices_of_all_twins(decoder, *pair) for pair in pairs]
    small_step, _ = passes(small, prompts[0].ids)
    rows = zip(prompts, pairs, full, assistant, twins, strict=True)
    found = [
        {"kind": prompt.kind, **agreement(ids[0, length + 1 :].tolist(), *chosen)}
        for prompt, (ids, length), *chosen in rows
    ]
    return {"texts": found, "seconds": {"assistant": small_step, "twins": step, "target": by_width}}


def seconds_of(options: argparse.Namespace, measured: Mapping[str, Any]) -> Seconds:
    """Return the seconds that are replayed: those given, and for the others those measured."""
    measured_passes = {int(width): s for width, s in measured["target"].items()}
    target = {width: ms / 1e3 for width, ms in options.target_ms} or measured_passes
    if 1 not in target or max(target) < 3:
        raise ValueError(
            f"--target-ms has passes of {', '.join(map(str, target))}; give passes of 1 token and of 3 or more"
        )
    assistant = measured["assistant"] if options.assistant_ms is None else options.assistant_ms / 1e3
    twins = measured["twins"] if options.twins_ms is None else options.twins_ms / 1e3
    checks = {width: ms / 1e3 for width, ms in options.twins_pass_ms}
    return Seconds(assistant, twins, target, checks or {width: twins + s - target[1] for width, s in target.items()})


def shares(texts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return how often each drafter is right, both are the same, and the twins are right where the assistant is not."""
    tokens = {key: [flag for text in texts for flag in text[key]] for key in texts[0] if key != "kind"}
    found = {key: statistics.fmean(flags) for key, flags in tokens.items()}
    missed = [twin for twin, small in zip(tokens["twins"], tokens["assistant"], strict=True) if not small]
    return {**found, "twins_if_not_assistant": statistics.fmean(missed) if missed else float("nan")}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    shared.quiet()
    measured = json.loads(options.recorded.read_text()) if options.recorded else common.attempted(measure, options)
    if measured is None:
        return 1
    try:
        seconds = seconds_of(options, measured["seconds"])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    outcome = {**common.setting("acceptance", options), **measured, **summarize(measured["texts"], seconds)}
    show(outcome, seconds)
    common.write_outcome(outcome, options.json)
    return 0


def summarize(rows: Sequence[Mapping[str, Any]], seconds: Seconds) -> dict[str, Any]:
    """Return shares and tokens/s by kind of prompt."""
    texts = [Text(row["kind"], row["assistant"], row["twins"], row["same"]) for row in rows]
    kinds = dict.fromkeys(text.kind for text in texts)
    best = replay.best(texts, seconds)
    speeds = {
        way: {kind: replay.speed([t for t in texts if kind in (ALL, t.kind)], *cycles) for kind in (ALL, *kinds)}
        for way, (_, cycles) in best.items()
    }
    return {
        "shares": {kind: shares([row for row in rows if kind in (ALL, row["kind"])]) for kind in (ALL, *kinds)},
        "lengths": {way: lengths for way, (lengths, _) in best.items()},
        "tokens_per_s": speeds,
    }


def show(outcome: Mapping[str, Any], seconds: Seconds) -> None:
    """Print the tables, and whether two levels gain."""
    common.print_setting(outcome)
    heads = ("assistant, 16 bits", "assistant, 4 bits", "twins", "both the same", "twins, assistant wrong")
    common.print_table(
        ["right next tokens", *heads], [[kind, *row.values()] for kind, row in outcome["shares"].items()]
    )
    target = ", ".join(f"{width}: {1e3 * s:.1f}" for width, s in seconds.target.items())
    print(f"\nms: assistant's step {1e3 * seconds.assistant:.2f}, twins' {1e3 * seconds.twins:.2f}, passes {target}\n")
    speeds = outcome["tokens_per_s"]
    rows = [[way, outcome["lengths"][way], *by_kind.values()] for way, by_kind in speeds.items()]
    common.print_table(["tokens/s, replayed", "tokens of drafts", *speeds["no drafts"]], rows)
    one = max(speeds[way][ALL] for way in ("twins", "assistant"))
    both, levels = (speeds[way][ALL] for way in ("best of both in each cycle", "two levels"))
    print(f"\nTwo levels: {levels / one:.2f} of the better drafter alone, {levels / both:.2f} of the best of both")


def _by_width(text: str) -> tuple[int, float]:
    width, _, ms = text.partition("=")
    return int(width), float(ms)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = common.command_line(__doc__, "model", "dtype", "new-tokens", "threads", "json", model="qwen-coder-1.5b")
    prompt_sets.add_arguments(parser)
    parser.set_defaults(contexts=[1])  # no document before the question
    parser.add_argument("--recorded", type=Path, metavar="FILE", help="replay what --json wrote, and measure nothing")
    parser.add_argument("--assistant-ms", type=float, metavar="MS", help="of a draft step of the assistant")
    parser.add_argument("--twins-ms", type=float, metavar="MS", help="of a draft step of the twins")
    said = "of passes, by width: 1=60 2=62"
    parser.add_argument("--target-ms", type=_by_width, nargs="+", default=[], metavar="WIDTH=MS", help=f"{said} 16=80")
    parser.add_argument("--twins-pass-ms", type=_by_width, nargs="+", default=[], metavar="WIDTH=MS", help=said)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
