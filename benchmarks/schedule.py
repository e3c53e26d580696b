"""Prints the schedule of captured decode steps as the recorder saw it, depth by depth. Needs no GPU.

    python -m benchmarks.schedule                         # a random Llama of 4 blocks
    python -m benchmarks.schedule --model smollm2 --every 8
    python -m benchmarks.schedule --timeline              # and draws the steps, as in docs/architecture.md

The recorder freezes the units, buffers and order of launches that CUDA graphs would get; it cannot tell time.
Other calls are copies into buffers and of results.
In the drawing a backbone block is 6 columns long, a twin 3, the head 2 and a launch 1.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedModel, StaticCache

from benchmarks.common import command_line, print_table
from benchmarks.random_llama import random_llama
from river_compile.backend import river
from river_compile.building.build import bytes_of_token
from river_compile.building.graph_record import Graphs
from river_compile.exits import CRITERIA
from river_compile.kernels.quant.layouts import PLAIN_LAYOUT
from river_compile.passes.program import Lowering
from river_compile.record import find_record
from river_compile.runtime.state import CompiledProgram, StepState, on_step
from river_compile.runtime.stats import StepRecord
from river_compile.runtime.units import Step, Unit
from river_compile.upstream.transformers import cache_argument
from tools import demo_models
from tools.kernels.shapes import ModelShape
from tools.recorder import Event, Recorder, recording

_PROMPT = 4
_COLUMNS = {"block": 6, "twin": 3, "head": 2, "twin_head": 2, "prologue": 1}


@dataclass
class Watch:
    """Keeps the captured state that ran last, and the events of its last step."""

    state: StepState | None = None
    events: list[Event] = field(default_factory=list)


def leaving_at(depth: int) -> tuple[float, ...]:
    """Return thresholds for each depth at which a token is asked after every block and leaves after `depth` of them.

    (Or after the first one where that is 0; at the number of blocks it never leaves.)
    """
    similarity = CRITERIA["similarity"]
    return (*[similarity.never] * (depth - 1), similarity.always)


@contextmanager
def watching() -> Iterator[Watch]:
    """Note every captured step inside, and what the recorder saw of it."""
    watch = Watch()

    def note(state: StepState, record: StepRecord) -> None:
        if record.decode:
            watch.state = state
            watch.events = list(itertools.takewhile(lambda event: event.what != "end", Recorder.events))
        Recorder.events.clear()

    with on_step(note):
        yield watch


def main(arguments: list[str] | None = None) -> int:
    parser = command_line(__doc__)
    parser.add_argument("--model", help="a model's name or folder; a random Llama where it is left out")
    parser.add_argument("--layers", type=int, default=4, help="blocks of the random Llama (default 4)")
    parser.add_argument("--first", type=int, default=1, help="first_exit (default 1)")
    parser.add_argument("--every", type=int, default=1, help="exit_every (default 1)")
    parser.add_argument("--capacity", type=int, default=64, help="tokens in the static cache (default 64)")
    parser.add_argument("--timeline", action="store_true", help="draw every step")
    options = parser.parse_args(arguments)
    torch.set_grad_enabled(False)
    show(_model(options), options)
    return 0


def show(model: PreTrainedModel, options: argparse.Namespace) -> None:
    """Print what one captured step at every exit depth does."""
    settings = {"graphs": True, "exit_every": options.every, "first_exit": options.first, "quantizer": "rtn"}
    operators = Lowering("eager", PLAIN_LAYOUT, fuse=False)
    model.compile(backend=river, options={**settings, "kernels": operators})
    cache = StaticCache(config=model.config, max_cache_len=options.capacity)
    with recording(), watching() as watch:
        generate(model, cache)  # (compiles)
        depths = _depths(watch.state.compiled)
        for depth in depths * 3:  # (the first time runs, the second warms up, the third captures)
            step(model, cache, watch, depth)
        steps = {depth: step(model, cache, watch, depth) for depth in depths}
    units = _units(watch.state.compiled)
    _print_units(watch, units)
    _print_buffers(watch.state)
    rows = []
    for depth, events in steps.items():
        launches, waits = ([e for e in events if e.what == what] for what in ("launch", "wait"))
        calls = sum(e.what == "run" for e in events)
        order = ", ".join(
            e.name if e.what == "launch" else f"flag of {e.name}?" for e in events if e.what in "launchwait"
        )
        rows.append([depth, len(launches), calls, len(waits), order])
    print_table(["depth", "launches", "other calls", "flags", "order"], rows)
    print(f"\n{find_record(model).of(Graphs)[-1].captures.made} captures\n")
    if options.timeline:
        runs = {name: unit.steps for name, unit in units.items()}
        for depth, events in steps.items():
            print("\n".join(timeline(f"depth {depth}", events, runs)), end="\n\n")


def _model(options: argparse.Namespace) -> PreTrainedModel:
    if options.model:
        torch._dynamo.reset()
        return demo_models.load(options.model)[0]
    return small_llama(options.layers)


def small_llama(layers: int) -> PreTrainedModel:
    """Return a small Llama with random weights, of which Dynamo knows nothing yet."""
    torch._dynamo.reset()
    return random_llama(ModelShape("small", layers, 256, 4, 2, 64, 512, 1024))


def step(model: PreTrainedModel, cache: StaticCache, watch: Watch, depth: int) -> list[Event]:
    """Decode one token that leaves at a depth; return what the recorder saw."""
    compiled = watch.state.compiled
    compiled.policy = replace(compiled.policy, threshold=leaving_at(depth))
    generate(model, cache)
    return watch.events


def generate(model: PreTrainedModel, cache: StaticCache) -> None:
    """Run a prompt and one decode step."""
    cache.reset()
    ids = torch.ones(1, _PROMPT, dtype=torch.long)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
    model.generate(ids, **settings, **{cache_argument(model): cache})


def _depths(compiled: CompiledProgram) -> list[int]:
    return [*compiled.program.candidates, compiled.program.num_blocks]


def _units(compiled: CompiledProgram) -> dict[str, Unit]:
    units, depths = compiled.units, _depths(compiled)
    spans = [unit for a, b in itertools.pairwise((0, *depths)) for unit in units.span(a, b)]
    tails = [unit for depth in compiled.program.candidates for unit in units.tail(depth)]
    return {unit.name: unit for unit in (*spans, *tails)}


def _print_units(watch: Watch, units: dict[str, Unit]) -> None:
    """Bytes read are those of weights, packed weights and the whole KV cache; of an embedding, one row; of
    experts, those that a token chooses."""
    rows = []
    for unit in units.values():
        read = sum(_bytes_read(watch, step) for step in unit.steps)
        flag = "yes" if unit.flag is not None else ""
        rows.append([unit.name, len(unit.steps), flag, read / 1e6, len(unit.reads), len(unit.writes)])
    print_table(["unit", "segments", "flag", "reads MB", "values read", "buffers written"], rows)
    print()


def _bytes_read(watch: Watch, step: Step) -> int:
    inputs = len(watch.state.args)
    values = [watch.state.slots[i] if i < inputs else None for i in step.segment.inputs]
    if step.segment.kind == "prologue":
        values = [v[:1] if isinstance(v, torch.Tensor) and v.dim() == 2 else v for v in values]
    return bytes_of_token(step.segment, [*values, *step.packed])


def _print_buffers(state: StepState) -> None:
    makers = {slot: step.segment.name for step in _steps(state.compiled) for slot in step.segment.outputs}
    rows = [
        [
            f"of {makers[slot]}" if slot in makers else "score of the head",
            "x".join(map(str, buffer.shape)),
            str(buffer.dtype).removeprefix("torch."),
            buffer.nbytes,
        ]
        for slot, buffer in state.buffers.items()
    ]
    print_table(["buffer", "shape", "dtype", "bytes"], rows)
    print()


def _steps(compiled: CompiledProgram) -> Iterator[Step]:
    for unit in _units(compiled).values():
        yield from unit.steps


def timeline(title: str, events: Iterable[Event], runs: Mapping[str, Sequence[Step]]) -> list[str]:
    """Draw one step as two lines: when the host launches and waits, and when the device runs what, by unit."""
    now, free = 0, 0
    host, device = {}, {}
    ends: dict[str, int] = {}
    for event in events:
        if event.what == "launch":
            host[now] = "L"
            length = sum(_COLUMNS[step.segment.kind] for step in runs[event.name])
            start = max(now + 1, free)
            free = ends[event.name] = start + max(length, len(event.name) + 2)
            device[start] = f"[{event.name:-^{free - start - 2}}]"
            now += 1
        elif event.what == "wait":
            until = max(ends[event.name], now)
            host |= dict.fromkeys(range(now, until), ".")
            host[until] = "?"
            now = until + 1
    width = max(free, now)
    line = "".join(host.get(i, " ") for i in range(width))
    lower = ""
    for start, text in sorted(device.items()):
        lower = lower.ljust(start) + text
    return [title, f"  host    {line.rstrip()}", f"  device  {lower}"]


if __name__ == "__main__":
    sys.exit(main())
