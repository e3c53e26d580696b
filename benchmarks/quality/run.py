"""What River does to quality: the paper's tables and figures.

    python -m benchmarks.quality
    python -m benchmarks.quality --model smollm2 qwen-coder-1.5b --json quality.json --plots docs/images
    python -m benchmarks.quality --quick               # few tokens, for a look at the output
    python -m benchmarks.quality --parts entries       # one of: table, entries

Measured on the model's own greedy text and on held-out text, fed token by token (see benchmarks/quality/session.py):
    1. KL, next-token agreement, exact match of greedy text, depth and speed: backbone, everything 4-bit with each
       quantizer, River at several thresholds and calibrated to a budget
    2. cosine of twins' KV entries by exit depth and layer; what the exit score tells of the final value error

Groups are of 64 weights. (SmolLM2's were unpacked from groups of 32, which groups of 32 would reproduce.)
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

import river_compile
from benchmarks import common
from benchmarks.quality import entries
from benchmarks.quality.session import Row, Session, session
from benchmarks.texts import Texts, collect
from river_compile.cli import shared
from river_compile.config import RiverConfig
from tools import demo_models

THRESHOLDS = (0.7, 0.95, 0.97, 0.98)
PAPER = 0.7  # the threshold at which every quantizer is measured
CALIBRATION_TOKENS = 8  # of each text
PARTS = ("table", "entries")
FIRST_EXIT = 2


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    shared.quiet()
    outcomes = {}
    for name in options.model:
        start = time.perf_counter()
        outcomes[name] = outcome = measure(*demo_models.load_or_exit(name), options)
        outcome["seconds"] = time.perf_counter() - start
        print(f"\n{name}")
        show(outcome)
    common.write_outcome({**common.setting("quality", options), "models": outcomes}, options.json)
    if options.plots:
        from benchmarks.quality.plots import plot

        print("Drawn to " + ", ".join(str(path) for path in plot(outcomes, options.plots)))
    return 0


def measure(
    model: PreTrainedModel,
    tokenizer: Callable,
    options: argparse.Namespace,
    base: Mapping[str, object] = {"group_size": 64},
) -> dict:
    """Return everything that was measured, as values that JSON can hold.

    Args:
        model: in eval mode; it is compiled again and again.
        tokenizer: of the model.
        options: the command line's.
        base: options of the backend that all sessions share.
    """
    texts = None

    def first_texts() -> Texts:
        nonlocal texts
        texts = collect(model, tokenizer, options.texts, options.tokens, options.calibration_texts)
        return texts

    run = _Run(model, tokenizer, options, base)
    main_quantizer = options.quantizers[0]
    with run.session({"quantizer": main_quantizer}, first_texts) as first:
        run.first, run.texts = first, texts
        outcome = {
            "tokens": options.tokens,
            "texts": options.texts,
            "blocks": first.num_blocks,
            "quantizer": main_quantizer,
            "ms_never": 1e3 * first.own.seconds_full_depth,
        }
        if "table" in options.parts:
            rows = [first.depth("backbone", first.num_blocks), first.depth(f"everything 4-bit, {main_quantizer}", 0)]
            rows += [first.rule(f"River, threshold {t:g}", (t, FIRST_EXIT)) for t in options.thresholds]
        if "entries" in options.parts:
            outcome["entries"] = entries.measure(first.own, entries.depths_of(first.num_blocks))
    if "table" in options.parts:
        found, calibrated = run.calibrated() if options.calibration_texts else (None, [])
        rows += [*calibrated, *(row for name in options.quantizers[1:] for row in run.quantizer(name))]
        outcome |= {"rows": [row.to_dict() for row in rows], "calibration": found}
    return outcome


@dataclass
class _Run:
    """What the sessions of one run share.

    Attributes:
        first: the session whose runs at full depth all others are compared with.
        texts: what is measured on.
    """

    model: PreTrainedModel
    tokenizer: Callable
    options: argparse.Namespace
    base: Mapping[str, object]
    first: Session | None = None
    texts: Texts | None = None

    def session(
        self,
        more: Mapping[str, object],
        texts: Callable[[], Texts] | None = None,
    ) -> contextlib.AbstractContextManager[Session]:
        """Return a session with more options."""
        options, given = {**self.base, **more}, texts or self.texts
        return session(self.model, options, given, self.options.progress, self.first)

    def quantizer(self, name: str) -> list[Row]:
        """Measure another quantizer."""
        with self.session({"quantizer": name}) as other:
            rule = (PAPER, FIRST_EXIT)
            return [
                other.depth(f"everything 4-bit, {name}", 0),
                other.rule(f"River, {name}, threshold {PAPER:g}", rule),
            ]

    def calibrated(self) -> tuple[str, list[Row]]:
        """Calibrate on their own texts and measure the rule on those of the other rows."""
        torch._dynamo.reset()
        options, more = self.options, {"quantizer": self.options.quantizers[0]}
        found = river_compile.tune_exit(
            self.model,
            self.tokenizer,
            self.texts.calibration,
            kl=options.kl,
            options={**self.base, **more},
            tokens=CALIBRATION_TOKENS,
            progress=options.progress,
        )
        with self.session({**more, "criterion": found.base_options["criterion"]}) as other:
            rule = (found.chosen.threshold, found.chosen.first_exit)
            return str(found), [other.rule(f"River, calibrated to KL {options.kl:g}", rule)]


def show(outcome: dict) -> None:
    """Print a table for each part that was measured."""
    print(f"{outcome['texts']} texts of {outcome['tokens']} tokens of each kind, {outcome['blocks']} blocks")
    if "rows" in outcome:
        _show_rows(outcome)
    if "entries" in outcome:
        near = entries.summary(outcome["entries"], FIRST_EXIT)
        print(
            f"\nTwins' entries after depth {near['depth']}, cosine to the backbone's: "
            f"values {near['values_mean']:.3f} (least layer {near['values_least']:.3f}), keys {near['keys_mean']:.3f}"
        )


def _show_rows(outcome: dict) -> None:
    headers = (
        "",
        "KL own",
        "held-out",
        "agreement own",
        "held-out",
        f"match of {outcome['tokens']}",
        "depth",
        "tokens/s",
    )
    common.print_table(headers, [_shown(row, outcome["ms_never"]) for row in outcome["rows"]])
    if outcome["calibration"]:
        print(f"\n{outcome['calibration']}")


def _shown(row: dict, ms_never: float) -> tuple:
    own, held_out = row["own"], row["held_out"]
    kl, agreement = (
        (f"{own['kl']:.3f}", f"{held_out['kl']:.3f}"),
        (f"{own['agreement']:.2f}", f"{held_out['agreement']:.2f}"),
    )
    speed = 1e3 / (row["time"] * ms_never)
    return (row["name"], *kl, *agreement, f"{own['match']:.1f}", f"{row['depth']:.1f}", f"{speed:.1f}")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    quantizers = list(RiverConfig.choices("quantizer"))
    parser = common.command_line(__doc__, "threads", "no-progress", "json")
    parser.add_argument(
        "--model", nargs="+", default=["smollm2"], help="names or folders, a row of figures each (smollm2)"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default all)")
    parser.add_argument("--texts", type=int, default=5, help="texts of each kind (default 5)")
    parser.add_argument("--tokens", type=int, default=24, help="tokens measured in each text (default 24)")
    parser.add_argument("--quantizers", nargs="+", choices=quantizers, default=quantizers, help="the first one in full")
    parser.add_argument("--thresholds", nargs="+", type=float, default=list(THRESHOLDS))
    parser.add_argument("--kl", type=float, default=0.1, help="budget of the calibrated row (default 0.1 nats)")
    parser.add_argument("--calibration-texts", type=int, default=60, help="for tune_exit; 0: without it (default 60)")
    parser.add_argument("--quick", action="store_true", help="2 texts, 8 tokens, without tune_exit")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw the figures")
    options = parser.parse_args(arguments)
    if options.quick:
        options.texts, options.tokens, options.calibration_texts, options.thresholds = 2, 8, 0, [PAPER]
    return options


if __name__ == "__main__":
    sys.exit(main())
