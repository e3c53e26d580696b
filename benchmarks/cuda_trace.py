"""Where the device waits for the host: a trace of two tokens, and the gaps between what runs there.

    python -m benchmarks.cuda_trace --random llama-3.1-8b [--depths never 0 3] [--out FOLDER]

For every depth, with the depth known before and with every check read: FOLDER/trace-<row>.json for chrome://tracing or
Perfetto, and the largest gaps, each with what ran before it and after it. The profiler slows the host down, so gaps are
longer here than they are without it; their order and their places are what this is for. Needs a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import common, cuda_decode
from benchmarks.cuda_worker import Bench, covered
from benchmarks.roofline import depth_name

_TOKENS = 2
_SHOWN = 12  # gaps of each trace


def gaps(events: Iterable[Any]) -> list[tuple[float, str, str]]:
    """Return the times in microseconds in which nothing runs on the device, with what ends before and begins after."""
    found, reached, last = [], None, ""
    for event in sorted(
        (event for event in events if event.device_type == DeviceType.CUDA), key=lambda event: event.time_range.start
    ):
        span = event.time_range
        if reached is not None and span.start > reached:
            found.append((span.start - reached, last, event.name))
        if reached is None or span.end > reached:
            reached, last = span.end, event.name
    return sorted(found, reverse=True)


def show(title: str, events: Iterable[Any]) -> dict:
    """Print the largest gaps of a trace; return them with the time that the device worked, in microseconds."""
    events = list(events)
    found = gaps(events)
    ranges = [(e.time_range.start, e.time_range.end) for e in events if e.device_type == DeviceType.CUDA]
    busy, idle = covered(ranges), sum(length for length, _, _ in found)
    print(f"\n{title}: {_TOKENS} tokens, the device works {busy:.0f} us and waits {idle:.0f} us in {len(found)} gaps\n")
    common.print_table(["us", "after", "before"], [[us, a[:50], b[:50]] for us, a, b in found[:_SHOWN]])
    return {"row": title, "busy_us": busy, "idle_us": idle, "gaps": found[:_SHOWN]}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 where there is no GPU."""
    parser = common.command_line(__doc__)
    parser.add_argument("--random", default="llama-3.1-8b", help="llama-3.2-1b or llama-3.1-8b (%(default)s)")
    parser.add_argument("--depths", nargs="+", type=cuda_decode.depth, default=[None, 0, 3], help="(never 0 3)")
    parser.add_argument("--context", type=common.number(1), default=1024, help="tokens of the prompt (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder of the traces (%(default)s)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("this traces a GPU and there is none here", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    bench, rows = Bench(), []
    bench.prepare(options.random, "river", options.context, 64, 16)
    for depth in options.depths:
        for asked in (False, True) if depth != 0 else (False,):
            name = f"{'asked' if asked else 'forced'} {depth_name(depth)}"
            with bench.leaving(depth, asked):
                bench.loop.round(8)
                with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
                    bench.loop.round(_TOKENS)
            found.export_chrome_trace(str(options.out / f"trace-{name.replace(' ', '-')}.json"))
            rows.append(show(name, found.events()))
            common.write_json(options.out / "trace.json", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
