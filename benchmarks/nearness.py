"""How near each way to run a model in 16 bits is to the model in float32, token by token on a text that all are given.

    python -m benchmarks.nearness
    python -m benchmarks.nearness --model gemma3-270m --texts 24 --new-tokens 48 --json nearness.json

The text is the float32 model's own greedy one after prompts of six groups (benchmarks/prompts.py). Each row is given it
one token at a time, on a static cache, and gives its logits for the next one:

    eager      transformers
    inductor   model.compile()
    river      river_compile.accelerate(model): the whole backbone, by the package's kernels

Columns: mean KL divergence from float32 in nats a token, and the share of tokens after which the most likely next one
is float32's. Two texts part at a token where the two best all but tie; the nearer row is the one that parts later.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks import common
from benchmarks.prompts import mixed
from river_compile.cli import models

if TYPE_CHECKING:
    from torch import Tensor

ROWS = ("eager", "inductor", "river")


def forced_logits(model: Any, ids: Tensor, prompt: int) -> Tensor:
    """Returns the logits ``[T - prompt, V]`` after each token of ids ``[1, T]`` from the prompt's last one on."""
    import torch
    from transformers import StaticCache

    from river_compile.upstream.transformers import cache_argument

    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=ids.shape[1])
    held: dict[str, Any] = {cache_argument(model): cache, "use_cache": True}
    found, start = [], 0
    with torch.no_grad():
        for end in range(prompt, ids.shape[1]):
            positions = torch.arange(start, end)[None]
            found.append(model(input_ids=ids[:, start:end], position_ids=positions, **held).logits[0, -1].float())
            start = end
    return torch.stack(found)


def compare(reference: Tensor, logits: Tensor) -> tuple[float, int]:
    """Returns the sum of KL divergences in nats, and how many most likely tokens are the reference's."""
    from river_compile.kernels.portable import token_kl

    agreed = int((reference.argmax(-1) == logits.argmax(-1)).sum())
    return token_kl(reference, logits).sum().item(), agreed


def measure(name: str, count: int, tokens: int, dtype: str) -> dict[str, dict[str, float]]:
    """Returns KL and agreement of each row."""
    import torch

    import river_compile
    from benchmarks.texts import greedy

    exact, tokenizer = models.load(name, "float32")
    prompts = [models.encode(tokenizer, prompt) for prompt in itertools.islice(mixed(), count)]
    with torch.no_grad():
        texts = [greedy(exact, prompt, prompt.shape[1] + tokens) for prompt in prompts]
    lengths = [prompt.shape[1] for prompt in prompts]
    references = [forced_logits(exact, ids, length) for ids, length in zip(texts, lengths, strict=True)]
    del exact
    make: dict[str, Callable[[Any], object]] = {
        "eager": lambda model: None,
        "inductor": lambda model: model.compile(),
        "river": river_compile.accelerate,
    }
    rows = {}
    for row in ROWS:
        model, _ = models.load(name, dtype)
        make[row](model)
        sums = [0.0, 0]
        for ids, length, reference in zip(texts, lengths, references, strict=True):
            kl, agreed = compare(reference, forced_logits(model, ids, length))
            sums = [sums[0] + kl, sums[1] + agreed]
        total = sum(map(len, references))
        rows[row] = {"kl": sums[0] / total, "agreement": sums[1] / total, "tokens": total}
        print(f"{row}: KL {rows[row]['kl']:.5f}, {rows[row]['agreement']:.1%} of {total} tokens", file=sys.stderr)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = common.command_line(__doc__, "model", "dtype", "new-tokens", "threads", "json", new_tokens=24)
    parser.add_argument("--texts", type=common.number(1), default=12, help="how many texts (%(default)s)")
    options: argparse.Namespace = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(options.threads)
    models.quiet()
    rows = measure(str(options.model), options.texts, options.new_tokens, options.dtype)
    outcome = {**common.setting("nearness", options), "rows": rows}
    common.print_setting(outcome)
    common.print_table(
        ["", "KL, nats a token", "next token as float32's", "tokens"],
        [[row, f"{found['kl']:.5f}", f"{found['agreement']:.1%}", found["tokens"]] for row, found in rows.items()],
    )
    common.write_outcome(outcome, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
