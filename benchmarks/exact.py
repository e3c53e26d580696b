"""Speed of exact mode beside plain generation, transformers' own prompt lookup and the whole river.

    python -m benchmarks.exact
    python -m benchmarks.exact --model gemma3-270m --new-tokens 64 --repeats 2 --json exact.json

One compiled model in one process runs every row on every prompt, batch 1, greedy, with a static cache; the rows take
turns, once to warm up and then `--repeats` times. Rows:

    plain            the backbone alone, one token per pass
    exact            the river and copies from the context draft, the backbone verifies
    exact_no_lookup  only the river drafts
    exact_strict     exact, verified in passes whose rows have the bits of plain decoding
    prompt_lookup    transformers' prompt_lookup_num_tokens=10 on the backbone
    river            everything in 4 bits: fast, but another text

Columns: decode tokens/s (median over the repeats of the time for all prompts, prefill excluded), tokens kept per
verifying pass, share of the drafted tokens that held, share of the time spent drafting, verifying and choosing, and how
many of the texts are the plain one's. In bfloat16 a text may differ where two tokens all but tie: passes of different
widths round differently.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time

from benchmarks import common
from river_compile.cli import models

STORY = (
    "The old lighthouse stood on the cliff above the village. Every evening the keeper climbed the stairs and lit the "
    "lamp. The keeper knew every ship by its sails. One night a storm came, and the keeper saw a small boat far out."
)
CODE = """def mean(values):
    total = 0
    for value in values:
        total += value
    return total / len(values)
"""
PROMPTS = {
    "chat": (
        "Explain in a few sentences why the sky is blue.",
        "Give me a short recipe for pancakes.",
        "What should I see on a first visit to Rome?",
    ),
    "code": (
        "Write a Python function that returns the n-th Fibonacci number.",
        "Write a Python class for a stack with push, pop and peek.",
    ),
    "edit": (
        f"Repeat this text and change every 'keeper' to 'guard':\n{STORY}",
        f"Repeat this code and rename `total` to `amount`:\n{CODE}",
    ),
}
LOOKUP = 10  # tokens that transformers' prompt lookup drafts, its documentation's value
ROWS = ("plain", "exact", "exact_no_lookup", "exact_strict", "prompt_lookup", "river")
RATIOS = (
    ("exact", "plain"),
    ("exact", "prompt_lookup"),
    ("exact_no_lookup", "plain"),
    ("exact_strict", "plain"),
    ("river", "plain"),
)


class Clock:
    """A streamer that notes when how many tokens came; the first call brings the prompt."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.times: list[float] = []

    def put(self, value) -> None:
        self.counts.append(value.numel())
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    @property
    def decoded(self) -> tuple[int, float]:
        """Tokens after the first new one, and the seconds from it to the last."""
        return sum(self.counts[2:]), self.times[-1] - self.times[1]


class Bench:
    """Runs every row on one compiled model."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch

        import river_compile

        models.quiet()
        torch.set_num_threads(options.threads)
        self.model, tokenizer = models.load(options.model, dtype=options.dtype)
        self.model.compile(backend=river_compile.river)
        self.prompts = {kind: [models.encode(tokenizer, p) for p in texts] for kind, texts in PROMPTS.items()}
        longest = max(ids.shape[1] for kind in self.prompts.values() for ids in kind)
        # One cache size, so one decode graph; transformers' prompt lookup drafts beyond the end of the text.
        self.model._previous_max_cache_length = longest + options.new_tokens + LOOKUP + 1
        self.new_tokens = options.new_tokens

    def run(self, row: str, kind: str) -> dict:
        """Generates from every prompt of a kind; returns tokens, seconds, texts and the cycles of exact mode."""
        import river_compile

        tokens, seconds, texts = 0, 0.0, []
        with river_compile.trace() as trace:
            for ids in self.prompts[kind]:
                clock = Clock()
                texts.append(self._generate(row, ids, clock))
                new, spent = clock.decoded
                tokens, seconds = tokens + new, seconds + spent
        return {"tokens": tokens, "seconds": seconds, "texts": texts, "cycles": trace.cycles}

    def _generate(self, row: str, ids, clock: Clock) -> list[int]:
        import torch

        import river_compile
        from river_compile.exits import forced_depth

        exact = river_compile.exact.with_options(adaptive=False)  # what drafts cost is what is measured
        special = {
            "exact": {"custom_generate": exact},
            "exact_no_lookup": {"custom_generate": exact, "prompt_lookup": False},
            "exact_strict": {"custom_generate": exact, "strict": True},
            "prompt_lookup": {"prompt_lookup_num_tokens": LOOKUP},
        }.get(row, {})
        depths = {"plain": self.model.config.num_hidden_layers, "river": 0}
        depths["prompt_lookup"] = depths["plain"]
        with forced_depth(depths[row]) if row in depths else contextlib.nullcontext():
            text = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=self.new_tokens,
                max_new_tokens=self.new_tokens,
                do_sample=False,
                disable_compile=True,
                cache_implementation="static",
                streamer=clock,
                **special,
            )
        return text[0, ids.shape[1] :].tolist()


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    options = _parse(arguments)
    try:
        models.resolve(options.model)
        bench = Bench(options)
    except (ValueError, models.ModelUnavailable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    outcome = summarize(measure(bench, options), options)
    show(outcome)
    common.write_outcome(outcome, options.json)
    return 0


def measure(bench: Bench, options: argparse.Namespace) -> dict[tuple[str, str], list[dict]]:
    """Returns the results of the repeats by kind of prompt and row; the first round warms up and is dropped."""
    from tqdm import tqdm

    results: dict[tuple[str, str], list[dict]] = {}
    pairs = [(kind, row) for kind in PROMPTS for row in ROWS]
    with tqdm(total=(options.repeats + 1) * len(pairs), unit="run", desc="exact") as bar:
        for turn in range(options.repeats + 1):
            for kind, row in pairs:
                bar.set_postfix_str(f"{kind} {row}" if turn else f"warming up {kind} {row}")
                result = bench.run(row, kind)
                if turn:
                    results.setdefault((kind, row), []).append(result)
                bar.update()
    return results


def summarize(results: dict[tuple[str, str], list[dict]], options: argparse.Namespace) -> dict:
    """Returns the outcome as the JSON file holds it."""
    kinds: dict[str, dict] = {}
    for kind in PROMPTS:
        rows = {row: _row(results[kind, row], results[kind, "plain"][0]["texts"]) for row in ROWS}
        speeds = {row: values["tokens_per_s"] for row, values in rows.items()}
        kinds[kind] = {"rows": rows, "ratios": common.ratios(speeds, RATIOS)}
    return {
        **common.setting("exact", options),
        "kinds": kinds,
    }


def _row(repeats: list[dict], plain_texts: list[list[int]]) -> dict:
    cycles = repeats[0]["cycles"]
    drafted = sum(len(c.drafted) for c in cycles)
    spent = [statistics.median(sum(c.seconds[i] for c in r["cycles"]) for r in repeats) for i in range(3)]
    texts = repeats[0]["texts"]
    return {
        "tokens_per_s": statistics.median(r["tokens"] / r["seconds"] for r in repeats),
        "tokens_per_cycle": sum(len(c.kept) for c in cycles) / len(cycles) if cycles else None,
        "acceptance": sum(c.accepted for c in cycles) / drafted if drafted else None,
        "time_shares": [s / sum(spent) for s in spent] if cycles else None,
        "same_texts": sum(a == b for a, b in zip(texts, plain_texts, strict=True)),
        "texts": len(texts),
        "first_differences": [_first_difference(a, b) for a, b in zip(texts, plain_texts, strict=True)],
    }


def _first_difference(a: list[int], b: list[int]) -> int | None:
    """Returns the first position where two texts differ, None where they are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)


def show(outcome: dict) -> None:
    """Prints a table and the ratios for each kind of prompt."""
    common.print_setting(outcome)
    for kind, result in outcome["kinds"].items():
        print(f"\n{kind} prompts")
        common.print_table(
            ["", "tokens/s", "tokens/cycle", "held", "draft", "verify", "choose", "same texts"],
            [
                [
                    name,
                    row["tokens_per_s"],
                    row["tokens_per_cycle"],
                    row["acceptance"],
                    *(row["time_shares"] or [None] * 3),
                    f"{row['same_texts']} of {row['texts']}",
                ]
                for name, row in result["rows"].items()
            ],
        )
        for pair, value in result["ratios"].items():
            print(f"  {pair:26} {value:.2f}")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = common.command_line(__doc__, "model", "dtype", "threads", "repeats", "json")
    parser.add_argument("--new-tokens", type=common.number(16), default=96, help="tokens per text (%(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
