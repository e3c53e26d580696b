"""What exact mode's passes cost: milliseconds of a draft step and of the backbone over several tokens, by rows.

    python -m benchmarks.passes
    python -m benchmarks.passes --model gemma3-270m --rows 1 8 --json passes.json

Passes run as in exact mode, on a static cache after a prompt of 64 tokens, all kinds in turn, so that each finds in the
caches what the others left. The least time of each counts. "backbone / one" is what a pass costs, divided by one of a
single token of each row: what drafts must make up for.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from river_compile.cli import shared
from tools import demo_models

PROMPT = 64
MAX_DRAFT = 15
STEPS_TO_WARM_UP = 3
NOT_THE_MODELS = ("logits_processor", "stopping_criteria", "synced_gpus", "streamer")  # arguments of a decode loop


def passes(model: Any, rows: int, repeats: int) -> dict[str, float]:
    """Return seconds by kind of pass: "draft", and each width of the backbone."""
    measured: dict[str, float] = {}

    def measure(model: Any, input_ids: Tensor, generation_config: Any, **arguments: Any) -> Tensor:
        from river_compile.decoding.kv_cache import KVCache
        from river_compile.decoding.session import Session
        from river_compile.exits import WHOLE
        from river_compile.upstream.transformers import cache_of

        given = {name: value for name, value in arguments.items() if name not in NOT_THE_MODELS}
        session = Session(model, given, KVCache(cache_of(given)), WHOLE)
        logits = session.prefill(input_ids, generation_config)
        session.allow_drafts(input_ids, logits, MAX_DRAFT, strict=False)
        ids = torch.cat([input_ids, input_ids[:, -1:]], 1)
        wide = {width: torch.cat([ids, ids[:, -1:].expand(-1, width - 1)], 1) for width in session.widths}

        def draft() -> None:
            session.draft_step(ids)
            session.rewind(1)

        def verify(width: int) -> None:
            session.verify(wide[width], width - 1)
            session.rewind(width)

        kinds: dict[str, Callable[[], None]] = {"draft": draft}
        kinds |= {str(width): (lambda width=width: verify(width)) for width in session.widths}
        for turn in range(repeats + STEPS_TO_WARM_UP):
            for kind, run in kinds.items():
                start = time.perf_counter()
                run()
                seconds = time.perf_counter() - start
                if turn >= STEPS_TO_WARM_UP:
                    measured[kind] = min(seconds, measured.get(kind, seconds))
        return input_ids

    ids = torch.randint(1000, 10_000, (rows, PROMPT), generator=torch.Generator().manual_seed(0))
    with model._optimize_model_for_decode():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            custom_generate=measure,
            cache_implementation="static",
            max_new_tokens=PROMPT,
            do_sample=False,
        )
    return measured


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = common.command_line(__doc__, "model", "dtype", "threads", "repeats", "json", repeats=12)
    rows = {"type": common.number(1), "default": [1, 2, 4, 8]}
    parser.add_argument("--rows", nargs="+", metavar="N", help="of a batch (1 2 4 8)", **rows)
    parser.add_argument("--twins", metavar="DIR", help="packed twins, as `river quantize` writes them")
    options = parser.parse_args(arguments)
    seconds = common.attempted(_measure, options)
    if seconds is None:
        return 1
    outcome = {**common.setting("passes", options), "seconds": seconds}
    common.print_setting(outcome)
    kinds = list(next(iter(seconds.values())))
    print("\nmilliseconds (backbone / one)")
    common.print_table(
        ["rows", *(kind if kind == "draft" else f"{kind} tokens" for kind in kinds)],
        [[rows, *(_cell(kind, of) for kind in kinds)] for rows, of in seconds.items()],
    )
    common.write_outcome(outcome, options.json)
    return 0


def _measure(options: argparse.Namespace) -> dict[int, dict[str, float]]:

    torch.set_num_threads(options.threads)
    shared.quiet()
    model, _ = demo_models.load(options.model, dtype=options.dtype)
    model.compile(backend="river", options={"twins": options.twins})
    return {rows: passes(model, rows, options.repeats) for rows in options.rows}


def _cell(kind: str, seconds: dict[str, float]) -> str:
    return f"{1000 * seconds[kind]:.1f} ({seconds[kind] / seconds['1']:.2f})"


if __name__ == "__main__":
    sys.exit(main())
