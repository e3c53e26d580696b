"""Facts and smoke: what this machine's GPU is, and whether everything that a run there needs works. About a minute.

    python -m tools.check_gpu [--json FILE] [--model llama-3.1-8b]

First the facts (card, driver, clocks, versions, who else uses it) and what is likely to spoil a measurement. Then
checks with their times, ordered so that the first failure explains those after it: the cache folder, the backend's
entry point, and a Triton kernel of ours (C compiler, ptxas). After these comes every kernel of a decode step at the
model's shapes against a reference on the card. The last ones are a captured graph that is replayed with other values,
pinned memory that the card can address, and a tiny model that generates. A check that fails is named and the next one
begins; the exit status is their number.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import common, gpu_facts
from river_compile.kernels.files import atomic_write, cache_folder
from river_compile.kernels.triton.cache import ExitScoreSpec
from river_compile.kernels.triton.loader import device_name, load
from tools.kernels.shapes import MODELS, model_kernels
from tools.kernels.tune import first_line

NEED = 20 * 10**9  # bytes: the 8B in 16 bits and its twins, its cache and buffers
_ROWS, _SLOTS = 1, 1024
_DEVICE = "cuda"


def cache_is_written() -> str:
    """Write a file to the folder of generated kernels."""
    folder = cache_folder()
    with atomic_write(folder / "check_gpu.txt") as scratch:
        scratch.write_text("written by tools.check_gpu")
    (folder / "check_gpu.txt").unlink()
    return str(folder)


def backend_is_registered() -> str:
    """Look for the entry point: a bare checkout has none, and torch then knows no such backend."""
    found = torch._dynamo.list_backends(exclude_tags=None)
    if "river" not in found:
        raise RuntimeError(
            "torch knows no backend 'river': install the package, or a wheel of it (python -m tools.wheelhouse)"
        )
    return "torch.compile(backend='river')"


def triton_compiles() -> str:
    """Compile and launch the smallest of our kernels."""
    x, hidden = torch.ones(1, 64, device=_DEVICE), torch.empty(1, 64, device=_DEVICE)
    score = torch.empty(1, device=_DEVICE)
    load(ExitScoreSpec(1, 64, "float32"), interpret=_DEVICE == "cpu")(
        update=x, residual=x, previous=x, hidden=hidden, score=score
    )
    if not torch.allclose(score, torch.ones_like(score), atol=1e-5):
        raise RuntimeError(f"two equal rows have a cosine of {score.item()}")
    return "one kernel of ours"


def kernels_are_right(model: str) -> str:
    """Compare every kernel of a decode step with a float64 reference on the card."""
    from tests.kernels.checks import check_kernel

    kernels = model_kernels(MODELS[model], rows=_ROWS, context=_SLOTS, device=device_name(0))
    wrong = []
    for name, spec in kernels.items():
        try:
            check_kernel(spec, _ROWS, _SLOTS, _DEVICE)
        except Exception as error:  # of compiler, driver or comparison: all are named, none hides the next
            wrong.append(f"{name}: {first_line(error)}")
    if wrong:
        raise RuntimeError("; ".join(wrong))
    return f"{len(kernels)} kernels of {model}"


def graphs_replay() -> str:
    """Captures an addition and replays it on other values, on another stream than the one that captured."""
    x = torch.ones(4, device=_DEVICE)
    _ = x + 1  # loads what a capture cannot
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x + 1
    x.fill_(41)
    graph.replay()
    if y.tolist() != [42] * 4:
        raise RuntimeError(f"a replay gave {y.tolist()}")
    return "captured and replayed"


def pinned_memory_is_addressable() -> str:
    """Let the card read pinned memory of the host, as offloaded weights are read."""
    from river_compile.runtime.weight_store import PinnedMemory

    stored = PinnedMemory(torch.device(_DEVICE, torch.cuda.current_device())).put(torch.arange(8, device=_DEVICE))
    if stored.tensor.sum().item() != 28:
        raise RuntimeError("the card reads other values than the host wrote")
    return "offload= works"


def a_model_generates() -> str:
    """Generate with a tiny Llama in float32, captured; at full depth its text is the plain model's."""
    from benchmarks.random_llama import random_llama
    from river_compile import report
    from river_compile.exits import forced_depth
    from tools.kernels.shapes import ModelShape

    model = random_llama(ModelShape("smoke", 4, 256, 4, 2, 64, 512, 1024), _DEVICE).float()
    ids = torch.arange(1, 9, device=_DEVICE)[None]
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "static"}
    settings |= {
        "attention_mask": torch.ones_like(ids),
        "disable_compile": True,
    }  # (else transformers compiles it itself)
    plain = model.generate(ids, **settings)
    model.compile(backend="river", options={"quantizer": "rtn", "threshold": 2.0})
    with forced_depth(4):
        found = [model.generate(ids, **settings) for _ in range(2)]
    if not all(torch.equal(text, plain) for text in found):
        raise RuntimeError(f"another text than the plain model's: {found} and {plain}")
    made = sum(graph.captures.made for graph in report(model).graphs)
    if not made:
        raise RuntimeError(f"nothing was captured:\n{report(model)}")
    with forced_depth(0):
        model.generate(ids, **settings)
    return f"{made} captures, the plain text"


def checks(model: str) -> dict[str, Callable[[], str]]:
    """Return the checks by name, in order."""
    return {
        "cache folder": cache_is_written,
        "entry point": backend_is_registered,
        "triton": triton_compiles,
        "graph": graphs_replay,
        "kernels": lambda: kernels_are_right(model),
        "pinned memory": pinned_memory_is_addressable,
        "generate": a_model_generates,
    }


def run(named: dict[str, Callable[[], str]], keep: Callable[[dict], object]) -> int:
    """Run checks, print each and give it to `keep` as soon as it is known; return how many failed."""
    failed = 0
    for name, check in named.items():
        start = time.perf_counter()
        try:
            state, text = "ok", check()
        except Exception as error:  # whatever it is, it is what this is run to find
            state, text = "FAILED", f"{type(error).__name__}: {first_line(error)}"
            traceback.print_exc()
            failed += 1
        seconds = time.perf_counter() - start
        print(f"{state:6}  {name:14} {seconds:6.1f} s  {text}", flush=True)
        keep({"check": name, "state": state, "seconds": seconds, "text": text})
    return failed


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return how many checks failed, 1 where torch sees no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write facts and outcomes there, one by one")
    names = [name for name, shape in MODELS.items() if not shape.experts]
    parser.add_argument("--model", choices=names, default="llama-3.1-8b", help="whose kernels (%(default)s)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            f"error: torch {torch.__version__} sees no GPU here. What can be said without one:\n"
            "  python -m benchmarks.decode --random llama-3.2-1b llama-3.1-8b --estimate",
            file=sys.stderr,
        )
        return 1
    found = gpu_facts.facts() | {"clocks": gpu_facts.clocks()}
    for name, value in found.items():
        print(f"{name:18} {value}")
    outcome = {"facts": found, "doubts": gpu_facts.doubts(found, NEED), "checks": []}
    for doubt in outcome["doubts"]:
        print(f"doubt: {doubt}")

    def keep(row: dict) -> None:
        outcome["checks"].append(row)
        if options.json:
            common.write_json(options.json, outcome)

    return run(checks(options.model), keep)


if __name__ == "__main__":
    sys.exit(main())
