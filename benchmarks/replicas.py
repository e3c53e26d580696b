"""What N processes hold that serve the same model on one machine: all started together, nothing made before.

    python -m benchmarks.replicas
    python -m benchmarks.replicas --processes 8 --model DIR --json replicas.json
    python -m benchmarks.replicas --private            # without saved twins: each quantizes its own

All start with empty caches and no saved twins: one quantizes, compiles the kernels and what Inductor makes,
and the others wait for it. When all have generated, each says what it holds: RSS, its share of it (PSS), and of the
mapped twins and weights both. The kernels' cache and Inductor's are folders of this run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path

from benchmarks import common, memory
from river_compile.cli import shared
from tools import demo_models

PROMPT = "Explain in a few sentences why the sky is blue."
MODULE = "benchmarks.replicas"
NAMES = ("rss", "pss", "anonymous")


def start(folder: str, twins: str, dtype: str, new_tokens: int) -> dict:
    """Load a model and generates; return the tokens and the seconds since the beginning."""
    began = time.perf_counter()
    from transformers import AutoTokenizer

    import river_compile
    from river_compile.reporting.timing import generate

    shared.quiet()
    saved = {"twins": twins, "on_missing_twins": "save"} if twins else {}
    model = river_compile.from_pretrained(folder, dtype=dtype, **saved)
    prompt = shared.encode(AutoTokenizer.from_pretrained(folder), PROMPT)
    made = generate(model, prompt, new_tokens, static_cache=False)
    _alive.append(model)
    return {"tokens": made.tokens, "ready_s": time.perf_counter() - began}


_alive: list[object] = []  # the model stays until the process ends


def holds(folder: str, twins: str) -> dict:
    """Return bytes of the process, of its mapped twins and of its mapped weights."""
    mapped = memory.of_file(Path(twins) / "twins.safetensors") if twins else dict.fromkeys(NAMES, 0)
    files = [memory.of_file(file) for file in Path(folder).glob("*.safetensors")]
    weights = {name: sum(file[name] for file in files) for name in NAMES}
    return {"process": memory.of_process(), "twins": mapped, "weights": weights}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = common.command_line(__doc__, "model", "dtype", "new-tokens", "threads", "json", "worker", new_tokens=16)
    parser.set_defaults(threads=1)
    parser.add_argument(
        "--processes", type=common.number(1), default=4, help="processes to start together (%(default)s)"
    )
    parser.add_argument("--private", action="store_true", help="without saved twins")
    options: argparse.Namespace = parser.parse_args(arguments)
    if options.worker:
        common.serve({"start": start, "holds": holds})
        return 0
    outcome = common.attempted(_measure, options)
    if outcome is None:
        return 1
    _show(outcome)
    common.write_outcome(outcome, options.json)
    return 0


def _measure(options: argparse.Namespace) -> dict:
    folder = demo_models.resolve(options.model)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        caches = {
            "TORCHINDUCTOR_CACHE_DIR": str(Path(scratch) / "inductor"),
            "RIVER_COMPILE_HOME": str(Path(scratch) / "kernels"),
        }
        twins = "" if options.private else str(Path(scratch) / "twins")
        workers = [
            stack.enter_context(closing(common.Worker(MODULE, f"process {i + 1}", options.threads, caches)))
            for i in range(options.processes)
        ]
        for worker in workers:
            worker.tell("start", folder=folder, twins=twins, dtype=options.dtype, new_tokens=options.new_tokens)
        started = [worker.answer() for worker in workers]
        held = [worker.ask("holds", folder=folder, twins=twins) for worker in workers]
    if any(process["tokens"] != started[0]["tokens"] for process in started):
        raise common.WorkerFailed("the processes generated different texts")
    return {
        "benchmark": "replicas",
        "model": str(options.model),
        "private": options.private,
        "processes": [{"ready_s": s["ready_s"], **h} for s, h in zip(started, held, strict=True)],
    }


def _show(outcome: dict) -> None:
    rows = [[str(i + 1), process["ready_s"], *_mebibytes(process)] for i, process in enumerate(outcome["processes"])]
    sums = [sum(row[column] for row in rows) for column in range(2, len(rows[0]))]
    heads = ["RSS", "PSS", "own", "twins RSS", "twins PSS", "weights RSS", "weights PSS"]
    common.print_table(["process", "ready, s", *(f"{head}, MiB" for head in heads)], [*rows, ["all", None, *sums]])


def _mebibytes(process: dict) -> list[int]:
    whole, twins, weights = (process[what] for what in ("process", "twins", "weights"))
    found = [whole["rss"], whole["pss"], whole["anonymous"]]
    found += [part[name] for part in (twins, weights) for name in ("rss", "pss")]
    return [round(size / 2**20) for size in found]


if __name__ == "__main__":
    sys.exit(main())
