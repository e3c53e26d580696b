"""The prompts of `benchmarks.decode` and `benchmarks.start`: four kinds, after contexts of some lengths.

A context is a document before the question, of which as much is taken as makes the whole prompt so many tokens long. A
question that is longer itself has no document. No prompt is in the texts that twins are calibrated on.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.prompts import FIRST, MEMO
from river_compile.cli import shared
from tools.figures import cell_of

KINDS = {
    "chat": FIRST["chat"],
    "code": (*FIRST["code"], "Write a JavaScript function that merges two sorted lists."),
    "story": (
        "Write a short story about a lost key.",
        "Tell a story about a bicycle that nobody wants to buy.",
        "Write the first page of a novel that begins on a night train.",
    ),
    "edit": (*FIRST["edit"], f"Repeat this text and change 'coffee' to 'tea':\n{MEMO}"),
}
CONTEXTS = (32,)  # by default
ALL = "all"  # the prompts of all kinds


@dataclass(frozen=True)
class Prompt:
    """A prompt: its kind, the length that its context asked for, and its token ids."""

    kind: str
    context: int
    ids: list[int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--contexts`, `--kinds` and `--of-each`."""
    said = "tokens of the prompts, a document before the question included (%(default)s)"
    parser.add_argument("--contexts", nargs="+", type=common.number(1), default=[*CONTEXTS], metavar="N", help=said)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS], help="of prompts (all)")
    parser.add_argument("--of-each", type=int, choices=(1, 2, 3), default=3, help="prompts of a kind (%(default)s)")


def encoded(folder: str | Path, options: argparse.Namespace) -> list[Prompt]:
    """Return the prompts that a command line asks for, as the chat template of a model's folder writes them."""
    from transformers import AutoTokenizer

    shared.quiet()
    tokenizer, document = AutoTokenizer.from_pretrained(folder), "\n\n".join(shared.topics())
    questions = [(kind, text) for kind in options.kinds for text in KINDS[kind][: options.of_each]]
    found = []
    for context, (number, (kind, question)) in itertools.product(options.contexts, enumerate(questions)):
        own = document[number * len(document) // 20 :]  # each prompt has another passage
        found.append(Prompt(kind, context, _ids(tokenizer, own, question, context)))
    return found


def _ids(tokenizer: Any, document: str, question: str, length: int) -> list[int]:
    """Return a question's token ids with as much of a document in front as makes them `length` tokens."""
    bare = shared.encode(tokenizer, question)[0].tolist()
    if len(bare) >= length:
        return bare
    parted = shared.encode(tokenizer, f"\n\n{question}")[0].tolist()
    head = next((i for i, (a, b) in enumerate(zip(bare, parted, strict=False)) if a != b), len(bare))
    read = tokenizer(document[: 16 * length], add_special_tokens=False)["input_ids"]
    return [*parted[:head], *read[: max(length - len(parted), 0)], *parted[head:]]


def longest(prompts: Sequence[Prompt], new_tokens: int) -> int:
    """Return the tokens of the longest text."""
    return max(len(prompt.ids) for prompt in prompts) + new_tokens


def one_of_each(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return the first prompt of each kind after the first context, for brief trials."""
    return list({prompt.kind: prompt for prompt in reversed(prompts) if prompt.context == prompts[0].context}.values())


def by_kind(prompts: Sequence[Prompt], values: Mapping[str, Sequence[float]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return, by context and kind and for all kinds, the median over prompts of each measured value, and its range.

    Args:
        prompts: those that were measured.
        values: of each prompt, by name, such as "tokens_per_s".
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for context in dict.fromkeys(prompt.context for prompt in prompts):
        for kind in (ALL, *dict.fromkeys(prompt.kind for prompt in prompts)):
            chosen = [i for i, p in enumerate(prompts) if p.context == context and kind in (ALL, p.kind)]
            cell = found.setdefault(str(context), {}).setdefault(kind, {})
            for name, of_prompts in values.items():
                these = [of_prompts[i] for i in chosen]
                cell[name] = statistics.median(these)
                cell[f"least_{name}"], cell[f"most_{name}"] = min(these), max(these)
    return found


def spread(cell: Mapping[str, float], name: str = "tokens_per_s") -> str:
    """Return a median and its range as people read them: "148 (140–155)"."""
    least, median, most = (cell_of(cell[key]) for key in (f"least_{name}", name, f"most_{name}"))
    return median if least == most else f"{median} ({least}–{most})"
