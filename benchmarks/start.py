"""What a start costs: seconds to the first two tokens and peak memory, with and without packed twins on disk.

    python -m benchmarks.start
    python -m benchmarks.start --model DIR --json start.json

Rows, each a process of its own with a cold Inductor cache:

    plain      from_pretrained alone
    packing    river_compile.load: the twins are packed
    artifact   river_compile.load(artifact=...): the twins are read

The second token is the first one that uses twins. Peak memory is the process's resident set, mapped files included.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

from benchmarks import common
from river_compile.cli import models

PROMPT = "Explain in a few sentences why the sky is blue."
ROWS = ("plain", "packing", "artifact")


def start(folder: str, row: str, artifact: str, dtype: str) -> dict:
    """Loads a model and generates two tokens; returns seconds since the beginning, and peak memory."""
    began = time.perf_counter()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import river_compile
    from river_compile.cli.timing import generate

    models.quiet()
    if row == "plain":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    else:
        given = {"artifact": artifact} if row == "artifact" else {}
        model = river_compile.load(folder, loading={"dtype": dtype}, **given)
    loaded = time.perf_counter() - began
    prompt = models.encode(AutoTokenizer.from_pretrained(folder), PROMPT)
    asked = time.perf_counter() - began
    times = generate(model, prompt, 8, stop_after=2, static_cache=False).times
    if row == "packing":
        river_compile.save(model, artifact)
    return {
        "loaded_s": loaded,
        "first_token_s": asked + times[0],
        "second_token_s": asked + times[1],
        "peak_rss_bytes": common.peak_rss_bytes(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = common.command_line(__doc__, "model", "dtype", "threads", "json", "worker")
    options: argparse.Namespace = parser.parse_args(arguments)
    if options.worker:
        common.serve({"start": start})
        return 0
    rows = {}
    try:
        folder = models.resolve(options.model)
        with tempfile.TemporaryDirectory() as scratch:
            for row in ROWS:
                with closing(common.Worker("benchmarks.start", row, options.threads)) as worker:
                    artifact = str(Path(scratch) / "twins")
                    rows[row] = worker.ask("start", folder=str(folder), row=row, artifact=artifact, dtype=options.dtype)
    except (ValueError, models.ModelUnavailable, common.WorkerFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    common.print_table(
        ["", "loaded, s", "first token, s", "second token, s", "peak RSS, MiB"],
        [
            [name, r["loaded_s"], r["first_token_s"], r["second_token_s"], round(r["peak_rss_bytes"] / 2**20)]
            for name, r in rows.items()
        ],
    )
    common.write_outcome({"benchmark": "start", "model": str(options.model), "rows": rows}, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
