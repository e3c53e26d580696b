"""What a start costs: seconds from the call of `generate`, memory and disk, without a compile cache and with one.

    python -m benchmarks.start --model DIR --rows plain exact --json start.json

Each row is a process; "again" is another one that finds what the first one stored. It asks for texts while exact mode
packs its twins ("meanwhile"). "Drafts" ends the first call with quick ones, "ready" is when the final ones are there.
Then it asks each prompt twice; the last time is steady, what earlier ones take longer is the row's "start". It "pays
from" so many tokens on, for which plain takes as long. "Own" is the most memory at a time that no file backs, "disk"
the compile cache. C++ kernels compile first.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from benchmarks import common, decode_rows, memory, prompt_sets
from benchmarks.prompt_sets import ALL, Prompt, spread
from river_compile.cli import shared
from tools import demo_models
from tools.figures import KERNELS

ROWS = ("plain", "exact", "fast", "llama_cpp")
MODULE = "benchmarks.start"
_COLUMNS = "first_token_s", "second_token_s", "drafts_s", "ready_s", "meanwhile_tokens_per_s", "start_s"
_MEANWHILE = 10

Times = tuple[float, ...]  # seconds from a call to each new token
Calls = list[tuple[int, Times]]  # with the numbers of their prompts


def start(folder: str, row: str, dtype: str, prompts: list[list[int]], tokens: int) -> dict:
    """Load a model and generate; return the times of the calls of `generate`, and memory."""
    import torch
    from transformers import AutoModelForCausalLM

    import river_compile
    from river_compile.reporting.timing import decode_rate, generate

    shared.quiet()
    with memory.Peak() as own:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        loaded = common.peak_rss_bytes()
        if row != "plain":
            river_compile.accelerate(model, row, **({"threshold": 0.7} if row == "fast" else {}))

        def call(number: int) -> Times:
            return generate(model, torch.tensor([prompts[number]]), tokens, static_cache=False).times

        def says(key: str) -> object:
            return row != "plain" and river_compile.report(model).to_dict()[key]

        def packs() -> bool:
            return row != "plain" and says("packing_in_background") is not None

        began, drafts = time.perf_counter(), None
        early: Calls = [(0, call(0))]
        while packs() and len(early) <= _MEANWHILE:
            early.append((len(early) % len(prompts), call(len(early) % len(prompts))))
            if drafts is None and says("drafts_with_quick_twins"):
                drafts = time.perf_counter() - began
        while packs():
            time.sleep(0.05)
        ready = time.perf_counter() - began
        while row != "plain" and river_compile.report(model).to_dict()["packing_for_later"]:
            time.sleep(0.05)
        early += [(number, call(number)) for number in range(len(prompts))]  # (another cache length takes one call)
        steady = [call(number) for number in range(len(prompts))]
    meanwhile = [times for _, times in early[1 : -len(prompts)]]
    return {
        "early": early,
        "steady": steady,
        "drafts_s": drafts,
        "ready_s": ready if meanwhile else early[0][1][1],
        "meanwhile_tokens_per_s": statistics.median(map(decode_rate, meanwhile)) if meanwhile else None,
        "loaded_bytes": loaded,
        "peak_rss_bytes": common.peak_rss_bytes(),
        "own_bytes": own.bytes,
    }


def start_llama_cpp(ask: Callable[..., dict], prompts: list[list[int]], job: dict) -> dict:
    """The same for llama.cpp, whose worker `ask` asks."""
    ask("prepare", prompts=[], **job)

    def call(number: int) -> Times:
        return tuple(ask("generate", ids=prompts[number], new_tokens=job["new_tokens"])["times"])

    early: Calls = [(0, call(0))]
    return {"early": early, "steady": [call(number) for number in range(len(prompts))], **ask("facts")}


def _row(said: dict, prompts: list[Prompt]) -> dict:
    """Return a row's numbers from the times of its calls."""
    from river_compile.reporting.timing import decode_rate

    early, steady = said.pop("early"), said.pop("steady")
    cells = prompt_sets.by_kind(prompts, {"tokens_per_s": [decode_rate(times) for times in steady]})
    whole = next(iter(cells.values()))[ALL]
    return {**said, **_seconds(early, [times[-1] for times in steady]), **whole, "contexts": cells}


def _seconds(early: Calls, steady: list[float]) -> dict:
    """Return the times of the first call, and what all early ones took longer than the steady ones of their prompts."""
    late = sum(max(times[-1] - steady[number], 0.0) for number, times in early)
    return {"first_token_s": early[0][1][0], "second_token_s": early[0][1][1], "start_s": late}


def pays_from(row: dict, plain: dict) -> float:
    """Return the tokens of a process from which a row takes less time than plain; infinite if it never does."""
    saved = 1 / plain["tokens_per_s"] - 1 / row["tokens_per_s"]
    return max(row["start_s"] - plain["start_s"], 0.0) / saved if saved > 0 else math.inf


def compile_kernels() -> dict:
    """Compile the C++ kernels where the cache does not have them and there is a compiler; return the seconds."""
    from river_compile.kernels.files import cache_folder
    from river_compile.kernels.native import load
    from river_compile.kernels.native.build import CannotBuild

    began = time.perf_counter()
    try:
        load.load()
    except CannotBuild as error:
        return {"built": False, "why": str(error)}
    return {"built": True, "build_s": time.perf_counter() - began, "disk_bytes": disk_bytes(cache_folder())}


def disk_bytes(folder: str | Path) -> int:
    """Return the bytes of the files below a folder."""
    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = common.command_line(
        __doc__, "model", "dtype", "new-tokens", "threads", "json", "record", "worker", new_tokens=48
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[*ROWS], help="which rows (all)")
    prompt_sets.add_arguments(parser)
    options: argparse.Namespace = parser.parse_args(arguments)
    if options.worker:
        common.serve({"start": start, "compile_kernels": compile_kernels})
        return 0
    found = common.attempted(_measure, options)
    if found is None:
        return 1
    rows, kernels = found
    plain = rows.get("plain")
    for row in rows.values():
        row["pays_from_tokens"] = None if plain in (None, row) else pays_from(row, plain)
    outcome = {**common.setting("start", options), "rows": rows | ({KERNELS: kernels} if kernels else {})}
    common.print_setting(outcome)
    sizes = ("peak_rss_bytes", "own_bytes", "disk_bytes")
    heads = [
        "",
        "first token, s",
        "second, s",
        "drafts, s",
        "ready, s",
        "meanwhile",
        "start, s",
        "tokens/s",
        "pays from",
    ]
    lines = []
    for name, row in rows.items():
        pays = None if row["pays_from_tokens"] in (None, math.inf) else round(row["pays_from_tokens"])
        lines.append([name, *map(row.get, _COLUMNS), spread(row), pays])
        lines[-1] += [row.get(key) and round(row[key] / 2**20) for key in sizes]
    common.print_table([*heads, "peak RSS, MiB", "own, MiB", "disk, MiB"], lines)
    if kernels:
        print(f"\nThe C++ kernels took {kernels['build_s']:.1f} s to build, {kernels['disk_bytes'] / 2**20:.0f} MiB")
    common.write_outcome(outcome, options.json)
    common.record(outcome, options)
    return 0


def _measure(options: argparse.Namespace) -> tuple[dict[str, dict], dict]:
    """Return the rows, and what the C++ kernels' build took; empty where there is no compiler."""
    folder, rows = demo_models.resolve(options.model), {}
    with tempfile.TemporaryDirectory() as empty:  # first a build from nothing, then what the cache lacks
        kernels, _ = (_compile(options, caches) for caches in ({"RIVER_COMPILE_HOME": empty}, {}))
    prompts = prompt_sets.encoded(folder, options)
    ids = [prompt.ids for prompt in prompts]
    given = {"folder": folder, "dtype": options.dtype, "tokens": options.new_tokens}
    for row in options.rows:
        if row == "llama_cpp":
            rows |= _llama_cpp(options, prompts)
            continue
        with tempfile.TemporaryDirectory() as cache:
            for name in (row,) if row == "plain" else (row, f"{row}, again"):
                print(f"{name} ...", file=sys.stderr)
                with closing(
                    common.Worker(MODULE, name, options.threads, {"RIVER_COMPILE_CACHE_DIR": cache})
                ) as worker:
                    rows[name] = _row(worker.ask("start", row=row, prompts=ids, **given), prompts)
                if row != "plain":
                    rows[name]["disk_bytes"] = disk_bytes(cache)
    return rows, kernels


def _compile(options: argparse.Namespace, caches: dict[str, str]) -> dict:
    with closing(common.Worker(MODULE, "the kernels' compiler", options.threads, caches)) as worker:
        said = worker.ask("compile_kernels")
    return {key: said[key] for key in ("build_s", "disk_bytes")} if said["built"] else {}


def _llama_cpp(options: argparse.Namespace, prompts: list[Prompt]) -> dict[str, dict]:
    row = decode_rows.ROWS["llama_cpp"]
    reason = decode_rows.why_not(row, options)
    if reason:
        print(f"llama_cpp is left out: {reason}", file=sys.stderr)
        return {}
    job = {"file": str(decode_rows.gguf_file(options)), "threads": options.threads, "new_tokens": options.new_tokens}
    job["context"] = prompt_sets.longest(prompts, options.new_tokens) + 1
    print("llama_cpp ...", file=sys.stderr)
    with closing(decode_rows.worker("llama_cpp", row, options.threads)) as worker:
        return {"llama_cpp": _row(start_llama_cpp(worker.ask, [prompt.ids for prompt in prompts], job), prompts)}


if __name__ == "__main__":
    sys.exit(main())
