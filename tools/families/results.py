"""Results of model types: kept in `docs/models.jsonl`, shown in `docs/models.md`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import transformers

from .check import TOLERANCE, Outcome

ROOT = Path(__file__).resolve().parents[2]
KNOWN = ROOT / "docs" / "models.jsonl"
PAGE = ROOT / "docs" / "models.md"
RESULTS = ("rewritten", "partly in 16 bits", "refused", "cannot be built", "failed")
POPULAR = (
    *(
        "llama",
        "llama4_text",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "qwen3_next",
        "qwen3_5_text",
        "qwen3_5_moe_text",
    ),
    *(
        "gemma",
        "gemma2",
        "gemma3_text",
        "gemma3n_text",
        "gemma4_text",
        "mistral",
        "ministral3",
        "mixtral",
        "phi",
        "phi3",
    ),
    *(
        "deepseek_v2",
        "deepseek_v3",
        "gpt_oss",
        "glm4",
        "glm4_moe",
        "minimax_m2",
        "olmo2",
        "olmo3",
        "granite",
        "smollm3",
    ),
    *(
        "cohere2",
        "exaone4",
        "ernie4_5",
        "starcoder2",
        "stablelm",
        "falcon",
        "gpt2",
        "gpt_neo",
        "gpt_neox",
        "gptj",
        "opt",
    ),
    *("bloom", "mpt", "gpt_bigcode", "codegen"),
)
COLUMNS = ("model type", "result", "equal at depths", "4-bit products per block", "stays in 16 bits")


def load(path: Path = KNOWN) -> dict[str, Outcome]:
    """Return what is known, by model type."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {outcome.model_type: outcome for outcome in (Outcome(**json.loads(line)) for line in lines)}


def save(known: Mapping[str, Outcome], path: Path = KNOWN) -> None:
    """Write what is known, a line for each model type; the file appears whole or not at all."""
    lines = [json.dumps(dataclasses.asdict(known[name])) + "\n" for name in sorted(known)]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(lines), encoding="utf-8")
    partial.replace(path)


def sources() -> str:
    """Return a digest of what results depend on: this project's sources and the version of transformers."""
    digest = hashlib.sha256(transformers.__version__.encode())
    for folder in ("river_compile", "passes", "kernels", "tools/families"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def page(known: Mapping[str, Outcome]) -> str:
    """Return `docs/models.md`."""
    counts = Counter(outcome.result for outcome in known.values())
    total = ", ".join(f"{counts[result]} {result}" for result in RESULTS)
    rows = [" | ".join(row(known[name])) for name in sorted(known)]
    return f"""# Models

What the backend makes of every causal language model in transformers {transformers.__version__},
tried on tiny random models in float32: {total}.

`make families` writes this page anew (an hour or more; `python -m tools.families --only llama mpt` tries these types
again and keeps the other rows). [models.jsonl](models.jsonl) has more of every row, such as names of matrices.

- **rewritten**: with unquantized twins, generation that leaves every decode step at depth 0, in the middle, before the
  last block or never gives plain generation's logits within rounding and its text, with every cache that transformers
  can use with the model. Rounding is {TOLERANCE:g}, or where that is more, the distance between plain generation in
  float32 and in float64.
- **partly in 16 bits**: the same, and twins keep some matrices of the blocks in 16 bits.
- **refused**: the plain model runs, with a warning that names the reason.
- **cannot be built**: transformers gives no model that generates text from a config alone.
- **failed**: wrong, crashed or hung.

Nobody publishes downloads by model type. These {len(POPULAR)} stand for most of the decoders that are downloaded:
the open families whose downloads the ATOM Report follows (Brand and Lambert 2026, arXiv 2604.07190), and the older ones
that keep their place among text generation models on the Hub:
{", ".join(POPULAR)}.

| {" | ".join(COLUMNS)} |
|{"---|" * len(COLUMNS)}
""" + "".join(f"| {row} |\n" for row in rows)


def row(outcome: Outcome) -> tuple[str, ...]:
    """Return a type's cells."""
    depths = [f"{kind}: {', '.join(map(str, found))}" for kind, found in outcome.depths.items()]
    depths += [f"{kind}: {why}" for kind, why in outcome.without.items() if outcome.depths]
    depths += [f"exact mode: {outcome.exact}"] if outcome.exact else []
    result = outcome.result if not outcome.reason else f"{outcome.result}: {outcome.reason}"
    kept = "; ".join(f"{reason} ({len(names)})" for reason, names in sorted(outcome.kept.items()))
    products = f"{outcome.products:g}" if outcome.depths else ""
    cells = (outcome.model_type, result, "; ".join(depths), products, kept)
    return tuple(cell.replace("|", "\\|").replace("\n", " ") for cell in cells)


def write_page(known: Mapping[str, Outcome], path: Path = PAGE) -> None:
    path.write_text(page(known), encoding="utf-8")


def parse(text: str) -> list[dict[str, str]]:
    """Return the rows of the page's table.

    Raises:
        ValueError: a row has another number of cells than the head.
    """
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").replace("\\|", "\0").split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]
