"""Decode speed and memory of mixtures of experts with random weights, by what holds the experts.

    python -m benchmarks.mixtures [--shape 1.3b] [--rows eager 16bit 12bit 4bit exact start] [--new-tokens 64]

"eager" is transformers; "16bit" and "12bit" are full depth without drafts, "mxfp4" is the same of gpt-oss's experts as
they come; "4bit" runs all layers in 4 bits; "exact" drafts; "start" has the default options; llama.cpp reads the same
weights. Each row is a process. GB/s leave out the KV cache. Peaks are of a process. `--sharpen` multiplies the head.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import river_compile
from benchmarks import common, peers
from benchmarks.random_mixtures import GPT_OSS, HEAD, QWEN, Shape, gpt_oss, qwen
from river_compile.record import find_record
from river_compile.reporting.timing import decode_rate
from river_compile.reporting.timing import generate as generated
from tools.families.mxfp4 import write_gpt_oss
from tools.gguf_files import write_gguf

SHAPES = {**QWEN, **GPT_OSS}
_PROMPT = 32  # tokens
_FULL = "full depth"
_SPEED = {"background_packing": False}  # rows whose speed counts wait for their weights
_OPTIONS: dict[str, dict[str, Any]] = {
    "mxfp4": {"quality": "fast", "exit_depth": _FULL, **_SPEED},
    "16bit": {"quality": "fast", "exit_depth": _FULL, "target_weights": "model", **_SPEED},
    "12bit": {"quality": "fast", "exit_depth": _FULL, "target_weights": "12bit", **_SPEED},
    "4bit": {"quality": "fast", "exit_depth": 0, "quantizer": "mse", "target_weights": "model", **_SPEED},
    "exact": {"target_weights": "12bit", "quantizer": "mse", **_SPEED},
    "start": {},
}
_LLAMA = {"llama_cpp_bf16": "BF16", "llama_cpp_q4_0": "Q4_0"}
_PEER = "llama-cpp-python"
_BITS = {"eager": 16, "16bit": 16, "12bit": 12, "4bit": 4.5, "llama_cpp_bf16": 16, "llama_cpp_q4_0": 4.5}  # of a weight
ROWS = ("eager", *_OPTIONS, *_LLAMA)


def rows_of(shape: str) -> list[str]:
    """Return the rows that can run with a shape, all of them by default."""
    if shape in GPT_OSS:
        return [row for row in ROWS if row not in ("4bit", *_LLAMA)]
    without = ["mxfp4", *(_LLAMA if peers.why_not(_PEER) else ())]
    return [row for row in ROWS if row not in without]


def bytes_of_token(shape: Shape, bits: float) -> int:
    """Return the bytes of weights that a token of a Qwen3-MoE reads, routers in 16 bits."""
    attention = 2 * shape.hidden * HEAD * (shape.heads + shape.kv_heads)
    experts = 3 * shape.chosen * shape.hidden * shape.intermediate
    layer = (experts + attention) * bits + shape.hidden * shape.experts * 16
    return int((shape.layers * layer + shape.vocabulary * shape.hidden * bits) / 8)


_model: list[PreTrainedModel] = []  # of this worker


def prepare(prompts: list[list[int]], new_tokens: int, row: str, shape: str, sharpen: float, folder: str) -> dict:
    """Build or load a row's model and warm it up; return the seconds of the first call."""
    if shape in QWEN:
        model = qwen(QWEN[shape], sharpen)
    else:
        load = river_compile.load_mxfp4 if row == "mxfp4" else AutoModelForCausalLM.from_pretrained
        model = load(folder, dtype="auto").eval()
    if row != "eager":
        layers = model.config.num_hidden_layers
        options = {key: layers if value == _FULL else value for key, value in _OPTIONS[row].items()}
        river_compile.accelerate(model, options.pop("quality", "exact"), **options)
    _model.append(model)
    first = generate(prompts[0], 2)["times"][0]
    generate(prompts[0], new_tokens)
    return {"first_token_s": first}


def generate(ids: list[int], new_tokens: int) -> dict[str, Any]:
    """Generate so many tokens; return them, and the seconds to each."""
    made = generated(_model[0], torch.tensor([ids]), new_tokens, static_cache=False)
    return {"tokens": list(made.tokens), "times": list(made.times)}


def facts() -> dict[str, Any]:
    """Return the process's peak memory and the bytes of experts that a token reads, None without River."""
    chosen = None
    if find_record(_model[0]) is not None:
        graphs: Any = river_compile.report(_model[0]).to_dict()["graphs"]
        chosen = graphs[-1]["chosen_bytes"] or None  # (twins are not counted)
    return {"peak_rss_bytes": common.peak_rss_bytes(), "chosen_bytes": chosen}


def measure(worker: common.Worker, options: argparse.Namespace, **job: Any) -> dict[str, Any]:
    """Run one row; return the seconds of its first call, tokens/s, the text and what it says of memory."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, SHAPES[options.shape].vocabulary, (_PROMPT,), generator=generator).tolist()
    tokens = options.new_tokens
    with closing(worker):
        found = worker.ask("prepare", prompts=[ids], new_tokens=tokens, **job)
        made = [worker.ask("generate", ids=ids, new_tokens=tokens) for _ in range(options.repeats)]
        speed = statistics.median(decode_rate(one["times"]) for one in made)
        return {**found, "tokens_per_s": speed, "text": made[-1]["tokens"], **worker.ask("facts")}


def measure_all(folder: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Write what the rows read into a folder, and run them one after the other."""
    shape, file = SHAPES[options.shape], folder / "model.gguf"
    if options.shape in GPT_OSS:
        size = write_gpt_oss(folder, gpt_oss(shape))
        print(f"{size / 1e6:.0f} MB of experts in the checkpoint")
    elif not _LLAMA.keys().isdisjoint(options.rows):
        write_gguf(qwen(shape, options.sharpen), file, "BF16")
    rows = {}
    for row in options.rows:
        if row not in _LLAMA:
            job = {"row": row, "shape": options.shape, "sharpen": options.sharpen, "folder": str(folder)}
            with tempfile.TemporaryDirectory() as cache:  # where first calls find nothing
                caches = {"RIVER_COMPILE_CACHE_DIR": cache}
                worker = common.Worker("benchmarks.mixtures", row, options.threads, caches)
                rows[row] = measure(worker, options, **job)
            continue
        read = file if row == "llama_cpp_bf16" else folder / f"{_LLAMA[row]}.gguf"
        if not read.exists():
            peers.convert(_PEER, file, read, _LLAMA[row])
        worker = common.Worker(peers.script(_PEER), row, options.threads, python=peers.python(_PEER))
        context = _PROMPT + options.new_tokens + 1
        rows[row] = measure(worker, options, file=str(read), threads=options.threads, context=context)
    return rows


def table(rows: Mapping[str, Mapping[str, Any]], shape: str, speed: float) -> list[list[object]]:
    """Return the printed lines; `speed` is the memory's, in bytes a second."""
    same_as = next((rows[row]["text"] for row in ("16bit", "mxfp4") if row in rows), None)
    lines: list[list[object]] = []
    for name, row in rows.items():
        read = bytes_of_token(SHAPES[shape], _BITS[name]) if name in _BITS and shape in QWEN else None
        rate = read and read * row["tokens_per_s"]
        experts, peak = row.get("chosen_bytes"), row["peak_rss_bytes"]
        megabytes = [size and size / 1e6 for size in (experts, read)]
        rates = [rate and rate / 1e9, rate and rate / speed]
        same = str(row["text"] == same_as)
        lines.append([name, row["first_token_s"], row["tokens_per_s"], *megabytes, *rates, peak / 1e6, same])
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = common.command_line(__doc__, "new-tokens", "repeats", "threads", "json", "worker", new_tokens=64)
    parser.add_argument("--shape", choices=SHAPES, default="1.3b", help="of the model (%(default)s)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="which (all that the shape and this machine have)")
    parser.add_argument("--sharpen", type=float, default=1.0, help="factor of the head (%(default)s)")
    options = parser.parse_args(arguments)
    if options.worker:
        common.serve({"prepare": prepare, "generate": generate, "facts": facts})
        return 0
    can = rows_of(options.shape)
    options.rows = options.rows or can
    for row in set(options.rows) - set(can):
        why = peers.why_not(_PEER) if row in _LLAMA and options.shape in QWEN else f"{options.shape} has no such row"
        parser.error(f"{row}: {why}")
    with tempfile.TemporaryDirectory() as folder:
        rows = measure_all(Path(folder), options)
    outcome = {**common.setting("mixtures", argparse.Namespace(**vars(options), model=options.shape)), "rows": rows}
    outcome["machine"] |= common.memory_speed(options.threads)
    speed = outcome["machine"]["bandwidth_bytes_per_s"]
    print(f"memory at {speed / 1e9:.1f} GB/s, {options.threads} threads")
    heads = ["row", "first call s", "tokens/s", "experts, MB a token", "MB a token", "GB/s", "of memory's speed"]
    common.print_table([*heads, "peak, MB", "same text"], table(rows, options.shape, speed))
    common.write_outcome(outcome, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
