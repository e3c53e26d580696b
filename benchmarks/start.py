"""What a start costs: seconds to the first two tokens, and memory, with and without packed twins on disk.

    python -m benchmarks.start
    python -m benchmarks.start --model DIR --json start.json

Rows, each a process of its own:

    plain      from_pretrained alone
    packing    river_compile.load, with an empty Inductor cache: the twins are packed
    artifact   river_compile.load(artifact=...), with an empty Inductor cache: the twins are mapped
    restart    the same again, with the Inductor cache that "artifact" left

Peak RSS holds mapped files (weights, twins, libraries), whose pages the system shares and can drop; "own" is what is
left at the end that no file backs. Seconds count from before the libraries are imported; those of the next prompt, of
another length, from when it is asked for to its first token. The text is exact mode's, the C++ kernels come from the
cache, where they are compiled before the first row.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

from benchmarks import common, memory
from river_compile.cli import models

PROMPT = "Explain in a few sentences why the sky is blue."
ANOTHER = "Write a function that adds up the digits of a number, and say what it returns for 1,984."
ROWS = ("plain", "packing", "artifact", "restart")
MODULE = "benchmarks.start"


def start(folder: str, row: str, artifact: str, dtype: str) -> dict:
    """Loads a model and generates two tokens; returns seconds since the beginning, and memory."""
    began = time.perf_counter()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import river_compile
    from river_compile.cli.timing import generate

    models.quiet()
    if row == "plain":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    else:
        model = river_compile.load(folder, artifact=artifact, loading={"dtype": dtype}, on_missing_artifact="save")
    loaded = time.perf_counter() - began
    prompt = models.encode(AutoTokenizer.from_pretrained(folder), PROMPT)
    asked = time.perf_counter() - began
    times = generate(model, prompt, 8, stop_after=2, static_cache=False).times
    another = models.encode(AutoTokenizer.from_pretrained(folder), ANOTHER)
    next_times = generate(model, another, 8, stop_after=2, static_cache=False).times
    return {
        "loaded_s": loaded,
        "first_token_s": asked + times[0],
        "second_token_s": asked + times[1],
        "next_prompt_s": next_times[0],
        "peak_rss_bytes": common.peak_rss_bytes(),
        "own_bytes": memory.of_process()["anonymous"],
        "weights_mapped_bytes": sum(memory.of_file(file)["rss"] for file in Path(folder).glob("*.safetensors")),
        "twins_mapped_bytes": memory.of_file(Path(artifact) / "twins.safetensors")["rss"],
    }


def compile_kernels() -> dict:
    """Compiles the C++ kernels where the cache does not have them and there is a compiler."""
    from river_compile.kernels.native import load
    from river_compile.kernels.native.build import CannotBuild

    try:
        load.load()
    except CannotBuild as error:
        return {"built": False, "why": str(error)}
    return {"built": True}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = common.command_line(__doc__, "model", "dtype", "threads", "json", "worker")
    options: argparse.Namespace = parser.parse_args(arguments)
    if options.worker:
        common.serve({"start": start, "compile_kernels": compile_kernels})
        return 0
    rows = common.attempted(_measure, options)
    if rows is None:
        return 1
    common.print_table(
        [
            *("", "loaded, s", "first token, s", "second token, s", "next prompt, s"),
            *("peak RSS, MiB", "own, MiB", "twins mapped, MiB"),
        ],
        [
            [
                name,
                *(row[f"{what}_s"] for what in ("loaded", "first_token", "second_token", "next_prompt")),
                *(round(row[f"{what}_bytes"] / 2**20) for what in ("peak_rss", "own", "twins_mapped")),
            ]
            for name, row in rows.items()
        ],
    )
    common.write_outcome({"benchmark": "start", "model": str(options.model), "rows": rows}, options.json)
    return 0


def _measure(options: argparse.Namespace) -> dict[str, dict]:
    folder = str(models.resolve(options.model))
    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        with closing(common.Worker(MODULE, "the kernels' compiler", options.threads)) as worker:
            worker.ask("compile_kernels")
        artifact, inductor = (str(Path(scratch) / name) for name in ("twins", "inductor"))
        for row in ROWS:
            caches = {"TORCHINDUCTOR_CACHE_DIR": inductor} if row in ("artifact", "restart") else None
            with closing(common.Worker(MODULE, row, options.threads, caches)) as worker:
                given = artifact if row != "plain" else ""
                rows[row] = worker.ask("start", folder=folder, row=row, artifact=given, dtype=options.dtype)
    return rows


if __name__ == "__main__":
    sys.exit(main())
