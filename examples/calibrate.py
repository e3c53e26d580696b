"""Chooses threshold and first exit for a promised quality, and generates with them.

    python examples/calibrate.py
    python examples/calibrate.py --kl 0.1 --model smollm2 --save calibration.json --plot calibration.png

The texts are passages of Python's own documentation of the language, one from each topic, so that nothing is
downloaded. For a promise about your use, put your own texts in their place.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds only its own folder

from examples import models


def topics() -> list[str]:
    """Returns a passage of each topic that Python's `help()` knows, without its heading; two topics may share one."""
    from pydoc_data.topics import topics

    return list(dict.fromkeys(text.partition("\n\n")[2] for text in topics.values()))


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(description="Finds the exit rule of least cost that keeps a promised quality.")
    parser.add_argument("--model", default="smollm2", help=f"{', '.join(models.MODELS)} or a model folder")
    parser.add_argument("--kl", type=float, default=0.1, help="budget: mean KL in nats per token (default 0.1)")
    parser.add_argument("--texts", type=int, default=60, help="how many texts to use (default 60)")
    parser.add_argument("--tokens", type=int, default=12, help="tokens measured in each text (default 12)")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the calibration as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the candidates as a PNG")
    options = parser.parse_args(arguments)
    models.quiet()
    import river_compile

    try:
        model, tokenizer = models.load(options.model)
        start = time.perf_counter()
        found = river_compile.calibrate(
            model, tokenizer, topics()[: options.texts], {"kl": options.kl}, tokens=options.tokens
        )
    except (models.ModelUnavailable, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{found}\n  took       {time.perf_counter() - start:.0f} s")
    print(f'\nmodel.compile(backend="river", options={found.options})')
    if options.save:
        print(f"saved to {found.save(options.save)}")
    if options.plot:
        print(f"drawn to {found.plot(options.plot)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
