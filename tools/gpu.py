"""Everything that is to be learnt on a GPU, in steps that each end within ten minutes.

    python -m tools.gpu --list            # the steps, their limits and what they answer
    python -m tools.gpu                   # all of them, in order
    python -m tools.gpu facts decode-8b   # these
    make gpu, make gpu-facts, ...         # the same
    make gpu ARGS=--rehearse              # every step without a GPU, at small sizes, into gpu/rehearsal

A step is a command, stopped with its children at its limit. Its output goes to the terminal and to
OUT/<step>.log, its figures to OUT/<step>*.json row by row, and its status to OUT/steps.json as soon as it ends. A run
that is stopped keeps what it has. Steps that failed are named at the end; the exit status is their number.
Tiles that the step "tune" has measured are used by those after it (OUT/tuning.json). A rehearsal (`tools.rehearsal`)
says what each step would take on a card next to its limit, and which tests it could not run.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import common

LONGEST = 10.0  # minutes of a step
_DECODE = ("-m", "benchmarks.decode", "--device", "cuda", "--new-tokens", "128")


class Step(NamedTuple):
    """One command, as arguments of Python, in which {out} is the folder of results."""

    name: str
    minutes: float
    answers: str
    commands: tuple[tuple[str, ...], ...]


def _kernels(model: str, name: str) -> tuple[str, ...]:
    return ("-m", "benchmarks.kernels", "--model", model, "--json", f"{{out}}/{name}.json")


def _tests(name: str, processes: str, *files: str) -> tuple[str, ...]:
    limits = ("--timeout", "200", "-n", processes, "-p", "no:cacheprovider")
    return ("-m", "pytest", "-m", "gpu", *limits, "--junitxml", f"{{out}}/{name}.xml", *files)


def _decode(model: str, name: str, minutes: float) -> tuple[str, ...]:
    return (*_DECODE, "--random", model, "--minutes", f"{minutes:g}", "--json", f"{{out}}/{name}.json")


STEPS = (
    Step(
        "facts",
        4,
        "what card this is, and whether everything works at all",
        (("-m", "tools.check_gpu", "--json", "{out}/facts.json"),),
    ),
    Step(
        "kernels",
        6,
        "what each kernel takes, against its bytes, the cost model and torch's own products",
        (_kernels("llama-3.1-8b", "kernels-8b"), _kernels("llama-3.2-1b", "kernels-1b")),
    ),
    Step(
        "tune",
        6,
        "which tiles are the fastest",
        tuple(
            ("-m", "tools.kernels.tune", "--model", model, "--top", top, "--budget", budget)
            for model, top, budget in (("llama-3.1-8b", "40", "200"), ("llama-3.2-1b", "20", "100"))
        ),
    ),
    Step(
        "kernels-tuned",
        4,
        "what tuning gained",
        (_kernels("llama-3.1-8b", "kernels-tuned-8b"), _kernels("llama-3.2-1b", "kernels-tuned-1b")),
    ),
    Step(
        "tests-kernels",
        8,
        "whether every kernel is right at model shapes and can be captured",
        # (A head in float64 takes 15 GB of the card in each process.)
        (_tests("tests-kernels", "4", "tests/kernels"),),
    ),
    Step(
        "tests-graphs",
        10,
        "whether captured steps, compiled models and offloaded weights are right",
        (_tests("tests-graphs", "6", "tests/runtime", "tests/api", "tests/lowering"),),
    ),
    Step("decode-1b", 9, "tokens/s of the 1B against its targets", (_decode("llama-3.2-1b", "decode-1b", 8),)),
    Step("decode-8b", 10, "tokens/s of the 8B against its targets", (_decode("llama-3.1-8b", "decode-8b", 9),)),
    Step(
        "trace",
        5,
        "where the device waits for the host in two tokens",
        (("-m", "benchmarks.cuda_trace", "--random", "llama-3.1-8b", "--out", "{out}"),),
    ),
)


def run_step(step: Step, out: Path) -> dict:
    """Run a step's commands; return its name, what became of it ("ok", "failed" or "stopped") and its seconds."""
    start = time.monotonic()
    environment = dict(os.environ, RIVER_COMPILE_TUNING=str(out / "tuning.json"), PYTHONUNBUFFERED="1")
    state = "ok"
    file = out / f"{step.name}.log"
    file.unlink(missing_ok=True)
    with file.open("a", encoding="utf-8") as log:  # ("tee" writes to its end too)
        for command in step.commands:
            left = step.minutes * 60 - (time.monotonic() - start)
            status = _run(_filled(command, out), environment, log, left)
            if status is None:
                state = "stopped"
                break
            state = "failed" if status else state
    return {"step": step.name, "state": state, "seconds": time.monotonic() - start}


def _filled(command: Sequence[str], out: Path) -> list[str]:
    return [sys.executable, *(part.replace("{out}", str(out)) for part in command)]


def _run(command: list[str], environment: dict[str, str], log, seconds: float) -> int | None:
    """Run a command in a separate group, its output shown and kept; return its status, None at the limit."""
    print("+", *command[1:], file=log, flush=True)
    tee = subprocess.Popen(["tee", "-a", log.name], stdin=subprocess.PIPE)
    process = subprocess.Popen(command, env=environment, stdout=tee.stdin, stderr=tee.stdin, start_new_session=True)
    tee.stdin.close()
    try:
        return process.wait(max(seconds, 0.0))
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)
        tee.wait()


def _end(process: subprocess.Popen) -> None:
    """End a process and what it started, which else would keep the card."""
    for ending in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, ending)
        except ProcessLookupError:
            break
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def rehearse(steps: Sequence[Step], out: Path) -> int:
    """Run steps without a card; return how many failed, or would take longer than they may on one."""
    from tools import rehearsal

    rehearsal.prepare(out)
    done, rows, kernels = [], [], set()
    for step in steps:
        ran = run_step(rehearsal.rehearsed(step), out)
        terms = rehearsal.terms(step, out, kernels)
        wrong = rehearsal.shortcomings(step, out)
        wrong += ["it would take longer than it may"] if sum(terms.values()) > 60 * step.minutes else []
        ran["state"] = "failed" if wrong and ran["state"] == "ok" else ran["state"]
        done.append({**ran, "wrong": wrong, "card_seconds": terms, "not_rehearsed": rehearsal.unrehearsed(step, out)})
        common.write_json(out / "steps.json", done)
        card = [sum(terms.values()) / 60, step.minutes, ", ".join(f"{t} {s:.0f} s" for t, s in terms.items())]
        rows.append([step.name, ran["state"], round(ran["seconds"]), *card])
    common.print_table(["step", "", "seconds here", "minutes on a card", "limit", "of these"], rows)
    for row in done:
        for line in [*row["wrong"], *(f"not rehearsed: {test}" for test in row["not_rehearsed"])]:
            print(f"{row['step']}: {line}")
    return sum(row["state"] != "ok" for row in done)


def listing(steps: Sequence[Step], out: Path) -> str:
    """Return the steps as text: name, limit, what they answer, and their commands."""
    lines = []
    for step in steps:
        lines.append(f"{step.name:14} {step.minutes:4g} min  {step.answers}")
        lines += [f"    python {' '.join(_filled(command, out)[1:])}" for command in step.commands]
    return "\n".join([*lines, f"{sum(step.minutes for step in steps):g} minutes at most"])


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return how many steps did not end well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = {step.name: step for step in STEPS}
    parser.add_argument("steps", nargs="*", metavar="step", help=f"of {', '.join(known)}; all of them")
    parser.add_argument("--list", action="store_true", help="print the steps and run none")
    parser.add_argument("--rehearse", action="store_true", help="run on a stand-in for a card, at small sizes")
    parser.add_argument("--out", type=Path, help="the folder of results (gpu, of a rehearsal gpu/rehearsal)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no step that may end after these")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.steps if name not in known]
    if unknown:
        parser.error(f"no step {unknown[0]!r}; there are {', '.join(known)}")
    steps = [known[name] for name in options.steps] or list(STEPS)
    options.out = options.out or Path("gpu/rehearsal" if options.rehearse else "gpu")
    if options.list:
        print(listing(steps, options.out))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    if options.rehearse:
        return rehearse(steps, options.out)
    end, done = time.monotonic() + 60 * options.minutes, []
    for step in steps:
        if time.monotonic() + 60 * step.minutes > end:
            done.append({"step": step.name, "state": "no time", "seconds": 0.0})
        else:
            done.append(run_step(step, options.out))
        common.write_json(options.out / "steps.json", done)
    common.print_table(["step", "", "seconds"], [[d["step"], d["state"], round(d["seconds"])] for d in done])
    return sum(d["state"] != "ok" for d in done)


if __name__ == "__main__":
    sys.exit(main())
