"""Shows the effect of thresholds on one answer: speed, depth, and where it first differs from the plain one.

    python -m examples.compare_thresholds
    python -m examples.compare_thresholds --criterion confidence --thresholds 0.5 1 2 --prompt "Explain rainbows."

The model is compiled once and every threshold is set for a block of code. One prompt says little about quality:
`examples.tune_exit` finds a threshold within a budget, `benchmarks.quality` measures.
"""

from __future__ import annotations

import argparse
import sys
from itertools import takewhile

from river_compile.cli import shared
from tools import demo_models

PROMPT = "Explain in a few sentences why the sky is blue."
THRESHOLDS = {
    "similarity": [0.99, 0.95, 0.9, 0.7],
    "confidence": [0.1, 0.5, 1.0, 2.0],
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description="Compares thresholds on one prompt.")
    parser.add_argument("--model", default="smollm2", help=f"{', '.join(demo_models.MODELS)} or a model folder")
    parser.add_argument("--prompt", default=PROMPT, help="the question (default: %(default)s)")
    parser.add_argument("--criterion", default="similarity", choices=sorted(THRESHOLDS))
    parser.add_argument("--thresholds", type=float, nargs="+", help="from careful to bold (default: four)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens to generate (default: %(default)s)")
    options = parser.parse_args(arguments)
    shared.quiet()
    import river_compile
    from river_compile.exits import forced_depth, forced_threshold
    from river_compile.reporting.timing import generate

    model, tokenizer = demo_models.load_or_exit(options.model)
    ids = shared.encode(tokenizer, options.prompt)
    model.compile(backend="river", options={"criterion": options.criterion})
    with forced_threshold(THRESHOLDS[options.criterion][-1], first_exit=2):
        generate(model, ids, options.new_tokens, stop_after=3)  # packs and compiles
    with forced_depth(model.config.num_hidden_layers):
        plain = generate(model, ids, options.new_tokens)

    print(f"{'threshold':>10} {'tokens/s':>9} {'speedup':>8} {'mean depth':>11}  same as plain until")
    print(f"{'full depth':>10} {plain.decode_tokens_per_s:9.1f} {1:8.2f} {model.config.num_hidden_layers:11.1f}")
    for threshold in options.thresholds or THRESHOLDS[options.criterion]:
        with forced_threshold(threshold, first_exit=2), river_compile.trace() as trace:
            run = generate(model, ids, options.new_tokens)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(run.tokens, plain.tokens, strict=True)))
        until = (
            "the end" if same == len(plain.tokens) else repr(tokenizer.decode(plain.tokens[max(0, same - 6) : same]))
        )
        speedup = run.decode_tokens_per_s / plain.decode_tokens_per_s
        print(
            f"{threshold:10g} {run.decode_tokens_per_s:9.1f} {speedup:8.2f} {trace.mean_depth:11.1f}"
            f"  token {same}: {until}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
