"""Decode speed and memory of a random gpt-oss checkpoint, its experts in MXFP4 or dequantized.

    python -m benchmarks.mxfp4 [--shape 4-layers] [--rows mxfp4 16bit found] [--new-tokens 48]

"mxfp4" loads by `river_compile.load_mxfp4`; the others are dequantized by transformers: "16bit" multiplies them so,
"found" packs them again, which finds MXFP4. All run at full depth without drafts, and their texts are compared. Every
row is a separate process. Peaks are of the whole process, imports and compilers too; Linux only.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GptOssConfig, PreTrainedModel

import river_compile
from benchmarks import common
from tools.families.mxfp4 import write_gpt_oss

_PROMPT = 32  # tokens
SHAPES = {  # layers, hidden size and that of an expert, experts
    "4-layers": (4, 2880, 32),  # of the 24 of gpt-oss-20b
    "small": (4, 1024, 32),
    "tiny": (2, 64, 4),
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "mxfp4": {},
    "16bit": {"target_weights": "model"},
    "found": {"target_weights": "12bit"},
}
_model: list[PreTrainedModel] = []  # of this worker


def config_of(shape: str) -> GptOssConfig:
    """Return the configuration of a shape, whose texts never end early."""
    layers, hidden, experts = SHAPES[shape]
    heads = max(2, hidden // 360 * 8)
    return GptOssConfig(
        num_hidden_layers=layers, hidden_size=hidden, intermediate_size=hidden, num_local_experts=experts,
        num_experts_per_tok=min(4, experts), vocab_size=8192, num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 8), head_dim=64, max_position_embeddings=4096, bos_token_id=1,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip


def peak_bytes() -> int:
    """Return the most memory that this process has had."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    return int(found[1]) * 1024


def prepare(row: str, folder: str) -> dict[str, Any]:
    """Load a row's model and generate a token; return seconds and the process's peaks."""
    begun, before = time.perf_counter(), peak_bytes()
    load = river_compile.load_mxfp4 if row == "mxfp4" else AutoModelForCausalLM.from_pretrained
    model = load(folder, dtype="auto").eval()
    loaded = time.perf_counter() - begun
    layers = model.config.num_hidden_layers
    river_compile.accelerate(model, "fast", exit_depth=layers, background_packing=False, **_OPTIONS[row])
    _model.append(model)
    first = generate(1)["seconds"]
    graph = river_compile.report(model).to_dict()["graphs"][-1]
    sizes = {key: graph[key] for key in ("expert_bytes", "chosen_bytes")}
    return {"load_s": loaded, "first_s": first, "imports_bytes": before, "peak_bytes": peak_bytes(), **sizes}


def generate(tokens: int) -> dict[str, Any]:
    """Generate so many tokens after the same prompt; return ids and seconds."""
    (model,) = _model
    ids = torch.randint(1, model.config.vocab_size, (1, _PROMPT), generator=torch.Generator().manual_seed(1))
    begun = time.perf_counter()
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return {"seconds": time.perf_counter() - begun, "ids": made[0, _PROMPT:].tolist()}


def measure(row: str, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one row; return what `prepare` does, tokens/s and the text."""
    with closing(common.Worker("benchmarks.mxfp4", row, options.threads)) as worker:
        found = worker.ask("prepare", row=row, folder=folder)
        worker.ask("generate", tokens=options.new_tokens)
        speeds, text = [], []
        for _ in range(options.repeats):
            first, whole = (worker.ask("generate", tokens=tokens) for tokens in (1, options.new_tokens))
            speeds.append((options.new_tokens - 1) / (whole["seconds"] - first["seconds"]))
            text = whole["ids"]
    return {**found, "tokens_per_s": statistics.median(speeds), "text": text}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = common.command_line(__doc__, "new-tokens", "repeats", "threads", "json", "worker", new_tokens=48)
    parser.add_argument("--shape", choices=SHAPES, default="4-layers", help="of the model (%(default)s)")
    parser.add_argument("--rows", nargs="+", choices=_OPTIONS, default=[*_OPTIONS], help="which (all)")
    options = parser.parse_args(arguments)
    if options.worker:
        common.serve({"prepare": prepare, "generate": generate})
        return 0
    with tempfile.TemporaryDirectory() as folder:
        size = write_gpt_oss(Path(folder), config_of(options.shape))
        rows = {name: measure(name, folder, options) for name in options.rows}
    outcome = {**common.setting("mxfp4", argparse.Namespace(**vars(options), model=options.shape)), "rows": rows}
    print(f"{size / 1e6:.0f} MB of experts in the checkpoint, {options.threads} threads")
    table = []
    for name, row in rows.items():
        bytes_of = [row[key] / 1e6 for key in ("chosen_bytes", "imports_bytes", "peak_bytes")]
        same = str(row["text"] == next(iter(rows.values()))["text"])
        table.append([name, row["load_s"], row["first_s"], row["tokens_per_s"], *bytes_of, same])
    names = ["row", "load s", "first call s", "tokens/s", "experts a token, MB", "imports, MB", "peak, MB", "same text"]
    common.print_table(names, table)
    common.write_outcome(outcome, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
