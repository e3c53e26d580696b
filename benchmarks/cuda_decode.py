"""Decode speed on a GPU with random weights, at forced exit depths, against the plain and the compiled 16-bit model.

    python -m benchmarks.decode --device cuda --random llama-3.2-1b llama-3.1-8b       # with a GPU; `make gpu` runs it
    python -m benchmarks.decode --random llama-3.2-1b llama-3.1-8b --estimate          # what can be said without one

Models are built on the device from their configurations; nothing is downloaded. Rows, each with batch 1 and bfloat16,
in the order in which they are measured (`--only` names some):

    river       never leaving, and leaving at each of `--depths`; static cache, captured
    asked       the same, with the check of every block on the way read
    inductor    torch.compile(mode="reduce-overhead"), static cache; an error where it leaves out its CUDA graphs
    exact       exact mode by generated kernels of all widths, with and without drafts; see below
    int4        "inductor" with torch's own 4-bit products in the linear layers (`benchmarks.int4_baseline`)
    tuned       "inductor" with coordinate_descent_tuning and max_autotune
    eager       transformers as it is, a cache that grows

Timed is a loop of forward passes and argmax after a prompt of `--context` tokens, guards switched off in all rows
(`torch.compiler.set_stance(skip_guard_eval_unsafe=True)`), the median of three. Each row is written to `--json` as soon
as it is there; one that fails is noted and the next one begins. Columns:

    tokens/s       of that loop; "+-": half the distance of the slowest round from the fastest
    by bytes       tokens/s if the bytes moved at `--bandwidth` and nothing else took time
    generate       of `model.generate`, guards and sampling loop included; "kept": with one cache for all calls
    MB             bytes per token by the kernels' own counts (`benchmarks.roofline`)
    of copy        bytes per second, as a share of what a device-to-device copy reaches here
    busy           the time that the device works, as a share of the loop's: what is missing is the host's
    kernels        per token, counted by the profiler; "graphs": launches of captured graphs, "waits": of the host
    captures       how many, their seconds and MB; "peak MB": device memory allocated at most
    argmax         share of tokens with plain transformers' choice; "cosine" of the logits, the least

Exact mode has its own tables, next to what the cost model says of an H100 (`benchmarks.estimate`). It is strict, the
twins draft `--drafted` tokens in every cycle, and `model.generate` is timed from the end of the first cycle on. A text
that is not the one that the same kernels write without drafts counts as a failure. How often drafts of random weights
hold means nothing, so there are tokens/s at the shares of `--hold` too, by the cycle as measured. Of a cycle:

    draft, verify  the device's microseconds for a drafted token, and for the pass over all; "rest": what else there is
                   until the cycle ends; medians of cycles whose draft has its full length
    plain          microseconds of a token without drafts, by the same kernels in the same loop
    tokens         kept; "held": share of the drafted tokens
    waits          of the host, after the first cycles
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace

from benchmarks import common

NEVER = "never"
GROUPS = ("river", "asked", "inductor", "exact", "int4", "tuned", "eager")
_WORKERS = {"river": "river", "asked": "river", "tuned": "inductor tuned"}  # others are called as their group


@dataclass(frozen=True)
class Row:
    """One row to measure: its name, the backend whose process measures it, and what that is asked."""

    name: str
    backend: str
    job: dict = field(default_factory=dict)
    command: str = "row"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark to those of `benchmarks.decode`."""
    gpu = parser.add_argument_group("on a GPU, with random weights")
    gpu.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure (%(default)s)")
    gpu.add_argument("--random", nargs="+", metavar="MODEL", help="llama-3.2-1b, llama-3.1-8b: built, not loaded")
    gpu.add_argument("--estimate", action="store_true", help="print what can be said without a GPU")
    gpu.add_argument("--depths", nargs="+", type=depth, default=[None, 0, 3, 8], help="exit depths (never 0 3 8)")
    gpu.add_argument("--context", type=common.number(1), default=1024, help="tokens of the prompt (%(default)s)")
    gpu.add_argument("--group-size", type=int, default=64, choices=(32, 64, 128), help="of the twins (%(default)s)")
    gpu.add_argument("--bandwidth", type=_positive, default=3350.0, help="GB/s of the estimate (%(default)s, an H100)")
    gpu.add_argument("--hold", nargs="+", type=_share, default=[0.7, 0.88], help="of exact mode's drafts (%(default)s)")
    gpu.add_argument("--drafted", type=common.number(1), default=3, help="tokens of exact mode's drafts (%(default)s)")
    gpu.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="ROWS", help=", ".join(GROUPS))
    gpu.add_argument("--no-generate", action="store_true", help="time the loop alone, not `model.generate`")
    gpu.add_argument("--minutes", type=_positive, default=math.inf, help="begin no row that would end after these")
    gpu.add_argument("--blocks", type=common.number(2), help="blocks of the estimate's schedule; the model's if absent")


def wanted(options: argparse.Namespace) -> bool:
    """Tell whether a command line asks for this benchmark."""
    return options.random is not None or options.device == "cuda" or options.estimate


def check(options: argparse.Namespace) -> None:
    """Check a command line that asks for this benchmark.

    Raises:
        ValueError: something is missing, unknown or not there.
    """
    from tools.kernels.shapes import MODELS

    known = [name for name in MODELS if name.startswith("llama")]
    if options.record:
        raise ValueError("--record keeps numbers of a CPU; use --json for those of a GPU")
    if options.random is None:
        raise ValueError(f"name the models to build: --random {' '.join(known)}")
    for name in options.random:
        if name not in known:
            raise ValueError(f"--random {name} is not a model that can be built; choose from {', '.join(known)}")
    for depth in options.depths:
        least = min(MODELS[name].layers for name in options.random)
        if depth is not None and depth >= least:
            raise ValueError(f"--depths {depth} lies after the last exit of {least} blocks; give never, or less")
    if options.estimate:
        return
    if "exact" in options.only and options.new_tokens < options.drafted + 3:
        least = options.drafted + 3  # (so that a cycle with a whole draft is not the last)
        raise ValueError(f"--drafted {options.drafted} needs --new-tokens {least} or more")
    import torch

    if options.device != "cuda":
        raise ValueError("--random needs --device cuda, or --estimate where there is no GPU")
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; --estimate prints what can be said without one")


def main(options: argparse.Namespace) -> int:
    """Measure (or estimates) the models of a command line that :func:`check` passed; return the exit status."""
    if options.estimate:
        from benchmarks import estimate

        return estimate.main(options)
    import torch

    from benchmarks import gpu_facts
    from benchmarks.kernels import copy_bandwidth

    outcome = {
        "benchmark": "cuda_decode",
        "gpu": torch.cuda.get_device_name(),
        "facts": gpu_facts.facts(),
        "copy_bandwidth": copy_bandwidth(),
        "bandwidth": options.bandwidth * 1e9,
        "context": options.context,
        "new_tokens": options.new_tokens,
        "machine": common.machine_facts(options.threads),
        "clocks": [gpu_facts.clocks()],
        "models": {},
    }
    torch.cuda.empty_cache()
    print(f"{outcome['gpu']}, copies at {outcome['copy_bandwidth'] / 1e9:.0f} GB/s; context {options.context}")
    until = time.monotonic() + 60 * options.minutes
    for name in options.random:
        found = outcome["models"][name] = {"rows": [], "missing": {}, "check": None}
        for _ in measured(name, options, until, found):
            outcome["clocks"].append(gpu_facts.clocks())
            if options.json:
                common.write_json(options.json, outcome)
        show(name, found, outcome["copy_bandwidth"], outcome["bandwidth"])
    common.write_outcome(outcome, options.json)
    return 0


def rows_of(options: argparse.Namespace) -> list[Row]:
    """Return the rows that a command line asks for, those of one process side by side."""
    from benchmarks.roofline import depth_name

    rows = []
    for group in (group for group in GROUPS if group in options.only):
        backend = _WORKERS.get(group, group)
        if group == "exact":
            rows.append(Row(group, backend, {"drafted": options.drafted, "holds": options.hold}, "exact"))
            continue
        if group not in ("river", "asked"):
            rows.append(Row(backend, backend, {"depth": None, "generates": group in ("inductor", "eager")}))
            continue
        for depth in options.depths:
            if group == "river":
                rows.append(Row(f"river {depth_name(depth)}", backend, {"depth": depth}))
            elif depth != 0:  # (before the first block nothing is asked)
                job = {"depth": depth, "asked": True, "generates": False}
                rows.append(Row(f"asked {depth_name(depth)}", backend, job))
    if options.no_generate:
        rows = [row if row.command == "exact" else replace(row, job=row.job | {"generates": False}) for row in rows]
    return rows


def measured(name: str, options: argparse.Namespace, until: float, found: dict) -> Iterator[dict]:
    """Measure one model, every backend in its own process; yield each row after putting it into `found`.

    Args:
        name: of the model.
        options: the command line.
        until: by `time.monotonic`; a row that is expected to end later is not begun.
        found: "rows", "missing" (names of rows that failed, with the reason) and "check" (what an exit check costs) of
            the model.
    """
    rows = rows_of(options)
    sizes = {"context": options.context, "group_size": options.group_size, "new_tokens": options.new_tokens}
    for backend in dict.fromkeys(row.backend for row in rows):
        mine, latest = [row for row in rows if row.backend == backend], 0.0
        with closing(common.Worker("benchmarks.cuda_worker", f"{name} {backend}", options.threads)) as worker:
            broken = _failure(lambda w=worker, b=backend: w.ask("prepare", name=name, backend=b, **sizes))
            for row in mine:
                start = time.monotonic()
                reason = broken or (f"no time for it: {latest:.0f} s or more" if start + latest > until else None)
                if reason is None:
                    reason = _failure(
                        lambda w=worker, r=row: found["rows"].append({"name": r.name} | w.ask(r.command, **r.job))
                    )
                if reason is not None:
                    print(f"{row.name}: {reason}", file=sys.stderr)
                    found["missing"][row.name] = reason
                    continue
                latest, made = time.monotonic() - start, found["rows"][-1]
                if made.get("parts_at") is not None:  # (what was measured is kept)
                    reason = f"not the text without drafts from token {made['parts_at']} on"
                    print(f"{row.name}: {reason}", file=sys.stderr)
                    found["missing"][row.name] = reason
                found["check"] = check_cost(found["rows"], name) or found["check"]
                print(f"{name} {row.name}: {made['tokens_per_s']:.1f} tokens/s", flush=True)
                yield made


def _failure(work) -> str | None:
    """Do something with a worker; return what went wrong, None where nothing did."""
    try:
        work()
    except common.WorkerFailed as error:
        return str(error)
    return None


def check_cost(rows: list[dict], name: str) -> dict | None:
    """Return what one exit check costs a token that never leaves, and how many there are.

    Its seconds come with their error, which is that of the difference of two means of a few rounds. None where no row
    with checks or none without was measured.
    """
    from benchmarks.roofline import MODELS

    river = [row for row in rows if row["backend"] == "river" and row["depth"] is None]
    found = {row["asked"]: row["seconds"] for row in river}
    if len(found) < 2:
        return None
    asked, without, checks = found[True], found[False], MODELS[name].layers - 1
    seconds = (statistics.median(asked) - statistics.median(without)) / checks
    return {"seconds": seconds, "error": math.hypot(_error(asked), _error(without)) / checks, "count": checks}


def _error(times: list[float]) -> float:
    """Return the standard error of the mean of a few measurements."""
    return statistics.stdev(times) / math.sqrt(len(times)) if len(times) > 1 else 0.0


def show(name: str, found: dict, copy: float, bandwidth: float) -> None:
    """Print one model's tables and what they say about the targets; rates in bytes per second."""
    from benchmarks.roofline import CHECK_TARGET, SPEEDUP_TARGET, TARGETS

    print(f"\n{name}\n")
    headers = ["", "tokens/s", "+-", "by bytes", "target", "generate", "kept", "MB", "of copy", "busy"]
    lines = []
    rows = [row for row in found["rows"] if "cycle" not in row]
    for row in rows:
        forced = row["backend"] == "river" and not row["asked"]
        spread = (1 / row["seconds"][0] - 1 / row["seconds"][-1]) / 2
        lines.append([row["name"], row["tokens_per_s"], spread, round(bandwidth / row["bytes"])])
        lines[-1] += [TARGETS.get((name, row["depth"])) if forced else None]
        lines[-1] += [row["generate_tokens_per_s"], row["kept_tokens_per_s"], round(row["bytes"] / 1e6)]
        lines[-1] += [_percent(row["bytes"] * row["tokens_per_s"] / copy), _percent(row["busy"])]
    common.print_table(headers, lines)
    print()
    headers = ["", "kernels", "graphs", "waits", "captures", "s", "MB", "peak MB", "argmax", "cosine"]
    lines = []
    for row in rows:
        sizes = [None if row[key] is None else round(row[key] / 1e6) for key in ("capture_bytes", "peak_bytes")]
        lines.append([row[key] for key in ("name", "kernels", "graphs", "waits", "captures", "capture_s")])
        lines[-1] += [*sizes, _percent(row["argmax"]), "NaN" if row["nan"] else row["cosine"]]
    common.print_table(headers, lines)
    show_exact([row for row in found["rows"] if "cycle" in row])
    for missing, reason in found["missing"].items():
        print(f"{missing}: {reason.splitlines()[0]}")
    speed = {row["name"]: row["tokens_per_s"] for row in found["rows"]}
    if found["check"] is not None:
        one, error, count = found["check"].values()
        share = one * count * speed["river never"]
        print(f"\nOne exit check costs {one * 1e6:.2f} us (+- {error * 1e6:.2f}); all {count} of them are")
        print(f"{share:.1%} of a token that never leaves ({CHECK_TARGET:.0%} to reach).")
    if "river depth 3" in speed and "inductor" in speed:
        ratio = speed["river depth 3"] / speed["inductor"]
        print(f"Depth 3 over Inductor's 16-bit model: {ratio:.2f} ({SPEEDUP_TARGET} to reach).")


def show_exact(rows: list[dict]) -> None:
    """Print what was measured of exact mode, next to what is modelled."""
    for row in rows:
        text = "the same" if row["parts_at"] is None else f"parts at token {row['parts_at']}"
        print(f"\n{row['name']}: {row['drafted']} tokens drafted, verified {row['width']} wide; text: {text}\n")
        headers = ["us", "draft", "verify", "rest", "cycle", "plain", "tokens/s", "tokens", "held", "busy", "waits"]
        lines = []
        for name, of in (("measured", row["cycle"]), ("modelled", row["modelled"])):
            lines.append([name, *(round(of[key] * 1e6) for key in ("draft", "verify", "rest", "seconds", "plain"))])
        lines[0] += [row["tokens_per_s"], row["tokens_per_cycle"], _percent(row["held"])]
        lines[0] += [_percent(row["busy"]), row["waits"]]
        lines[1] += [None] * 5
        common.print_table(headers, lines)
        print()
        headers = ["holds", "tokens/cycle", "tokens/s", "x plain", "modelled", "x plain"]
        keys = ["hold", "tokens_per_cycle", "tokens_per_s", "over_plain"]
        keys += ["modelled_tokens_per_s", "modelled_over_plain"]
        common.print_table(headers, [[of[key] for key in keys] for of in row["holds"]])


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.0%}"


def depth(text: str) -> int | None:
    """Return an exit depth of a command line, None for full depth."""
    return None if text == NEVER else common.number(0)(text)


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a probability; give a number from 0 to 1, such as 0.85")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not a bandwidth; give GB/s above 0, such as 3350")
    return value
