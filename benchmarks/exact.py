"""Speed of exact mode, full depth, transformers' own prompt lookup and all-4bit.

    python -m benchmarks.exact
    python -m benchmarks.exact --model gemma3-270m --new-tokens 64 --repeats 2 --json exact.json
    python -m benchmarks.exact --batch 2 4 8 16   # batches of mixed prompts, beside plain batches; --own-ends
    python -m benchmarks.exact --batch 1 8 --rows plain exact --repeats 3
    python -m benchmarks.exact --context 256 1024 4096   # long prompts
    python -m benchmarks.exact --peers            # beside other programs: benchmarks/exact_peers.py
    python -m benchmarks.exact --regret           # the length of drafts, beside fixed ones: benchmarks/regret.py

One compiled model in one process runs every row on every prompt of six groups (benchmarks/prompts.py), batch 1, greedy,
with a static cache; the rows alternate, once to warm up and then `--repeats` times. Rows:

    plain            the backbone alone, one token per pass
    exact            the river and copies from the context draft, the backbone verifies
    exact_no_lookup  only the river drafts
    prompt_lookup    transformers' prompt_lookup_num_tokens=10 on the backbone
    river            everything in 4 bits: fast, but another text

Columns:

- decode tokens/s: the median over the repeats of the time for all prompts, prefill excluded; in the first repeat, which
  follows the call that compiled, and in the last one
- tokens emitted by a row per verifying pass, and the acceptance rate
- shares of the time spent drafting, verifying and choosing
- how many of the texts are the plain one's

Ratios are those of the medians, of the first repeat and of the last one. In bfloat16 a text may differ
where two tokens nearly tie: passes of different widths round differently.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import common, regret
from benchmarks.prompts import GROUPS, mixed, prompts
from river_compile.cli import shared
from tools import demo_models

if TYPE_CHECKING:
    from torch import Tensor

LOOKUP = 10  # tokens that transformers' prompt lookup drafts, its documentation's value
ROWS = ("plain", "exact", "exact_no_lookup", "prompt_lookup", "river")
BATCH_ROWS = ("plain", "exact")
CONTEXT_ROWS = ("plain", "exact")
IN_12_BITS = {"plain_12bit": "plain", "exact_12bit": "exact"}  # rows of the model with packed weights, as these
RATIOS = (
    ("plain_12bit", "plain"),
    ("exact_12bit", "exact"),
    ("exact", "plain"),
    ("exact", "prompt_lookup"),
    ("exact_no_lookup", "plain"),
    ("river", "plain"),
)


class Clock:
    """A streamer that notes when tokens came; the first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    @property
    def decoded(self) -> float:
        """Seconds from the first new token to the last."""
        return self.times[-1] - self.times[1]


@dataclass(frozen=True)
class Batch:
    """Prompts of one call: ids and mask ``[B, S]``, padded on the left."""

    ids: Tensor
    mask: Tensor


class Bench:
    """Runs every row on one compiled model.

    Attributes:
        rows: what is measured.
        packed: a second model, whose backbone's weights are packed in 12 bits, if it was asked for.
        batches: by kind, the calls of one measurement.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        import torch

        from river_compile import accelerate
        from river_compile.backend import river

        shared.quiet()
        torch.set_num_threads(options.threads)
        self.model, tokenizer = demo_models.load(options.model, dtype=options.dtype)
        self.ends = set(tokenizer.convert_tokens_to_ids([tokenizer.eos_token])) if options.own_ends else set()
        self.model.generation_config.eos_token_id = list(self.ends) or None
        options_of = {"twins": options.twins, "target_weights": "model"}
        if options.regret:  # what users type, whose passes stay bound between calls, of any width
            accelerate(self.model, "exact", background_packing=False, twins=options.twins)
        else:
            self.model.compile(backend=river, options=options_of)
        self.packed = None
        if options.twelve:
            self.packed = copy.deepcopy(self.model)
            self.packed.compile(backend=river, options={**options_of, "target_weights": "12bit"})
        if options.batch:
            self.rows = BATCH_ROWS
            texts = {f"batches of {n} mixed": [list(itertools.islice(mixed(), n))] for n in options.batch}
        elif options.context:
            self.rows, texts = CONTEXT_ROWS, {}
        else:
            self.rows = ROWS
            texts = {f"{group} prompts": [[p] for p in prompts(group, options.prompts)] for group in options.groups}
        self.rows += tuple(IN_12_BITS) if options.twelve else ()
        self.rows = tuple(row for row in self.rows if row in {"plain", *(options.rows or self.rows)})
        self.batches = {kind: [_batch(tokenizer, call) for call in calls] for kind, calls in texts.items()}
        for tokens in options.context or ():
            self.batches[f"{tokens} tokens of documents"] = [_documents(tokenizer, tokens)]
        longest = max(batch.ids.shape[1] for batches in self.batches.values() for batch in batches)
        # One cache size, so one decode graph; transformers' prompt lookup drafts beyond the end of the text.
        for model in filter(None, (self.model, self.packed)):
            model._previous_max_cache_length = longest + options.new_tokens + LOOKUP + 1
        self.new_tokens = options.new_tokens

    def run(self, row: str, kind: str) -> dict:
        """Generate from every prompt of a kind; return tokens, seconds, texts and the cycles of exact mode."""
        import river_compile

        tokens, seconds, texts = 0, 0.0, []
        with river_compile.trace() as trace:
            for batch in self.batches[kind]:
                clock = Clock()
                made = [self._until_end(text) for text in self._generate(row, batch, clock)]
                texts += made
                tokens, seconds = tokens + sum(len(text) - 1 for text in made), seconds + clock.decoded
        return {"tokens": tokens, "seconds": seconds, "texts": texts, "cycles": trace.cycles}

    def seconds_per_token(self, row: str, batch: Batch) -> float:
        """Generate from one prompt; return the seconds of a token after the first."""
        clock = Clock()
        self._generate(row, batch, clock)
        return clock.decoded / (len(clock.times) - 2)

    def _until_end(self, text: list[int]) -> list[int]:
        """Return a text without the padding after its end."""
        return text[: next((i + 1 for i, token in enumerate(text) if token in self.ends), None)]

    def _generate(self, row: str, batch: Batch, clock: Clock) -> list[list[int]]:
        from river_compile.decoding.mode import exact
        from river_compile.exits import forced_depth

        model = self.packed if row in IN_12_BITS else self.model
        row = IN_12_BITS.get(row, row)
        special = {
            "exact": {"custom_generate": exact},
            "exact_no_lookup": {"custom_generate": exact, "prompt_lookup_num_tokens": 0},
            "prompt_lookup": {"prompt_lookup_num_tokens": LOOKUP},
        }.get(row, {})
        if row in regret.ROWS:  # of an accelerated model
            special = {"prompt_lookup_num_tokens": 0}
            if row != regret.RULE:
                special |= {"num_assistant_tokens": int(row.split()[-1]), "num_assistant_tokens_schedule": "constant"}
        depths = {"plain": self.model.config.num_hidden_layers, "river": 0}
        depths["prompt_lookup"] = depths["plain"]
        with forced_depth(depths[row]) if row in depths else contextlib.nullcontext():
            made = model.generate(
                batch.ids,
                attention_mask=batch.mask,
                max_new_tokens=self.new_tokens,
                pad_token_id=0,
                do_sample=False,
                disable_compile=True,
                cache_implementation="static",
                streamer=clock,
                **special,
            )
        ids = getattr(made, "sequences", made)
        return ids[:, batch.ids.shape[1] :].tolist()


def _batch(tokenizer, texts: list[str]) -> Batch:
    """Return prompts of one call, as a user's messages."""
    import torch

    rows = [shared.encode(tokenizer, text)[0] for text in texts]
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = row
        mask[i, longest - len(row) :] = 1
    return Batch(ids, mask)


def _documents(tokenizer, tokens: int) -> Batch:
    """Return a prompt of so many tokens: the project's documents, one after the other."""
    import torch

    folder = Path(__file__).parents[1] / "docs"
    text = "\n\n".join(file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.md")))
    ids = torch.tensor([tokenizer(text)["input_ids"][:tokens]])
    return Batch(ids, torch.ones_like(ids))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    options = _parse(arguments)
    if options.peers:
        from benchmarks import exact_peers

        return exact_peers.run(options)
    try:
        demo_models.resolve(options.model)
        bench = Bench(options)
    except (ValueError, demo_models.ModelUnavailable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.regret:
        outcome = regret.run(bench, options)
    else:
        outcome = summarize(measure(bench, options), options)
        show(outcome)
    common.write_outcome(outcome, options.json)
    common.record(outcome, options)
    return 0


def measure(bench: Bench, options: argparse.Namespace) -> dict[tuple[str, str], list[dict]]:
    """Return the results of the repeats by kind of prompt and row; the first round warms up and is dropped."""
    from tqdm import tqdm

    results: dict[tuple[str, str], list[dict]] = {}
    pairs = [(kind, row) for kind in bench.batches for row in bench.rows]
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
    """Return the outcome as the JSON file holds it."""
    kinds: dict[str, dict] = {}
    for kind in dict.fromkeys(kind for kind, _ in results):
        rows = {row: _row(r, results[kind, "plain"][0]["texts"]) for (of, row), r in results.items() if of == kind}
        speeds = {row: values["tokens_per_s"] for row, values in rows.items()}
        kinds[kind] = {"rows": rows, "ratios": common.ratios(speeds, RATIOS)}
        for turn, name in ((0, "first"), (-1, "last")):
            in_turn = {row: values["by_repeat"][turn] for row, values in rows.items()}
            kinds[kind][f"{name}_ratios"] = common.ratios(in_turn, RATIOS)
    return {
        **common.setting("exact", options),
        "kinds": kinds,
    }


def _row(repeats: list[dict], plain_texts: list[list[int]]) -> dict:
    cycles = repeats[0]["cycles"]
    drafted = sum(len(c.drafted) for c in cycles)
    spent = [statistics.median(sum(c.seconds[i] for c in r["cycles"]) for r in repeats) for i in range(3)]
    texts, speeds = repeats[0]["texts"], [r["tokens"] / r["seconds"] for r in repeats]
    return {
        "tokens_per_s": statistics.median(speeds),
        "by_repeat": speeds,
        "tokens_per_cycle": sum(len(c.emitted) for c in cycles) / len(cycles) if cycles else None,
        "acceptance": sum(c.accepted for c in cycles) / drafted if drafted else None,
        "time_shares": [s / sum(spent) for s in spent] if cycles else None,
        "same_texts": sum(a == b for a, b in zip(texts, plain_texts, strict=True)),
        "texts": len(texts),
        "first_differences": [_first_difference(a, b) for a, b in zip(texts, plain_texts, strict=True)],
    }


def _first_difference(a: list[int], b: list[int]) -> int | None:
    """Return the first position where two texts differ, None where they are equal."""
    return next((i for i, (x, y) in enumerate(itertools.zip_longest(a, b)) if x != y), None)


def show(outcome: dict) -> None:
    """Print a table and the ratios for each kind of prompt."""
    common.print_setting(outcome)
    for kind, result in outcome["kinds"].items():
        print(f"\n{kind}")
        common.print_table(
            ["", "tokens/s", "first", "last", "tokens/cycle", "held", "draft", "verify", "choose", "same texts"],
            [
                [
                    name,
                    row["tokens_per_s"],
                    row["by_repeat"][0],
                    row["by_repeat"][-1],
                    row["tokens_per_cycle"],
                    row["acceptance"],
                    *(row["time_shares"] or [None] * 3),
                    f"{row['same_texts']} of {row['texts']}",
                ]
                for name, row in result["rows"].items()
            ],
        )
        for pair, value in result["ratios"].items():
            first, last = (result[f"{name}_ratios"][pair] for name in ("first", "last"))
            print(f"  {pair:26} {value:.2f} (first {first:.2f}, last {last:.2f})")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = common.command_line(__doc__, "model", "dtype", "threads", "repeats", "json", "record")
    all_rows = {*ROWS, *CONTEXT_ROWS, *IN_12_BITS}
    parser.add_argument("--new-tokens", type=common.number(16), default=96, help="tokens per text (%(default)s)")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS, help="of prompts (all)")
    parser.add_argument("--prompts", type=common.number(1), default=2, help="of each group (%(default)s)")
    parser.add_argument(
        "--batch", nargs="+", type=common.number(1), metavar="N", help="batches of mixed prompts instead"
    )
    parser.add_argument(
        "--context", nargs="+", type=common.number(16), metavar="N", help="prompts of so many tokens instead"
    )
    parser.add_argument(
        "--rows", nargs="+", choices=all_rows, metavar="ROW", help="to measure besides plain (default: all; see above)"
    )
    parser.add_argument("--own-ends", action="store_true", help="texts end where the model ends them, not all together")
    parser.add_argument("--peers", action="store_true", help="other programs instead, where installed")
    parser.add_argument("--regret", action="store_true", help="compare the chosen draft length with fixed lengths")
    parser.add_argument("--twelve", action="store_true", help="also with the backbone's weights packed in 12 bits")
    parser.add_argument("--twins", metavar="DIR", help="packed twins, as `river quantize` writes them")
    options = parser.parse_args(arguments)
    if options.regret and options.repeats < 2:
        parser.error(
            "--regret judges the best length by other repeats than those that tell it; give --repeats 2 or more"
        )
    return options


if __name__ == "__main__":
    sys.exit(main())
