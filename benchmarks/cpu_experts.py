"""Times the experts of one token on this CPU: 4-bit stacks against the same choice in 16 bits.

    python -m benchmarks.cpu_experts [--threads 1 2] [--repeats 20] [--tokens 1]

The stacks are those of a block of Qwen3-30B-A3B, 128 experts of which a token meets eight. Every call chooses others,
so that no cache holds them. "grouped 16 bits" is the product that transformers' experts call (`F.grouped_mm`). Subjects
alternate and the least time of each counts.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import replace

import torch
import torch.nn.functional as F

from benchmarks.common import command_line, print_table
from benchmarks.cpu_kernels import Call, least_seconds
from river_compile.kernels.native import load as native
from river_compile.kernels.quant.data_free import quantize
from river_compile.kernels.quant.layouts import PackedLinear, pack
from tools.kernels.shapes import MODELS

SHAPE = MODELS["qwen3-30b-a3b"]


def stack_of(n: int, k: int, experts: int) -> PackedLinear:
    """Return a stack whose matrices are one random matrix, each in its own memory."""
    one = pack(quantize(torch.randn(n, k), 64, "rtn"), "native")
    qweight, scale_zero = (t.expand(experts, *t.shape).contiguous() for t in (one.qweight, one.scale_zero))
    return replace(one, qweight=qweight, scale_zero=scale_zero, experts=experts)


def choices(tokens: int, experts: int, chosen: int) -> list[torch.Tensor]:
    """Return the experts of the rows of a call, ascending as transformers sorts them, for calls that share none."""
    order = torch.arange(experts).split(chosen)
    return [part.repeat_interleave(tokens) for part in order if len(part) == chosen]


def subjects(n: int, k: int, experts: int, chosen: int, tokens: int) -> dict[str, list[Call]]:
    """Return the calls of each subject, which differ in the experts that they choose."""
    routes = choices(tokens, experts, chosen)
    x = torch.randn(chosen * tokens, k).bfloat16()
    calls: dict[str, list[Call]] = {}
    stack = stack_of(n, k, experts)
    call = functools.partial(native.load().experts.default, x, stack.qweight, stack.scale_zero)
    calls["native W4A8"] = [functools.partial(call, route, n, stack.group_size) for route in routes]
    dense = torch.randn(n, k).bfloat16().expand(experts, n, k).contiguous()
    ends = [route.bincount(minlength=experts).cumsum(0).int() for route in routes]
    calls["grouped 16 bits"] = [functools.partial(F.grouped_mm, x, dense.transpose(1, 2), offs=end) for end in ends]
    return calls


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = command_line(__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2), help="default 1 2")
    parser.add_argument("--repeats", type=int, default=20, help="of each product (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=1, help="tokens of a call, which choose alike (default 1)")
    options = parser.parse_args(arguments)
    rows, before = [], torch.get_num_threads()
    shapes = {"gate|up": (2 * SHAPE.intermediate, SHAPE.hidden), "down": (SHAPE.hidden, SHAPE.intermediate)}
    for product, (n, k) in shapes.items():
        calls = subjects(n, k, SHAPE.experts, SHAPE.chosen, options.tokens)
        for threads in options.threads:
            torch.set_num_threads(threads)
            best = least_seconds(calls, options.repeats)
            rows += [[product, threads, name, best[name] * 1e3, best["grouped 16 bits"] / best[name]] for name in best]
    torch.set_num_threads(before)
    print_table(["product", "threads", "subject", "ms", "x grouped 16 bits"], rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
