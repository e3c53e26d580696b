"""What a start costs: seconds from the call of `generate`, and memory, without a compile cache and with what it keeps.

    python -m benchmarks.start
    python -m benchmarks.start --model DIR --rows plain exact --json start.json

Rows, each in separate processes:

    plain           transformers
    exact, fast     `river_compile.accelerate`, cold: the compile cache is empty: traces the model, quantizes its twins
    ... again       the same in another process, which finds both in the compile cache
    llama_cpp       llama.cpp on the GGUF file that the model was made of, where its Python package is installed

A process asks for a text, and again while exact mode packs its twins (*meanwhile*, tokens/s, ten times at most), waits
until they are there (*ready*), and asks three times more. The last time is steady; what the others take longer is the
row's *start*. A row *pays* from so many tokens in a process on for which plain, its own start included, takes as long.
Peak RSS holds mapped files (weights, twins, libraries), whose pages the system shares and can drop; "own" is the most
that no file backed at a time. With `--busy` the process asks all the time until the twins are there. The C++ kernels
are compiled before the first row.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from contextlib import closing

from benchmarks import common, llama_cpp_runner, memory
from river_compile.cli import shared
from tools import demo_models

PROMPT = "Explain in a few sentences why the sky is blue."
ROWS = ("plain", "exact", "fast", "llama_cpp")
MODULE = "benchmarks.start"
_COLUMNS = "first_token_s", "second_token_s", "ready_s", "meanwhile_tokens_per_s", "start_s", "tokens_per_s"
_CALLS = 3  # at the end
_MEANWHILE = 10


def start(folder: str, row: str, dtype: str, tokens: int, busy: bool) -> dict:
    """Load a model and generate; return seconds from the calls of `generate`, and memory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import river_compile
    from river_compile.reporting.timing import decode_rate, generate

    shared.quiet()
    with memory.Peak() as own:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        loaded = common.peak_rss_bytes()
        if row != "plain":
            river_compile.accelerate(model, row)
        prompt = shared.encode(AutoTokenizer.from_pretrained(folder), PROMPT)

        def call() -> tuple[float, ...]:
            return generate(model, prompt, tokens, static_cache=False).times

        def packs() -> bool:
            return row != "plain" and river_compile.report(model).to_dict()["packing_in_background"] is not None

        began = time.perf_counter()
        calls, meanwhile = [call()], []
        while packs() and (busy or len(meanwhile) < _MEANWHILE):
            meanwhile.append(call())
        while packs():
            time.sleep(0.05)
        ready = time.perf_counter() - began
        while row != "plain" and river_compile.report(model).to_dict()["packing_for_later"]:
            time.sleep(0.05)
        calls += [*meanwhile, *(call() for _ in range(_CALLS))]
    return {
        **_seconds(calls),
        "ready_s": ready if meanwhile else calls[0][1],
        "meanwhile_tokens_per_s": statistics.median(map(decode_rate, meanwhile)) if meanwhile else None,
        "tokens_per_s": decode_rate(calls[-1]),
        "loaded_bytes": loaded,
        "peak_rss_bytes": common.peak_rss_bytes(),
        "own_bytes": own.bytes,
    }


def start_llama_cpp(job: dict) -> dict:
    """The same for llama.cpp."""
    from river_compile.reporting.timing import decode_rate

    runner = llama_cpp_runner.build(job)
    calls = [tuple(runner.seconds(job["new_tokens"])) for _ in range(1 + _CALLS)]
    peak = common.peak_rss_bytes()
    return {**_seconds(calls), "tokens_per_s": decode_rate(calls[-1]), "peak_rss_bytes": peak}


def _seconds(calls: list[tuple[float, ...]]) -> dict:
    steady = calls[-1][-1]
    late = sum(max(call[-1] - steady, 0.0) for call in calls[:-1])
    return {"first_token_s": calls[0][0], "second_token_s": calls[0][1], "start_s": late}


def pays_from(row: dict, plain: dict) -> float:
    """Return the tokens of a process from which a row takes less time than plain; infinite if it never does."""
    saved = 1 / plain["tokens_per_s"] - 1 / row["tokens_per_s"]
    return max(row["start_s"] - plain["start_s"], 0.0) / saved if saved > 0 else math.inf


def compile_kernels() -> dict:
    """Compile the C++ kernels where the cache does not have them and there is a compiler."""
    from river_compile.kernels.native import load
    from river_compile.kernels.native.build import CannotBuild

    try:
        load.load()
    except CannotBuild as error:
        return {"built": False, "why": str(error)}
    return {"built": True}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = common.command_line(
        __doc__, "model", "dtype", "new-tokens", "threads", "json", "record", "worker", new_tokens=48
    )
    parser.add_argument("--busy", action="store_true", help="ask without a pause until the twins are packed")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[*ROWS], help="which rows (all)")
    options: argparse.Namespace = parser.parse_args(arguments)
    if options.worker:
        handlers = {"start": start, "start_llama_cpp": start_llama_cpp, "compile_kernels": compile_kernels}
        common.serve(handlers)
        return 0
    rows = common.attempted(_measure, options)
    if rows is None:
        return 1
    plain = rows.get("plain")
    for row in rows.values():
        row["pays_from_tokens"] = None if plain in (None, row) else pays_from(row, plain)
    outcome = {**common.setting("start", options), "rows": rows}
    common.print_setting(outcome)
    common.print_table(
        [
            *("", "first token, s", "second, s", "ready, s", "meanwhile", "start, s", "tokens/s", "pays from"),
            *("peak RSS, MiB", "own, MiB"),
        ],
        [
            [
                name,
                *(row.get(key) for key in _COLUMNS),
                None if row["pays_from_tokens"] in (None, math.inf) else round(row["pays_from_tokens"]),
                *(row.get(key) and round(row[key] / 2**20) for key in ("peak_rss_bytes", "own_bytes")),
            ]
            for name, row in rows.items()
        ],
    )
    common.write_outcome(outcome, options.json)
    common.record(outcome, options)
    return 0


def _measure(options: argparse.Namespace) -> dict[str, dict]:
    folder, rows = demo_models.resolve(options.model), {}
    with closing(common.Worker(MODULE, "the kernels' compiler", options.threads)) as worker:
        worker.ask("compile_kernels")
    given = {"folder": folder, "dtype": options.dtype, "tokens": options.new_tokens, "busy": options.busy}
    for row in options.rows:
        if row == "llama_cpp":
            rows |= _llama_cpp(options, folder)
            continue
        with tempfile.TemporaryDirectory() as cache:
            for name in (row,) if row == "plain" else (row, f"{row}, again"):
                print(f"{name} ...", file=sys.stderr)
                with closing(
                    common.Worker(MODULE, name, options.threads, {"RIVER_COMPILE_CACHE_DIR": cache})
                ) as worker:
                    rows[name] = worker.ask("start", row=row, **given)
    return rows


def _llama_cpp(options: argparse.Namespace, folder: str) -> dict[str, dict]:
    reason = llama_cpp_runner.why_not(None, str(options.model), 1)
    if reason:
        print(f"llama_cpp is left out: {reason}", file=sys.stderr)
        return {}
    gguf = str(llama_cpp_runner.gguf_file(None, options.model))
    job = {"folder": folder, "gguf": gguf, "prompt": PROMPT, "prompts": [], "new_tokens": options.new_tokens}
    with closing(common.Worker(MODULE, "llama_cpp", options.threads)) as worker:
        return {"llama_cpp": worker.ask("start_llama_cpp", job={**job, "threads": options.threads})}


if __name__ == "__main__":
    sys.exit(main())
