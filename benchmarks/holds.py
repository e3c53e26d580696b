"""How often drafts hold, by what is written, by source and position, and what exact mode makes of it.

    python -m benchmarks.holds                                   # the three demo models
    python -m benchmarks.holds --model smollm2 --groups chat code --predict llama-3.2-3b llama-3.1-8b

Every draft has `--drafts` tokens, so that each position is judged as often as the ones before it held: a rate is that
of tokens at a position whose predecessors all held. Copies from the context come where they would; the twins draft
the rest.

What exact mode makes of rates is arithmetic: a draft of n tokens costs n passes of the twins and one of the backbone
over n + 1 tokens, and brings 1 + r1 + r1 r2 + ... tokens. The passes are timed (`benchmarks.passes`), for `--predict`
on a random Llama with `--blocks` of the model's blocks and with twice as many, whose difference gives a block. Its
rates are those of the largest model here, by the twins alone.

Not handled: drafts whose length depends on how likely they are to hold, which is what exact mode does; it does a little
better than the best fixed length.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from benchmarks import common
from benchmarks.passes import passes
from benchmarks.prompts import GROUPS, prompts
from benchmarks.random_llama import random_llama
from river_compile.cli import shared
from tools import demo_models
from tools.kernels.shapes import MODELS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from river_compile.runtime.stats import CycleRecord


@dataclass
class Judged:
    """Drafted tokens of one source, by position: how many were judged, and how many of those held."""

    judged: list[int] = field(default_factory=list)
    held: list[int] = field(default_factory=list)

    def add(self, position: int, held: bool) -> None:
        """Take in a token at a position from 0 on."""
        while len(self.judged) <= position:
            self.judged.append(0)
            self.held.append(0)
        self.judged[position] += 1
        self.held[position] += held

    @property
    def rates(self) -> list[float]:
        """The share that held at each position, 0 where none was judged."""
        return [held / max(judged, 1) for held, judged in zip(self.held, self.judged, strict=True)]


def judge(cycles: Sequence[CycleRecord]) -> dict[str, Judged]:
    """Return what became of drafted tokens, by source.

    A token is judged where all before it held and the text continued: the backbone's own token ends each such cycle.
    """
    found: dict[str, Judged] = {}
    for cycle in cycles:
        went_on = cycle.emitted[-1:] == ("backbone",)
        for position, source in enumerate(cycle.drafted[: cycle.accepted + went_on]):
            found.setdefault(source, Judged()).add(position, position < cycle.accepted)
    return found


def tokens_per_cycle(rates: Sequence[float], drafted: int) -> float:
    """Return the tokens that a draft of some length brings in the mean, the backbone's own included."""
    tokens = chance = 1.0
    for rate in rates[:drafted]:
        chance *= rate
        tokens += chance
    return tokens


def best(rates: Sequence[float], seconds: Mapping[str, float]) -> tuple[int, float]:
    """Return the draft length that is the fastest, and its speed over plain decoding.

    Args:
        rates: that a token holds whose predecessors did, by position.
        seconds: by kind of pass, "draft" and the backbone's widths, as :func:`benchmarks.passes.passes` returns them.
    """
    widths = sorted(int(kind) for kind in seconds if kind != "draft")

    def speed(drafted: int) -> float:
        width = next(width for width in widths if width > drafted)
        cycle = drafted * seconds["draft"] + seconds[str(width)]
        return tokens_per_cycle(rates, drafted) * seconds["1"] / cycle

    lengths = range(min(len(rates), widths[-1] - 1) + 1)
    return max(((drafted, speed(drafted)) for drafted in lengths), key=lambda found: found[1])


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    shared.quiet()
    found: dict[str, dict] = {}
    names, options.model = options.model, ", ".join(options.model)
    for name in names:
        model, tokenizer = demo_models.load_or_exit(name, options.dtype)
        found[name] = {"rates": held(model, tokenizer, options), "seconds": timed(model, options)}
    largest = found[names[-1]]["rates"]
    for name in options.predict:
        found[name] = {"rates": largest, "seconds": predicted(name, options)}
    outcome = {**common.setting("holds", options), "models": found}
    show(outcome, names)
    common.write_outcome(outcome, options.json)
    return 0


def held(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace
) -> dict[str, dict[str, dict[str, list]]]:
    """Return rates and count by group of prompts and source of the draft."""
    import river_compile
    from river_compile.runtime.stats import cycles

    drafts = {"num_assistant_tokens_schedule": "constant", "num_assistant_tokens": options.drafts}
    river_compile.accelerate(model, "exact", group_size=options.group_size, background_packing=False, **drafts)
    results: dict[str, dict[str, dict[str, list]]] = {}
    for group in options.groups:
        seen: list[CycleRecord] = []
        for number, prompt in enumerate(prompts(group, options.prompts)):
            print(f"\r{group}: {number} of {options.prompts} prompts", end="", file=sys.stderr, flush=True)
            ids = shared.encode(tokenizer, prompt)
            with cycles.added(seen.append):
                model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=options.new_tokens, do_sample=False
                )
        print(f"\r{group}: {len(seen)} cycles", file=sys.stderr)
        judged = judge(seen)
        results[group] = {source: {"rates": of.rates, "judged": of.judged} for source, of in judged.items()}
    river_compile.restore(model)
    return results


def timed(model: PreTrainedModel, options: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of the model's passes for one row."""

    torch._dynamo.reset()
    twins = {"quantizer": "rtn", "group_size": options.group_size}  # (the bytes are those of any quantizer)
    model.compile(backend="river", options=twins)
    return passes(model, 1, options.repeats)


def predicted(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of a known model's passes, by those of some of its blocks with random weights."""
    shape, few = MODELS[name], options.blocks
    short, twice = (timed(random_llama(replace(shape, layers=blocks)), options) for blocks in (few, 2 * few))
    each = {kind: (twice[kind] - short[kind]) / few for kind in short}
    return {kind: short[kind] + (shape.layers - few) * each[kind] for kind in short}


def show(outcome: dict, measured: Sequence[str]) -> None:
    """Print the tables."""
    common.print_setting(outcome)
    print("\nshare of drafted tokens that held, by position, the ones before having held")
    rows = [
        (name, group, source, of["rates"], of["judged"])
        for name in measured
        for group, sources in outcome["models"][name]["rates"].items()
        for source, of in sorted(sources.items(), reverse=True)
    ]
    longest = max(len(rates) for *_, rates, _ in rows)
    cells = [
        [*labels, judged[0], *(f"{rate:.2f}" for rate in rates), *[None] * (longest - len(rates))]
        for *labels, rates, judged in rows
    ]
    common.print_table(["", "", "source", "judged", *map(str, range(1, longest + 1))], cells)
    print("\nexact over plain, by the river's drafts alone: the best fixed length")
    cells = []
    for name, found in outcome["models"].items():
        seconds = found["seconds"]
        times = [round(1000 * seconds[kind], 1) for kind in ("1", "draft")]
        for group, sources in found["rates"].items():
            length, speed = best(sources["river"]["rates"], seconds)
            label = name if name in measured else f"{name}, predicted"
            cells.append([label, group, *times, length, tokens_per_cycle(sources["river"]["rates"], length), speed])
    common.print_table(["", "", "plain ms", "draft ms", "drafts", "tokens a cycle", "over plain"], cells)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = common.command_line(__doc__, "dtype", "threads", "repeats", "json", repeats=8)
    known = ["smollm2", "gemma3-270m", "qwen-coder-1.5b"]
    parser.add_argument("--model", nargs="+", default=known, help="names or folders, smallest first (the demo models)")
    parser.add_argument("--predict", nargs="*", choices=MODELS, default=[], metavar="NAME", help="models by shape")
    parser.add_argument("--blocks", type=common.number(1), default=2, help="of a predicted model (%(default)s)")
    groups = ["chat", "code", "edit"]
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=groups, help="of prompts (chat code edit)")
    parser.add_argument("--prompts", type=common.number(1), default=4, help="of each group (%(default)s)")
    parser.add_argument("--new-tokens", type=common.number(2), default=96, help="of an answer (%(default)s)")
    parser.add_argument("--group-size", type=int, default=64, choices=(32, 64, 128), help="of the twins (%(default)s)")
    parser.add_argument("--drafts", type=common.number(1), default=6, help="tokens of a draft (%(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
