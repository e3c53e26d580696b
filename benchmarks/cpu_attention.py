"""Times attention of a prompt over a static cache on this CPU: the C++ kernel against ATen's.

    python -m benchmarks.cpu_attention [--threads 2] [--positions 32 256 1024 4096] [--slots 4096] [--repeats 10]

A prompt fills the first slots of a cache; its mask of bools is causal. "aten" meets the whole cache with the same mask,
"aten causal" the prompt's own slots without one. Heads of key-value pairs are repeated for both, since ATen's attention
of grouped queries is slower. Subjects alternate and the least time of each counts.
"""

from __future__ import annotations

import functools
import sys

import torch
import torch.nn.functional as F

from benchmarks.common import command_line, print_table
from benchmarks.cpu_experts import Call, least_seconds
from river_compile.kernels.native import load

SHAPES = {"smollm2-135m": (9, 3, 64), "gemma-2-2b": (8, 4, 256)}  # query heads, key-value heads, features of a head


def aten(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float, causal: bool
) -> torch.Tensor:
    """Return attention ``[B, T, H, D]`` of q ``[B, T, H, D]`` to k and v ``[B, J, S, D]``."""
    k, v = (cache.repeat_interleave(q.shape[2] // k.shape[1], 1) for cache in (k, v))
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, mask, is_causal=causal, scale=scale)
    return out.transpose(1, 2).contiguous()


def subjects(heads: int, kv_heads: int, dim: int, positions: int, slots: int) -> dict[str, list[Call]]:
    """Return the call of each subject, in bfloat16."""
    q = torch.randn(1, positions, heads, dim).bfloat16()
    k, v = torch.randn(2, 1, kv_heads, slots, dim).bfloat16()
    mask = torch.ones(1, 1, positions, slots, dtype=torch.bool).tril()
    own, scale = (cache[:, :, :positions] for cache in (k, v)), dim**-0.5
    return {
        "native": [functools.partial(load.load().attention, q, k, v, mask, scale, 0.0, False)],
        "aten": [functools.partial(aten, q, k, v, mask, scale, False)],
        "aten causal": [functools.partial(aten, q, *own, None, scale, True)],
    }


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--threads", type=int, default=2, help="default %(default)s")
    parser.add_argument("--positions", type=int, nargs="+", default=(32, 256, 1024, 4096), help="of a prompt")
    parser.add_argument("--slots", type=int, default=4096, help="of the cache (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=10, help="of each call (default %(default)s)")
    options = parser.parse_args(arguments)
    rows, before = [], torch.get_num_threads()
    torch.set_num_threads(options.threads)
    for model, shape in SHAPES.items():
        for positions in options.positions:
            best = least_seconds(subjects(*shape, positions, options.slots), options.repeats)
            rows.append([model, positions, *(best[name] * 1e3 for name in ("native", "aten", "aten causal"))])
    torch.set_num_threads(before)
    print_table(["model", "positions", "native, ms", "aten, ms", "aten causal, ms"], rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
