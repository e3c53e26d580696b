"""Decode speed of the plain model, Inductor, River and other programs, side by side.

    python -m benchmarks.decode --record decode        # the rows of README.md's table, whose numbers it keeps
    python -m benchmarks.decode --model DIR --gguf FILE --rows eager fast llama_cpp --json decode.json
    python -m benchmarks.decode --contexts 32 512 4096
    python -m benchmarks.decode --device cuda --one-process --rows eager inductor no_draft all_4bit
    python -m benchmarks.peers install all             # once: llama.cpp, OpenVINO, ONNX Runtime, vLLM

Every row is a separate process with an empty Inductor cache. Each generates the greedy continuation of the same
prompts (prompt_sets.py), past any end of the text: once to compile and to warm up, then in `--repeats` rounds, rows one
after another. Tokens/s exclude the prompt: medians over prompts of medians over rounds, with the range of the prompts.
"Same text": of how many prompts a row with drafts wrote what its program writes without. Exact mode's tokens are also
counted by source. "Outside": of a token, what is not in River's executor. "Uncaptured" graphs of Inductor ran without
CUDA graphs: such a row is no baseline. A peer that can run with several files or draft lengths runs with the fastest.
Nothing here looks at the quality of the text.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import common, decode_rows, prompt_sets, torch_runner
from benchmarks.decode_rows import ROWS
from benchmarks.prompt_sets import ALL, Prompt, spread
from tools import demo_models

_TRIAL_TOKENS = 48
OWN = "backbone"  # the source of the token after a draft's accepted ones
SOURCES = {"lookup": "copied", "assistant": "assistant's", "river": "twins'", OWN: "own"}  # and their columns


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    options = _parse(arguments)
    if options.worker:
        torch_runner.serve()
        return 0
    try:
        folder = Path(demo_models.resolve(options.model))
        absent = decode_rows.absent(options)
        rows = [name for name in decode_rows.wanted(options) if name not in absent]
        prompts = prompt_sets.encoded(folder, options)
        results, failed = run(rows, folder, prompts, options)
    except (ValueError, demo_models.ModelUnavailable, common.WorkerFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    outcome = summarize(results, prompts, options, absent | failed)
    outcome["machine"] |= memory_speed(outcome, folder, options)
    show(outcome)
    common.write_outcome(outcome, options.json)
    common.record(outcome, options)
    return 0


def run(
    rows: list[str], folder: Path, prompts: list[Prompt], options: argparse.Namespace
) -> tuple[dict[str, dict], dict[str, str]]:
    """Prepare all rows one after another, then alternate their rounds; return the raw results, and why rows failed.

    With `--one-process` each row is measured alone instead, and its process ends before the next one begins.
    """
    from tqdm import tqdm

    results: dict[str, dict] = {}
    failed: dict[str, str] = {}
    with tqdm(total=len(rows) * (1 + options.repeats), unit="run", desc="decode") as bar:
        for group in [[name] for name in rows] if options.one_process else [rows]:
            with ExitStack() as stack:
                workers: dict[str, common.Worker] = {}
                for name in group:
                    bar.set_postfix_str(f"preparing {name}")
                    with _peers_may_fail(name, failed):
                        workers[name], results[name] = _prepared(name, folder, prompts, options, stack)
                    bar.update()
                for turn in range(options.repeats):
                    for name in [name for name in workers if name not in failed]:
                        bar.set_postfix_str(f"round {turn + 1}: {name}")
                        with _peers_may_fail(name, failed):
                            _round(workers[name], results[name], prompts, options)
                        bar.update()
                for name in [name for name in workers if name not in failed]:
                    with _peers_may_fail(name, failed):
                        results[name] |= workers[name].ask("facts")
    return {name: result for name, result in results.items() if name not in failed}, failed


@contextlib.contextmanager
def _peers_may_fail(name: str, failed: dict[str, str]) -> Iterator[None]:
    """Inside, a failure of a peer is noted as the reason of its absence; other rows raise."""
    try:
        yield
    except (common.WorkerFailed, demo_models.ModelUnavailable) as error:
        if not ROWS[name].is_peer:
            raise
        print(f"\n{error}", file=sys.stderr)
        failed[name] = str(error).splitlines()[0][:300]


def _prepared(
    name: str, folder: Path, prompts: list[Prompt], options: argparse.Namespace, stack: ExitStack
) -> tuple[common.Worker, dict]:
    """Return the process of a row after its warm-up, and what it said; it ends with the stack."""
    row = ROWS[name]
    ways = decode_rows.choices(row, folder, options)
    tried = {way: _trial(name, more, prompts, options) for way, more in ways.items()} if len(ways) > 1 else {}
    way = max(tried, key=tried.__getitem__) if tried else next(iter(ways))
    worker = stack.enter_context(closing(decode_rows.worker(name, row, options.threads)))
    job = _job(name, prompts, options) | ways[way]
    warmed = prompts[:1] if options.warm_up_first else prompts
    said = worker.ask("prepare", prompts=[prompt.ids for prompt in warmed], **job)
    found = {"choice": way, "tried": tried} if tried else {}
    return worker, {**said, **found, "texts": [], **{key: [[] for _ in prompts] for key in ("tokens_per_s", "first_s")}}


def _trial(name: str, more: dict[str, Any], prompts: list[Prompt], options: argparse.Namespace) -> float:
    """Return the tokens/s of one way to run a row, of a prompt of each kind."""
    few, tokens = prompt_sets.one_of_each(prompts), min(options.new_tokens, _TRIAL_TOKENS)
    job = _job(name, few, options) | {"new_tokens": tokens} | more
    with closing(decode_rows.worker(name, ROWS[name], options.threads)) as worker:
        worker.ask("prepare", prompts=[prompt.ids for prompt in few], **job)
        made = [worker.ask("generate", ids=prompt.ids, new_tokens=tokens)["times"] for prompt in few]
    return sum(len(times) - 1 for times in made) / sum(times[-1] - times[0] for times in made)


def _round(worker: common.Worker, result: dict, prompts: list[Prompt], options: argparse.Namespace) -> None:
    """Generate after each prompt once, and note speeds and texts."""
    from river_compile.reporting.timing import decode_rate

    result["texts"], result["cycles"] = [], []
    for number, prompt in enumerate(prompts):
        made = worker.ask("generate", ids=prompt.ids, new_tokens=options.new_tokens)
        result["tokens_per_s"][number].append(decode_rate(made["times"]) * options.batch)
        result["first_s"][number].append(made["times"][0])
        result["texts"].append(made["tokens"])
        result["cycles"].append({key: made.get(key, {}) for key in ("drafted", "emitted")})  # tokens by source


def _job(name: str, prompts: list[Prompt], options: argparse.Namespace) -> dict:
    """Return what a worker must know to prepare a row, but for its files."""
    row = ROWS[name]
    by_context = [[prompt for prompt in prompts if prompt.context == context] for context in options.contexts]
    slots = [prompt_sets.longest(those, options.new_tokens) for those in by_context if those]
    return {
        **asdict(row),
        "dtype": options.dtype,
        "new_tokens": options.new_tokens,
        "threads": options.threads,
        "device": options.device,
        "batch": options.batch,
        "slots": slots,
        "context": max(slots) + max(decode_rows.DRAFT_LENGTHS) + 1,
    }


def summarize(
    results: dict[str, dict], prompts: list[Prompt], options: argparse.Namespace, absent: dict[str, str]
) -> dict:
    """Return the outcome as the JSON file holds it."""
    rows = {name: {**result, **_numbers(name, results, prompts)} for name, result in results.items()}
    speeds = {name: row["decode_tokens_per_s"] for name, row in rows.items()}
    return {
        **common.setting("decode", options),
        "batch": options.batch,
        "contexts": options.contexts,
        "prompts": [{**asdict(prompt), "ids": len(prompt.ids)} for prompt in prompts],
        "rows": rows,
        "absent": absent,
        "ratios": common.ratios(speeds, decode_rows.SPEED_RATIOS),
    }


def _numbers(name: str, results: dict[str, dict], prompts: list[Prompt]) -> dict[str, Any]:
    """Return a row's medians and ranges: of the first context as "decode_...", and by context and kind."""
    result = results[name]
    values = {"tokens_per_s": [statistics.median(rates) for rates in result["tokens_per_s"]]}
    seconds = [statistics.median(times) for times in result["first_s"]]
    values["prompt_tokens_per_s"] = [len(p.ids) / s for p, s in zip(prompts, seconds, strict=True)]
    cells = prompt_sets.by_kind(prompts, values)
    _add_drafts(cells, prompts, result["cycles"])
    whole = next(iter(cells.values()))[ALL]
    found: dict[str, Any] = {"decode_tokens_per_s": whole["tokens_per_s"]}
    found |= {f"decode_{end}_tokens_per_s": whole[f"{end}_tokens_per_s"] for end in ("least", "most")}
    found["accepted_share"] = whole.get("accepted_share")
    if ROWS[name].same_as in results:
        pairs = zip(result["texts"], results[ROWS[name].same_as]["texts"], strict=True)
        found["same_text"] = sum(a == b for a, b in pairs) / len(prompts)
    return found | {"contexts": cells}


def _add_drafts(cells: dict[str, dict[str, Any]], prompts: list[Prompt], cycles: list[dict[str, dict]]) -> None:
    """Add to the cells of exact mode, by context and kind, the drafts' accepted share and the tokens by source."""
    for context, kind in ((context, kind) for context, kinds in cells.items() for kind in kinds):
        those = [c for p, c in zip(prompts, cycles, strict=True) if str(p.context) == context and kind in (ALL, p.kind)]
        drafted, emitted = (sum((Counter(c[key]) for c in those), Counter()) for key in ("drafted", "emitted"))
        if emitted:
            accepted = emitted.total() - emitted[OWN]
            cells[context][kind]["accepted_share"] = accepted / drafted.total() if drafted else None
            cells[context][kind]["tokens"] = {source: emitted[source] for source in SOURCES}


def memory_speed(outcome: dict, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the memory's bandwidth: as measured, or what a row read if that is more, with the row's name."""
    from transformers import AutoConfig

    if options.device == "cuda":
        from benchmarks.kernels import copy_bandwidth

        return {"bandwidth_bytes_per_s": copy_bandwidth(), "bandwidth_row": None}
    from river_compile.reporting.dry_run import dry_run, empty_model

    found: dict[str, Any] = {**common.memory_speed(options.threads), "bandwidth_row": None}
    per_token = dry_run(empty_model(AutoConfig.from_pretrained(folder), "bfloat16"))["bytes"]
    for name, row in outcome["rows"].items() if per_token and options.batch == 1 else ():
        bits = decode_rows.bits_read(ROWS[name], options.dtype, row)
        read = (per_token["blocks"] + per_token["head"]) * (bits or 0) / 16 * row["decode_tokens_per_s"]
        if read > found["bandwidth_bytes_per_s"]:
            found = {"bandwidth_bytes_per_s": read, "bandwidth_row": name}
    return found


def show(outcome: dict) -> None:
    """Print the tables, why rows are absent, and the ratios."""
    common.print_setting(outcome)
    machine, count = outcome["machine"], len(outcome["prompts"])
    most = f", which {machine['bandwidth_row']} read; a measurement gave less" if machine["bandwidth_row"] else ""
    print(f"Memory at {machine['bandwidth_bytes_per_s'] / 1e9:.0f} GB/s{most}\n")
    columns = {"weights, bits": "target_bits", "outside, ms": "outside_ms", "drafts accepted": "accepted_share"}
    columns |= {"first token, s": "first_token_s", "second token, s": "second_token_s", "mean depth": "mean_depth"}
    columns |= {"captures": "captures", "uncaptured": "graph_skips", "peak on the GPU, bytes": "peak_gpu_bytes"}
    rows = outcome["rows"]
    shown = {head: key for head, key in columns.items() if any(row.get(key) is not None for row in rows.values())}
    lines = []
    for name, row in rows.items():
        same = None if row.get("same_text") is None else f"{round(row['same_text'] * count)} of {count}"
        title, speed = f"{name} ({row['choice']})" if row.get("choice") else name, next(iter(row["contexts"].values()))
        peak = round(row["peak_rss_bytes"] / 2**20)
        lines.append([title, spread(speed[ALL]), same, *(row.get(key) for key in shown.values()), peak])
    common.print_table(["", "decode tokens/s", "same text", *shown, "peak RSS, MiB"], lines)
    for name, reason in outcome["absent"].items():
        print(f"{name}: absent, {reason}")
    for context in map(str, outcome["contexts"]):
        print(f"\nTokens/s after {context} tokens of context")
        cells = {name: row["contexts"][context] for name, row in rows.items()}
        table = [
            [name, *map(spread, by_kind.values()), spread(by_kind[ALL], "prompt_tokens_per_s")]
            for name, by_kind in cells.items()
        ]
        common.print_table(["", *next(iter(cells.values()), ()), "prompt read at"], table)
        table = [
            [name, kind, cell["accepted_share"], *cell["tokens"].values()]
            for name, by_kind in cells.items()
            for kind, cell in by_kind.items()
            if "tokens" in cell
        ]
        if table:
            print(f"\nSources of the tokens after {context} tokens of context")
            common.print_table(["", "prompts", "drafts accepted", *SOURCES.values()], table)
    print("\nRatios of decode tokens/s" if outcome["ratios"] else "")
    for pair, value in outcome["ratios"].items():
        print(f"  {pair:40} {value:.2f}")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    shared = ("model", "device", "dtype", "new-tokens", "threads", "repeats", "json", "record", "worker")
    parser = common.command_line(__doc__, *shared)
    parser.add_argument("--batch", type=common.number(1), default=1, help="texts generated together (%(default)s)")
    prompt_sets.add_arguments(parser)
    parser.add_argument("--one-process", action="store_true", help="one row after another, if memory is short")
    said = "warm up with the first prompt alone; for peers, since River captures passes for each size of KV cache"
    parser.add_argument("--warm-up-first", action="store_true", help=said)
    parser.add_argument("--gguf", type=Path, help="the GGUF file that the model folder was made of, for llama.cpp")
    rows, said = [*ROWS, decode_rows.ALL], f"{', '.join(ROWS)}; or all (default: README.md's table)"
    parser.add_argument("--rows", nargs="+", choices=rows, default=decode_rows.DEFAULT, metavar="ROW", help=said)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
