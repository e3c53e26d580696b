"""What River does to quality, and what other answers to missing KV entries cost: the paper's tables and figures.

    python benchmarks/quality.py
    python benchmarks/quality.py --json quality.json --plots docs/images
    python benchmarks/quality.py --quick                            # few tokens, for a look at the output

Measured on the model's own greedy text and on held-out text, fed token by token (see benchmarks/quality_session.py):
    1. KL, next-token agreement, exact match of greedy text, depth and speed: backbone, everything 4-bit with each
       quantizer, River at several thresholds and calibrated to a budget
    2. the five fills at two budgets, ms per token in parts, and their frontier of speed and quality
    3. cosine of twins' KV entries by exit depth and layer; what the exit score tells of the final value error

Groups are of 64 weights. (SmolLM2's were unpacked from groups of 32, which groups of 32 would reproduce.)
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds only its own folder

import torch
from transformers import PreTrainedModel

import river_compile
from benchmarks import common, quality_entries, quality_fills
from benchmarks.quality_session import Row, session
from benchmarks.quality_texts import collect
from examples import models
from river_compile.config import RiverConfig
from river_compile.fills import FILLS

THRESHOLDS = (0.5, 0.7, 0.9, 0.95)
PAPER = 0.7  # the threshold at which every quantizer is measured
TIMES = tuple(i / 20 for i in range(6, 20))  # of the frontier, as shares of never exit's


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    models.quiet()
    try:
        model, tokenizer = models.load(options.model)
    except (models.ModelUnavailable, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    start = time.perf_counter()
    outcome = measure(model, tokenizer, options)
    outcome |= {
        "benchmark": "quality",
        "model": str(options.model),
        "seconds": time.perf_counter() - start,
        "machine": common.machine_facts(options.threads),
    }
    show(outcome)
    if options.json:
        common.write_json(options.json, outcome)
        print(f"\nWritten to {options.json}")
    if options.plots:
        from benchmarks.quality_plots import plot

        print("Drawn to " + ", ".join(str(path) for path in plot(outcome, options.plots)))
    return 0


def measure(
    model: PreTrainedModel,
    tokenizer: Callable,
    options: argparse.Namespace,
    base: Mapping[str, object] = {"group_size": 64},
) -> dict:
    """Returns everything that was measured, as values that JSON can hold.

    Args:
        model: in eval mode; it is compiled again and again.
        tokenizer: of the model.
        options: the command line's.
        base: options of the backend that all sessions share.
    """
    texts = None

    def first_texts():
        nonlocal texts
        texts = collect(model, tokenizer, options.texts, options.tokens, options.calibration_texts)
        return texts

    main_quantizer = options.quantizers[0]
    river_options = {**base, "quantizer": main_quantizer}
    if main_quantizer in ("awq", "gptq"):
        river_compile.observe(model, tokenizer, progress=options.progress)
    with session(model, river_options, first_texts, options.progress) as first:
        blocks = first.num_blocks
        rows = [first.depth("backbone", blocks), first.depth(f"everything 4-bit, {main_quantizer}", 0)]
        rows += [first.rule(f"River, threshold {t:g}", (t, 2)) for t in options.thresholds]
        never = first.own.seconds_never
        depths = sorted({0, 2, *range(4, blocks, max(1, blocks // 8)), blocks - 1})
        entries = quality_entries.measure(first.own, [d for d in depths if d < blocks])
        shares = {*quality_fills.BUDGETS.values(), *quality_fills.FRONTIER}
        thresholds = {share: quality_fills.threshold_for(first.own, share) for share in shares}
        fills = {"river": quality_fills.measure(first, thresholds)}
    found, calibrated = None, None
    if options.calibration_texts:
        found, calibrated = _calibrated(model, tokenizer, options, river_options, texts, first)
        rows += [calibrated] if calibrated else []
    for fill in options.fills:
        with session(model, {**base, "fill": fill}, texts, options.progress, first) as other:
            fills[fill] = quality_fills.measure(other, thresholds)
    for quantizer in options.quantizers[1:]:
        if quantizer in ("awq", "gptq"):
            river_compile.observe(model, tokenizer, progress=options.progress)
        with session(model, {**base, "quantizer": quantizer}, texts, options.progress, first) as other:
            rows.append(other.depth(f"everything 4-bit, {quantizer}", 0))
            rows.append(other.rule(f"River, {quantizer}, threshold {PAPER:g}", (PAPER, 2)))
    frontier = quality_fills.frontiers(fills, TIMES)
    return {
        "tokens": options.tokens,
        "texts": options.texts,
        "blocks": blocks,
        "quantizer": main_quantizer,
        "ms_never": 1e3 * never,
        "rows": [row.to_dict() for row in rows],
        "calibration": found,
        "fills": fills,
        "frontier": {"times": list(TIMES), "kl": frontier, "river_leads": quality_fills.river_leads(frontier)},
        "entries": entries,
        "entries_from_depth_2": quality_entries.summary(entries, 2),
    }


def _calibrated(
    model: PreTrainedModel, tokenizer: Callable, options: argparse.Namespace, river_options: dict, texts, first
) -> tuple[str, Row | None]:
    """Calibrates on texts of their own and measures the rule on those of the other rows."""
    torch._dynamo.reset()
    try:
        found = river_compile.calibrate(
            model,
            tokenizer,
            texts.calibration,
            kl=options.kl,
            options=river_options,
            tokens=8,
            progress=options.progress,
        )
    except river_compile.BudgetError as error:
        return str(error), None
    best = found.chosen
    with session(
        model, {**river_options, "criterion": found.base_options["criterion"]}, texts, options.progress, first
    ) as s:
        return str(found), s.rule(f"River, calibrated to KL {options.kl:g}", (best.threshold, best.first_exit))


def show(outcome: dict) -> None:
    """Prints the tables."""
    ms = outcome["ms_never"]
    print(f"\n{outcome['texts']} texts of {outcome['tokens']} tokens of each kind, {outcome['blocks']} blocks")
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
    common.print_table(headers, [_shown(row, ms) for row in outcome["rows"]])
    if outcome["calibration"]:
        print(f"\n{outcome['calibration']}")
    print("\nFills at the same thresholds: ms per token (own text)")
    lines = [
        (budget, name, *(f"{found['ms'][p]:.2f}" for p in quality_fills.PARTS), f"{sum(found['ms'].values()):.2f}",
         f"{found['depth']:.1f}", f"{found['kl']:.3f}", f"{found['agreement']:.2f}")
        for budget in quality_fills.BUDGETS
        for name, fill in outcome["fills"].items()
        for found in [fill["budgets"][budget]]
    ]  # fmt: skip
    common.print_table(("budget", "fill", *quality_fills.PARTS, "all", "depth", "KL", "agreement"), lines)
    print("\nLeast KL at equal time per token (share of never exit's; own text)")
    frontier = outcome["frontier"]
    times = [(i, t) for i, t in enumerate(frontier["times"]) if round(t * 100) % 10 == 0]
    lines = [(name, *(_number(kls[i]) for i, _ in times)) for name, kls in frontier["kl"].items()]
    common.print_table(("fill", *(f"{t:.0%}" for _, t in times)), lines)
    verdict = "lies above all others" if frontier["river_leads"] else "does not lie above all others"
    print(f"River's frontier {verdict} at every common speed.")
    near = outcome["entries_from_depth_2"]
    print(
        f"\nTwins' entries behind depth 2, cosine to the backbone's: values {near['values_mean']:.3f} "
        f"(least layer {near['values_least']:.3f}), keys {near['keys_mean']:.3f}"
    )


def _shown(row: dict, ms_never: float) -> tuple:
    own, held_out = row["own"], row["held_out"]
    kl, agreement = (
        (f"{own['kl']:.3f}", f"{held_out['kl']:.3f}"),
        (f"{own['agreement']:.2f}", f"{held_out['agreement']:.2f}"),
    )
    speed = 1e3 / (row["time"] * ms_never)
    return (row["name"], *kl, *agreement, f"{own['match']:.1f}", f"{row['depth']:.1f}", f"{speed:.1f}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    quantizers = [name for name in RiverConfig.choices("quantizer") if name != "none"]
    rivals = [name for name in FILLS if name != "river"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help=f"{', '.join(models.MODELS)} or a model folder")
    parser.add_argument("--texts", type=int, default=6, help="texts of each kind (default 6)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens measured in each text (default 32)")
    parser.add_argument("--quantizers", nargs="+", choices=quantizers, default=quantizers, help="the first one in full")
    parser.add_argument("--fills", nargs="*", choices=rivals, default=rivals, help="besides the river")
    parser.add_argument("--thresholds", nargs="+", type=float, default=list(THRESHOLDS))
    parser.add_argument("--kl", type=float, default=0.1, help="budget of the calibrated row (default 0.1 nats)")
    parser.add_argument(
        "--calibration-texts", type=int, default=60, help="for calibration; 0 leaves it out (default 60)"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="2 texts, 8 tokens, no calibration")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcome as JSON")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw the figures")
    parser.add_argument("--no-progress", dest="progress", action="store_false")
    options = parser.parse_args(arguments)
    if options.quick:
        options.texts, options.tokens, options.calibration_texts, options.thresholds = 2, 8, 0, [PAPER]
    return options


if __name__ == "__main__":
    sys.exit(main())
