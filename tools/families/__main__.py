"""Tries the backend on every causal language model that transformers has, and writes `docs/models.md`.

    python -m tools.families --only llama mpt   # these, whatever is known of them; without: what has no result yet

Each type runs in its own process, killed when it takes too long. Results are kept in `docs/models.jsonl` as they come,
so a stopped run continues. The exit status is 1 where any type failed: wrong, crashed or hung.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from multiprocessing.connection import Connection

import torch
import transformers
from tqdm import tqdm
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from . import results
from .check import Outcome, check

TIMEOUT = 400


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.families", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="run these model types again")
    parser.add_argument("--again", action="store_true", help="run all model types again")
    parser.add_argument("--page", action="store_true", help="run nothing, write the page")
    parser.add_argument("--exact", action="store_true", help="compare exact mode's text too")
    parser.add_argument("--timeout", type=int, default=TIMEOUT, help="seconds for one type (default: %(default)s)")
    parser.add_argument("--verbose", action="store_true", help="print what the types print")
    chosen = parser.parse_args(arguments)
    known, sources = results.load(), results.sources()
    every = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    names = chosen.only or [n for n in every if chosen.again or n not in known or known[n].sources != sources]
    for name in tqdm([] if chosen.page else names, unit="type"):
        start = time.perf_counter()
        outcome = isolated(name, chosen.exact, chosen.timeout, chosen.verbose)
        outcome.seconds, outcome.sources = round(time.perf_counter() - start, 1), sources
        known[name] = outcome
        results.save(known)
        tqdm.write(f"{name:24} {outcome.result:18} {outcome.seconds:6.1f} s  {outcome.reason or outcome.exact}")
    results.write_page(known)
    failed = [name for name, outcome in known.items() if outcome.result == "failed"]
    print(f"{len(known)} model types, {len(failed)} failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


def isolated(name: str, exact: bool, timeout: float, verbose: bool) -> Outcome:
    """Check one type in its own process; a crash or a time-out is an outcome too."""
    context = multiprocessing.get_context("fork")  # (what is imported here need not be imported there)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, name, exact, verbose), daemon=True)
    process.start()
    sender.close()
    try:
        if receiver.poll(timeout):
            return receiver.recv()
        process.kill()
        return Outcome(name, reason=f"no end after {timeout} s")
    except EOFError:
        process.join()
        return Outcome(name, reason=f"the process died with status {process.exitcode}")
    finally:
        process.join()
        receiver.close()


def _child(sender: Connection, name: str, exact: bool, verbose: bool) -> None:
    if not verbose:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    sender.send(check(name, exact))


if __name__ == "__main__":
    sys.exit(main())
