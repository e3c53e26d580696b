"""How near each way to run a model in 16 bits is to the model in float32, token by token on a text that all are given.

    python -m benchmarks.nearness --model gemma3-270m --texts 24 --new-tokens 48 --json nearness.json

The text is the float32 model's own greedy one, given to transformers, `model.compile()` and `accelerate` by tokens.
Columns: mean KL divergence from float32 in nats, and how often the most likely next token is float32's.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks import common
from benchmarks.prompts import mixed
from river_compile.cli import shared
from tools import demo_models

if TYPE_CHECKING:
    from torch import Tensor

ROWS = ("eager", "inductor", "river")


def forced_logits(model: Any, texts: Sequence[Tensor], prompts: Sequence[int]) -> list[Tensor]:
    """Return each text's logits ``[T - prompt, V]`` for the tokens of ids ``[1, T]`` behind its prompt."""
    from river_compile.evaluation.meter import TextDecoder

    decoder = TextDecoder(model, max(ids.shape[1] for ids in texts))  # (another capacity would be another graph)
    return [decoder.logits(ids[:, :-1], prompt - 1).float() for ids, prompt in zip(texts, prompts, strict=True)]


def compare(reference: Tensor, logits: Tensor) -> tuple[float, int]:
    """Return the sum of KL divergences in nats, and how many most likely tokens are the reference's."""
    from river_compile.kernels.portable import token_kl

    agreed = int((reference.argmax(-1) == logits.argmax(-1)).sum())
    return token_kl(reference, logits).sum().item(), agreed


def measure(name: str, count: int, tokens: int, dtype: str) -> dict[str, dict[str, float]]:
    """Return KL and agreement of each row."""
    import torch

    import river_compile
    from benchmarks.texts import greedy

    exact, tokenizer = demo_models.load(name, "float32")
    prompts = [shared.encode(tokenizer, prompt) for prompt in itertools.islice(mixed(), count)]
    with torch.no_grad():
        texts = [greedy(exact, prompt, prompt.shape[1] + tokens) for prompt in prompts]
    lengths = [prompt.shape[1] for prompt in prompts]
    references = forced_logits(exact, texts, lengths)
    del exact
    make: dict[str, Callable[[Any], object]] = {
        "eager": lambda model: None,
        "inductor": lambda model: model.compile(),
        "river": river_compile.accelerate,
    }
    rows = {}
    for row in ROWS:
        model, _ = demo_models.load(name, dtype)
        make[row](model)
        sums = [0.0, 0]
        for reference, logits in zip(references, forced_logits(model, texts, lengths), strict=True):
            kl, agreed = compare(reference, logits)
            sums = [sums[0] + kl, sums[1] + agreed]
        total = sum(map(len, references))
        rows[row] = {"kl": sums[0] / total, "agreement": sums[1] / total, "tokens": total}
        print(f"{row}: KL {rows[row]['kl']:.5f}, {rows[row]['agreement']:.1%} of {total} tokens", file=sys.stderr)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = common.command_line(__doc__, "model", "dtype", "new-tokens", "threads", "json", new_tokens=24)
    parser.add_argument("--texts", type=common.number(1), default=12, help="how many texts (%(default)s)")
    options: argparse.Namespace = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(options.threads)
    shared.quiet()
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
