"""Chooses threshold and first exit within a quality budget, and shows their effect on speed.

    python -m examples.tune_exit
    python -m examples.tune_exit --kl 0.1 --model smollm2 --save exit_rule.json --plot calibration.png
    python -m examples.tune_exit --check 64     # ... and measure unseen texts, and the speed of 64 new tokens

The texts are passages of Python's own documentation of the language, one from each topic, so that nothing is
downloaded. For a guarantee about your use, put your own texts in their place.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

import river_compile
from river_compile.cli import shared
from river_compile.cli.shared import topics
from river_compile.exits import forced_depth
from river_compile.reporting import timing
from tools import demo_models

PROMPT = "Explain how a refrigerator works."


def check(model, tokenizer, found, texts: list[str], new_tokens: int, tokens: int) -> list[str]:
    """Measure an exit rule again: its quality on other texts, and its speed compared with full depth."""
    from river_compile.evaluation.meter import Meter, compiled
    from river_compile.exits import CRITERIA

    rows = [tokenizer(text)["input_ids"][: 16 + tokens] for text in texts]
    samples = [torch.tensor([row]) for row in rows if len(row) == 16 + tokens]
    criterion = CRITERIA[found.base_options["criterion"]]
    with compiled(model, {**found.options, "first_exit": 1}), torch.inference_mode():
        meter = Meter(model, criterion, samples, 16, progress=True)
        unseen = meter.measure((found.chosen.threshold, found.chosen.first_exit), range(len(samples)), "unseen texts")
    kl = statistics.fmean(unseen.text_losses("kl"))
    agreement = 1 - statistics.fmean(unseen.text_losses("agreement"))
    torch._dynamo.reset()
    model.compile(backend="river", options=found.options)
    ids = shared.encode(tokenizer, PROMPT)
    speeds: dict[str, list[float]] = {"tuned": [], "full depth": []}
    for turn in range(4):  # in turns, and the first compiles
        for name, depth in (("tuned", None), ("full depth", found.num_blocks)):
            with forced_depth(depth):
                run = timing.generate(model, ids, new_tokens)
            if turn:
                speeds[name].append(run.decode_tokens_per_s)
    ours, full = (statistics.median(speeds[name]) for name in ("tuned", "full depth"))
    return [
        f"  unseen     KL {kl:.4f} nats per token, agreement {agreement:.1%}, on {len(samples)} other texts",
        f"  generating {ours:.1f} tokens/s, full depth {full:.1f}: {ours / full:.2f} times",
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description="Finds the fastest exit rule within a quality budget.")
    parser.add_argument("--model", default="smollm2", help=f"{', '.join(demo_models.MODELS)} or a model folder")
    parser.add_argument("--kl", type=float, default=0.1, help="budget: mean KL in nats per token (default 0.1)")
    parser.add_argument("--criterion", default="confidence", help="exit criterion (default confidence; docs/modes.md)")
    parser.add_argument("--texts", type=int, default=60, help="how many texts to use (default 60)")
    parser.add_argument("--tokens", type=int, default=8, help="tokens measured in each text (default 8)")
    parser.add_argument("--check", type=int, metavar="N", help="measure other texts, and the speed of N new tokens")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the exit rule as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the candidates as a PNG")
    options = parser.parse_args(arguments)
    shared.quiet()

    try:
        model, tokenizer = demo_models.load(options.model)
        start = time.perf_counter()
        found = river_compile.tune_exit(
            model,
            tokenizer,
            topics()[: options.texts],
            kl=options.kl,
            criterion=options.criterion,
            tokens=options.tokens,
        )
    except (demo_models.ModelUnavailable, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{found}\n  took       {time.perf_counter() - start:.0f} s")
    if options.check:
        print("\n".join(check(model, tokenizer, found, topics()[options.texts :], options.check, options.tokens)))
    print(f'\nmodel.compile(backend="river", options={found.options})')
    if options.save:
        print(f"saved to {found.save(options.save)}")
    if options.plot:
        from examples.plots import plot_calibration

        print(f"drawn to {plot_calibration(found, options.plot)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
