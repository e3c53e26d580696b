"""Cases of kind "threads": threads generate at the same time, with one model or each with its own.

Every text and its logits are those of the plain model, as in cases of kind "text". Each thread has separate prompts and
caches. Not handled: threads that compile or change weights while others generate.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import river_compile
from river_compile.backend import river
from river_compile.decoding.mode import exact
from tests.support.families import make
from tools.soak import text
from tools.soak.cases import Case, refused_by_us

FAMILIES = ("llama", "gpt2", "gemma3", "mixtral", "phi")


def draw(rng: random.Random) -> Case:
    texts = [
        {
            "do": rng.choice(("generate", "generate", "exact")),
            "seed": rng.randrange(1000),
            "lengths": [rng.choice((1, 3, 9)) for _ in range(rng.choice((1, 2)))],
            "cache": rng.choice(text.HELD),
            "arguments": {"max_new_tokens": rng.choice((4, 12)), "num_assistant_tokens": 3},
        }
        for _ in range(rng.choice((2, 4, 6)))
    ]
    return {
        "family": rng.choice(FAMILIES),
        "options": {"first_exit": 1, "threshold": round(rng.uniform(-1, 1), 2)},
        "models": rng.choice((1, 1, 2)),
        "threads": rng.choice((2, 2, 3)),
        "warm": rng.random() < 0.5,
        "texts": texts,
    }


def run(case: Case, folder: Path) -> str:
    """Generate the texts one by one with plain models, then all at the same time."""
    torch._dynamo.reset()
    numbers = range(case["models"])
    plain, ours = ([make(case["family"], seed=i, layers=2) for i in numbers] for _ in range(2))
    jobs = [(i % case["models"], step) for i, step in enumerate(case["texts"])]
    expected = [text.generate(plain[i], step, {}) for i, step in jobs]
    for model in ours:
        model.compile(backend=river, options={**text.ALWAYS, **case["options"]})

    def ours_of(job: tuple[int, Case]) -> object:
        model, step = job
        more = {"custom_generate": exact} if step["do"] == "exact" else {}
        try:
            return text.generate(ours[model], step, more)
        except ValueError as error:
            if refused_by_us(error):
                return None
            raise

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", river_compile.RiverWarning)
        if case["warm"]:
            [*map(ours_of, jobs[: case["models"]])]
        with ThreadPoolExecutor(case["threads"]) as pool:
            found = [*pool.map(ours_of, jobs)]
    outcomes = {
        "refused" if got is None else text.compare(got, wanted, len(step["lengths"]), text.TOLERANCE["float32"])
        for got, wanted, (_, step) in zip(found, expected, jobs, strict=True)
    }
    return next((outcome for outcome in sorted(outcomes) if outcome != "passed"), "passed")


def smaller(case: Case) -> Iterator[Case]:
    texts = case["texts"]
    if len(texts) > 2:
        for i in range(len(texts)):
            yield {**case, "texts": [*texts[:i], *texts[i + 1 :]]}
    if case["models"] > 1:
        yield {**case, "models": 1}
