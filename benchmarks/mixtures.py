"""Decode speed of mixtures of experts with random weights, by what holds the experts, and of what a token reads.

    python -m benchmarks.mixtures [--shape 1.3b] [--rows eager 16bit 12bit 4bit exact start] [--new-tokens 64]

"eager" is transformers; "16bit" and "12bit" are full depth without drafts; "4bit" runs all layers in 4 bits; "exact"
drafts; "start" has the default options. Every row is a separate process, which builds the model, generates a token
(first call), then the text `--repeats` times. GB/s are the bytes that a token reads times tokens/s; the KV cache is
left out. `--sharpen` multiplies the head, which makes texts more predictable. Random weights say nothing about the
text, and little about drafts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

import river_compile
from benchmarks import common

_PROMPT, _HEAD = 32, 64  # tokens, features
_FULL = "full depth"
_SPEED = {"background_packing": False}  # rows whose speed counts wait for their weights
_OPTIONS: dict[str, dict[str, Any]] = {
    "16bit": {"quality": "fast", "exit_depth": _FULL, "target_weights": "model", **_SPEED},
    "12bit": {"quality": "fast", "exit_depth": _FULL, "target_weights": "12bit", **_SPEED},
    "4bit": {"quality": "fast", "exit_depth": 0, "quantizer": "mse", "target_weights": "model", **_SPEED},
    "exact": {"target_weights": "12bit", "quantizer": "mse", **_SPEED},
    "start": {},
}
ROWS = ("eager", *_OPTIONS)
_BITS = {  # of a weight
    "eager": {"experts": 16, "other": 16},
    "16bit": {"experts": 16, "other": 16},
    "12bit": {"experts": 12, "other": 12},
    "4bit": {"experts": 4.5, "other": 4.5},
}


@dataclass(frozen=True)
class Shape:
    layers: int
    hidden: int
    heads: int
    experts: int
    chosen: int
    intermediate: int  # of an expert
    vocabulary: int


SHAPES = {
    "1.3b": Shape(12, 1024, 16, 64, 8, 512, 32000),
    "30b-a3b": Shape(8, 2048, 32, 128, 8, 768, 32000),  # eight of its 48 layers
    "tiny": Shape(2, 64, 4, 8, 2, 32, 128),
}


def random_mixture(shape: Shape, sharpen: float = 1.0) -> PreTrainedModel:
    """Build a Qwen3-MoE of a shape with random bfloat16 weights, in eval mode, whose texts never end early."""
    config = Qwen3MoeConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=max(1, shape.heads // 8),
        head_dim=_HEAD,
        num_experts=shape.experts,
        num_experts_per_tok=shape.chosen,
        moe_intermediate_size=shape.intermediate,
        norm_topk_prob=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.lm_head.weight.data.mul_(sharpen)
    model.generation_config.eos_token_id = None
    return model


def bytes_of_token(shape: Shape, bits: dict[str, float]) -> int:
    """Return the bytes of weights that a token reads; `bits` of a weight in "experts" and "other" matrices."""
    attention = 2 * shape.hidden * _HEAD * (shape.heads + max(1, shape.heads // 8))
    experts = 3 * shape.chosen * shape.hidden * shape.intermediate
    layer = experts * bits["experts"] + attention * bits["other"] + shape.hidden * shape.experts * 16
    return int((shape.layers * layer + shape.vocabulary * shape.hidden * bits["other"]) / 8)


_model: list[PreTrainedModel] = []  # of this worker


def prepare(row: str, shape: str, sharpen: float) -> dict[str, Any]:
    """Build a row's model and generate a token; return the seconds that this took."""
    model = random_mixture(SHAPES[shape], sharpen)
    if row != "eager":
        layers = SHAPES[shape].layers
        options = {key: layers if value == _FULL else value for key, value in _OPTIONS[row].items()}
        river_compile.accelerate(model, options.pop("quality", "exact"), **options)
    _model.append(model)
    return {"first_s": generate(1)["seconds"], "warm_s": generate(_PROMPT)["seconds"]}


def generate(tokens: int) -> dict[str, Any]:
    """Generate so many tokens after the same prompt; return ids and seconds."""
    (model,) = _model
    ids = torch.randint(1, model.config.vocab_size, (1, _PROMPT), generator=torch.Generator().manual_seed(1))
    begun = time.perf_counter()
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return {"seconds": time.perf_counter() - begun, "ids": made[0, _PROMPT:].tolist()}


def measure(row: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one row; return the seconds of its first call, tokens/s and the text."""
    with closing(common.Worker("benchmarks.mixtures", row, options.threads)) as worker:
        found = worker.ask("prepare", row=row, shape=options.shape, sharpen=options.sharpen)
        worker.ask("generate", tokens=options.new_tokens)
        speeds, text = [], []
        for _ in range(options.repeats):
            first, whole = (worker.ask("generate", tokens=tokens) for tokens in (1, options.new_tokens))
            speeds.append((options.new_tokens - 1) / (whole["seconds"] - first["seconds"]))
            text = whole["ids"]
    return {**found, "tokens_per_s": statistics.median(speeds), "text": text}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = common.command_line(__doc__, "new-tokens", "repeats", "threads", "json", "worker", new_tokens=64)
    parser.add_argument("--shape", choices=SHAPES, default="1.3b", help="of the model (%(default)s)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="which (all)")
    parser.add_argument("--sharpen", type=float, default=1.0, help="factor of the head (%(default)s)")
    options = parser.parse_args(arguments)
    if options.worker:
        common.serve({"prepare": prepare, "generate": generate})
        return 0
    rows = {name: measure(name, options) for name in options.rows}
    outcome = {**common.setting("mixtures", argparse.Namespace(**vars(options), model=options.shape)), "rows": rows}
    outcome["machine"] |= common.memory_speed(options.threads)
    speed = outcome["machine"]["bandwidth_bytes_per_s"]
    print(f"memory at {speed / 1e9:.1f} GB/s, {options.threads} threads")
    table = []
    for name, row in rows.items():
        read = bytes_of_token(SHAPES[options.shape], _BITS[name]) if name in _BITS else None
        rate = read and read * row["tokens_per_s"]
        same = row["text"] == rows["16bit"]["text"] if "16bit" in rows else None
        megabytes, share = read and read / 1e6, rate and rate / speed
        table.append([name, row["first_s"], row["tokens_per_s"], megabytes, rate and rate / 1e9, share, str(same)])
    heads = ["row", "first call s", "tokens/s", "MB a token", "GB/s", "of memory's speed", "text of 16bit"]
    common.print_table(heads, table)
    common.write_outcome(outcome, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
