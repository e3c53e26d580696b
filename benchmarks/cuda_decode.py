"""Decode speed on a GPU with random weights, at forced exit depths, against the plain and the compiled 16-bit model.

    python -m benchmarks.decode --device cuda --random llama-3.2-1b llama-3.1-8b       # with a GPU; `make gpu` runs it
    python -m benchmarks.decode --random llama-3.2-1b llama-3.1-8b --estimate          # what can be said without one

Models are built on the device from their configurations; nothing is downloaded. Rows, each with batch 1 and bfloat16:

    eager        transformers as it is, a cache that grows
    inductor     torch.compile(mode="reduce-overhead"), static cache
    river        never leaving, and leaving at each of `--depths`; static cache, captured

Timed is a loop of forward passes and argmax after a prompt of `--context` tokens, guards switched off in all rows
(`torch.compiler.set_stance(skip_guard_eval_unsafe=True)`), the median of three. Columns:

    tokens/s       of that loop; "in generate": of `model.generate`, guards and sampling loop included
    MB             bytes per token by the kernels' own counts (`benchmarks.roofline`)
    of copy        bytes per second, as a share of what a device-to-device copy reaches here
    kernels        per token, counted by the profiler; "graphs": launches of captured graphs
    capture s, MB  time and device memory of River's captures
"""

from __future__ import annotations

import argparse
from contextlib import closing

from benchmarks import common

NEVER = "never"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark to those of `benchmarks.decode`."""
    gpu = parser.add_argument_group("on a GPU, with random weights")
    gpu.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure (%(default)s)")
    gpu.add_argument("--random", nargs="+", metavar="MODEL", help="llama-3.2-1b, llama-3.1-8b: built, not loaded")
    gpu.add_argument("--estimate", action="store_true", help="print what can be said without a GPU")
    gpu.add_argument("--depths", nargs="+", type=_depth, default=[None, 0, 3, 8], help="exit depths (never 0 3 8)")
    gpu.add_argument("--context", type=common.number(1), default=1024, help="tokens of the prompt (%(default)s)")
    gpu.add_argument("--group-size", type=int, default=64, choices=(32, 64, 128), help="of the twins (%(default)s)")
    gpu.add_argument("--bandwidth", type=_positive, default=3350.0, help="GB/s of the estimate (%(default)s, an H100)")
    gpu.add_argument("--blocks", type=common.number(2), help="blocks of the estimate's schedule; the model's if absent")


def wanted(options: argparse.Namespace) -> bool:
    """Tells whether a command line asks for this benchmark."""
    return options.random is not None or options.device == "cuda" or options.estimate


def check(options: argparse.Namespace) -> None:
    """Checks a command line that asks for this benchmark.

    Raises:
        ValueError: something is missing, unknown or not there.
    """
    from river_compile.kernels.tools.shapes import MODELS

    known = [name for name in MODELS if name.startswith("llama")]
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
    import torch

    if options.device != "cuda":
        raise ValueError("--random needs --device cuda, or --estimate where there is no GPU")
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; --estimate prints what can be said without one")


def main(options: argparse.Namespace) -> int:
    """Measures (or estimates) the models of a command line that :func:`check` passed; returns the exit status."""
    if options.estimate:
        from benchmarks import estimate

        return estimate.main(options)
    import torch

    from benchmarks.kernels import copy_bandwidth

    outcome = {
        "benchmark": "cuda_decode",
        "gpu": torch.cuda.get_device_name(),
        "copy_bandwidth": copy_bandwidth(),
        "context": options.context,
        "new_tokens": options.new_tokens,
        "machine": common.machine_facts(options.threads),
        "models": {},
    }
    torch.cuda.empty_cache()
    print(f"{outcome['gpu']}, copies at {outcome['copy_bandwidth'] / 1e9:.0f} GB/s; context {options.context}")
    for name in options.random:
        outcome["models"][name] = found = _measured(name, options)
        show(name, found, outcome["copy_bandwidth"])
    common.write_outcome(outcome, options.json)
    return 0


def _measured(name: str, options: argparse.Namespace) -> dict:
    """Measures one model, every backend in a process of its own; returns rows and the cost of an exit check."""
    rows: list[dict] = []
    check = None
    for backend in ("eager", "inductor", "river"):
        with closing(common.Worker("benchmarks.cuda_worker", f"{name} {backend}", options.threads)) as worker:
            job = {"depths": options.depths, "context": options.context, "group_size": options.group_size}
            answer = worker.ask("measure", name=name, backend=backend, new_tokens=options.new_tokens, **job)
        rows += answer["rows"]
        check = answer.get("check", check)
    return {"rows": rows, "check": check}


def show(name: str, found: dict, bandwidth: float) -> None:
    """Prints one model's table and what it says about the targets."""
    from benchmarks.roofline import CHECK_TARGET, SPEEDUP_TARGET, TARGETS

    print(f"\n{name}\n")
    headers = ["", "tokens/s", "in generate", "target", "MB", "of copy", "kernels", "graphs", "capture s", "capture MB"]
    lines = []
    for row in found["rows"]:
        target = TARGETS.get((name, row["depth"])) if row["backend"] == "river" else None
        share = row["bytes"] * row["tokens_per_s"] / bandwidth
        capture_mb = None if row["capture_bytes"] is None else row["capture_bytes"] / 1e6
        lines.append([row["name"], row["tokens_per_s"], row["generate_tokens_per_s"], target])
        lines[-1] += [round(row["bytes"] / 1e6), f"{share:.0%}", row["kernels"], row["graphs"]]
        lines[-1] += [row["capture_s"], capture_mb]
    common.print_table(headers, lines)
    speed = {row["name"]: row["tokens_per_s"] for row in found["rows"]}
    if "river never" in speed:
        one, count = found["check"]["seconds"], found["check"]["count"]
        share = one * count * speed["river never"]
        print(f"\nOne exit check costs {one * 1e6:.2f} us; all {count} of them are {share:.1%} of a token that never")
        print(f"leaves ({CHECK_TARGET:.0%} to reach).")
    if "river depth 3" in speed:
        ratio = speed["river depth 3"] / speed["inductor"]
        print(f"Depth 3 over Inductor's 16-bit model: {ratio:.2f} ({SPEEDUP_TARGET} to reach).")


def _depth(text: str) -> int | None:
    return None if text == NEVER else common.number(0)(text)


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not a bandwidth; give GB/s above 0, such as 3350")
    return value
