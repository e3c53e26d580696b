"""What a decision on the device costs: IF nodes of a CUDA graph, taken and not, one inside of another.

    python -m benchmarks.conditional [--levels 1 4 8 16 31] [--json FILE]

An exit that is decided in the graph takes no flag, no wait of the host and no launch for each piece. Per number of
levels, nested as exit checks would be (each body holds a small kernel and the next level): microseconds of one replay
where all are taken, where the first is not, and of the same kernels in a line without a decision. From torch 2.12 on
(``torch.cuda.CUDAGraph.begin_capture_to_if_node``); with an older one this says so and measures nothing. Needs a GPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import common, gpu_facts
from tools.kernels.tune import first_line, replay_seconds

_REPEATS = 200


def nested(graph: torch.cuda.CUDAGraph, predicates: list[Tensor], work: Tensor) -> None:
    """Captures one level for each predicate, each in the body of the one before."""
    if not predicates:
        return
    graph.begin_capture_to_if_node(predicates[0])
    work.add_(1)
    nested(graph, predicates[1:], work)
    graph.end_capture_to_conditional_node()


def capture(levels: int, decides: bool) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
    """Captures so many levels, or the same kernels in a line; returns the graph, its predicates and what it adds to."""
    predicates = [torch.ones((), dtype=torch.bool, device="cuda") for _ in range(levels)]
    work = torch.zeros(1, device="cuda")
    work.add_(1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        if decides:
            nested(graph, predicates, work)
        else:
            for _ in range(levels):
                work.add_(1)
    return graph, predicates, work.zero_()


def microseconds(graph: torch.cuda.CUDAGraph) -> float:
    """Returns the device's time for one replay, the median."""
    return 1e6 * replay_seconds(graph, _REPEATS)


def measure(levels: int) -> dict:
    """Measures one number of levels.

    Raises:
        RuntimeError: the bodies that ran are not those whose predicates say so, or the driver refused.
    """
    line, _, _ = capture(levels, decides=False)
    graph, predicates, work = capture(levels, decides=True)
    found = {"levels": levels, "line_us": microseconds(line), "taken_us": microseconds(graph)}
    ran = work.item() / _REPEATS
    predicates[0].fill_(False)
    work.zero_()
    found["not_taken_us"] = microseconds(graph)
    if ran != levels or work.item():
        raise RuntimeError(f"{ran:g} of {levels} bodies ran where all were to, {work.item():g} where none was")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns 0 as well where torch has no such nodes, 1 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", type=common.number(1), nargs="+", default=[1, 4, 8, 16, 31], help="(1 4 8 16 31)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there, one by one")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("this measures a GPU and there is none here", file=sys.stderr)
        return 1
    if not hasattr(torch.cuda.CUDAGraph, "begin_capture_to_if_node"):
        print(f"torch {torch.__version__} captures no conditional nodes; 2.12 and later do")
        return 0
    rows: list[dict] = []
    for levels in options.levels:
        try:
            rows.append(measure(levels))
        except RuntimeError as error:  # how deep they may be nested is documented nowhere
            rows.append({"levels": levels, "error": first_line(error)})
        print(rows[-1], flush=True)
        if options.json:
            common.write_json(options.json, {"facts": gpu_facts.facts(), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
