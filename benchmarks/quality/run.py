"""What River does to quality: the paper's table of exit thresholds and quantizers.

    python -m benchmarks.quality
    python -m benchmarks.quality --model qwen-coder-1.5b --texts 2 --tokens 8 --quantizers hqq --json quality.json

Measured are KL and next-token agreement with full depth, tokens of greedy text that come out unchanged, depth and
speed: of the model's own greedy text and of held-out text, fed token by token. `benchmarks.tasks` solves problems.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping

import torch
from transformers import PreTrainedModel

from benchmarks import common
from benchmarks.texts import Texts, collect, exact_match
from river_compile.cli import shared
from river_compile.config import RiverConfig
from river_compile.evaluation.meter import Measured, Meter, Run, compiled
from river_compile.exits import CRITERIA
from tools import demo_models

THRESHOLDS = (0.7, 0.95, 0.97, 0.98)
FIRST_EXIT = 2
SIMILARITY = CRITERIA["similarity"]
HEADERS = ("", "KL own", "held-out", "agreement own", "held-out", "match", "depth", "tokens/s")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    shared.quiet()
    rows = measure(*demo_models.load_or_exit(options.model), options)
    outcome = {**common.setting("quality", options), "texts": options.texts, "tokens": options.tokens, "rows": rows}
    print(f"\n{options.model}: {options.texts} texts of {options.tokens} tokens of each kind")
    common.print_table(HEADERS, [[row["name"], *map(_shown, [*row.values()][1:])] for row in rows])
    common.write_outcome(outcome, options.json)
    return 0


def measure(
    model: PreTrainedModel,
    tokenizer: Callable,
    options: argparse.Namespace,
    base: Mapping[str, object] = {"group_size": 64},
) -> list[dict]:
    """Return a row for full depth, and of each quantizer for all twins and for each threshold.

    Args:
        model: in eval mode; it is compiled again and again.
        tokenizer: of the model.
        options: the command line's.
        base: options of the backend that all rows share.
    """
    rows: list[dict] = []
    texts: Texts | None = None
    references: list[list[Run]] = []  # full depth's, of the first quantizer: all rows are compared with them
    for quantizer in options.quantizers:
        torch._dynamo.reset()
        settings = {**base, "quantizer": quantizer, "threshold": SIMILARITY.never, "first_exit": 1}
        with compiled(model, settings), torch.inference_mode():
            texts = texts or collect(model, tokenizer, options.texts, options.tokens)
            meters = [
                Meter(model, SIMILARITY, kind, texts.context, options.progress, known)
                for kind, known in zip((texts.own, texts.held_out), references or (None, None), strict=True)
            ]
            if not references:
                references = [meter.references for meter in meters]
                rows.append(_row("full depth", meters, [m.full_depth(range(len(m.references))) for m in meters]))
            rows.append(_row(f"all 4-bit, {quantizer}", meters, [_all_twins(meter) for meter in meters]))
            for threshold in options.thresholds:
                name, rule = f"River, {quantizer}, threshold {threshold:g}", (threshold, FIRST_EXIT)
                found = [meter.measure(rule, range(len(meter.references)), name) for meter in meters]
                rows.append(_row(name, meters, found))
    return rows


def _all_twins(meter: Meter) -> Measured:
    texts = range(len(meter.references))
    return meter.measure_at([[0] * len(meter.references[i].steps) for i in texts], texts, "all 4-bit")


def _row(name: str, meters: list[Meter], measured: list[Measured]) -> dict:
    """Return what is printed of a configuration, measured on own and on held-out text."""
    (own, _), meter = measured, meters[0]
    kl = [statistics.fmean(m.text_losses("kl")) for m in measured]
    agreement = [1 - statistics.fmean(m.text_losses("agreement")) for m in measured]
    return {
        "name": name,
        **dict(zip(("kl_own", "kl_held_out", "agreement_own", "agreement_held_out"), kl + agreement, strict=True)),
        "match": exact_match(own.disagreement),
        "depth": own.mean_depth,
        "tokens_per_s": 1 / (meter.cost(own) * meter.seconds_full_depth),
    }


def _shown(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    quantizers = list(RiverConfig.choices("quantizer"))
    parser = common.command_line(__doc__, "model", "threads", "no-progress", "json")
    parser.add_argument("--texts", type=int, default=5, help="texts of each kind (default 5)")
    parser.add_argument("--tokens", type=int, default=24, help="tokens measured in each text (default 24)")
    parser.add_argument("--quantizers", nargs="+", choices=quantizers, default=quantizers, help="(all)")
    parser.add_argument("--thresholds", nargs="+", type=float, default=list(THRESHOLDS))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
