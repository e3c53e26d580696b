"""Runs random cases for a given time: ``python -m tools.soak --minutes 60`` (or ``make soak``).

    text      families, options, caches, batches, sampling and orders of calls against the plain model
    threads   threads that generate with one model or with several
    serving   clients of a server, some of whom leave, ask nonsense or ask too much

Prints the seed, and each failure with the command that runs it again. The exit status is 1 where anything failed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

from tools.soak import serving, text, threads
from tools.soak.cases import Kind, attempt, soak

KINDS: dict[str, tuple[Kind, float]] = {
    "text": (text, 0.5),
    "threads": (threads, 0.25),
    "serving": (serving, 0.25),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.soak", description="Runs random cases until it is told.")
    parser.add_argument("--minutes", type=float, default=60, help="how long; default 60")
    parser.add_argument("--seed", type=int, help="of all cases; default: a random one, which is printed")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS], help="which kinds; default all")
    parser.add_argument("--failures", type=Path, default=Path("soak"), help="folder for failures; default ./soak")
    parser.add_argument("--again", type=Path, metavar="FILE", help="run the case of a failure again, nothing else")
    options = parser.parse_args(arguments)
    if options.again is not None:
        case = json.loads(options.again.read_text(encoding="utf-8"))
        outcome, said = attempt(KINDS[case["kind"]][0], case)
        print(said or outcome, end="" if said else "\n")
        return int(bool(said))
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    tally = soak({name: KINDS[name] for name in options.kinds}, seed, options.minutes * 60, options.failures)
    print(tally)
    return int(bool(tally.failures))


if __name__ == "__main__":
    sys.exit(main())
