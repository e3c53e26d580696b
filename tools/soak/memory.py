"""Cases of kind "memory": memory and live tensors stay flat over many tokens.

A tiny model generates text after text, in the way that the case says, with new caches and prompts of several lengths.
After a warm-up of a quarter of the tokens, a line through samples of memory (resident bytes) and of live tensors over
tokens must not rise by more than noise. Memory that the allocator holds though nothing uses it is given back before
each sample: how much that is depends on what the process did before.

A token counts once for each row that it was decoded in.
"""

from __future__ import annotations

import gc
import random
import statistics
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import river_compile
from river_compile.backend import river
from river_compile.decoding.mode import exact
from river_compile.system import trim_heap
from tools.soak import text
from tools.soak.cases import Case, Failure

TOKENS = 100_000
BYTES_PER_TOKEN, TENSORS_PER_TOKEN = 20.0, 0.002  # what rises faster leaks
_STEPS, _ROWS, _SAMPLES = 100, 32, 20


def draw(rng: random.Random) -> Case:
    options = {"first_exit": 1, "threshold": round(rng.uniform(-0.5, 1), 2)}
    if rng.random() < 0.3:
        options = {"criterion": "confidence", "first_exit": 1}
    ways = [rng.choice(("generate", "exact")), rng.choice(text.HELD)]
    return {"options": options, "do": ways[0], "cache": ways[1], "tokens": TOKENS, "seed": rng.randrange(1000)}


def run(case: Case, folder: Path) -> str:
    """Generate the tokens, fit the lines and print their slopes."""
    torch._dynamo.reset()
    model = tiny_model()
    model.compile(backend=river, options={**text.ALWAYS, **case["options"]})
    number = iter(range(10**9))

    def some_tokens() -> int:
        seed = case["seed"] + next(number)
        step = {"lengths": [5 + seed % 7] * _ROWS, "seed": seed, "cache": case["cache"]}
        step["arguments"] = {"max_new_tokens": _STEPS, "num_assistant_tokens": 3}
        more = {"custom_generate": exact} if case["do"] == "exact" else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", river_compile.RiverWarning)
            text.generate(model, step, more)
        return _STEPS * _ROWS

    memory, tensors = slopes(some_tokens, case["tokens"])
    print(f"memory: {memory:+.2f} bytes and {tensors:+.5f} tensors a token over {case['tokens']} tokens ({case})")
    if tensors > TENSORS_PER_TOKEN or memory > BYTES_PER_TOKEN:
        raise Failure(f"memory rises by {memory:.1f} bytes and {tensors:.4f} tensors a token")
    return "passed"


def smaller(case: Case) -> Iterator[Case]:
    yield from ()


def slopes(some_tokens: Callable[[], int], tokens: int) -> tuple[float, float]:
    """Return how many resident bytes, and how many live tensors, each token adds.

    Args:
        some_tokens: generates some tokens and returns how many.
        tokens: how many in all; a quarter of them warms up.
    """
    done = 0
    samples = []
    for sample in range(_SAMPLES + 1):
        while done < tokens * (1 + 3 * sample / _SAMPLES) / 4:
            done += some_tokens()
        tensors_now = live_tensors()  # collects garbage, which memory is measured without
        samples.append((done, resident_bytes(), tensors_now))
    at, memory, tensors = zip(*samples, strict=True)
    return statistics.linear_regression(at, memory).slope, statistics.linear_regression(at, tensors).slope


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def resident_bytes() -> int:
    trim_heap()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


def tiny_model() -> LlamaForCausalLM:
    """Return a Llama of two blocks, as small as one can be."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=512, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    return model
