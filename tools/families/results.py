"""Results of model types: kept in `docs/models.jsonl`, shown in `docs/models.md`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import transformers

from .check import TOLERANCE, Outcome

ROOT = Path(__file__).resolve().parents[2]
KNOWN = ROOT / "docs" / "models.jsonl"
PAGE = ROOT / "docs" / "models.md"
RESULTS = ("rewritten", "partly in 16 bits", "refused", "cannot be built", "failed")
_POPULAR = (
    "llama llama4_text qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next qwen3_5_text qwen3_5_moe_text gemma gemma2 "
    "gemma3_text gemma3n_text gemma4_text mistral ministral3 mixtral phi phi3 deepseek_v2 deepseek_v3 gpt_oss glm4 "
    "glm4_moe minimax_m2 olmo2 olmo3 granite smollm3 cohere2 exaone4 ernie4_5 starcoder2 stablelm falcon gpt2 "
    "gpt_neo gpt_neox gptj opt bloom mpt gpt_bigcode codegen"
)
POPULAR = tuple(_POPULAR.split())
SHOWN = ("supported", "partial", "unsupported", "not built", "failed")  # the same in the page, in this order
COLUMNS = ("model type", "support", "caches", "exact", "4-bit matmuls per layer", "reason, or what stays in 16 bits")


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
    total = ", ".join(f"{counts[result]} {shown}" for result, shown in zip(RESULTS, SHOWN, strict=True))
    return f"""# Models

The result for every causal language model type of transformers {transformers.__version__}: {total}.
Each was tried as a tiny random model in float32. `river check MODEL` tells for one model, from its configuration.

- **supported**: with unquantized twins, generation at full depth, at depth 0 and in between has the output of plain
  generation, and its logits within {TOLERANCE:g} (or the distance between float32 and float64 if that is more).
- **partial**: the same, and some matrices of the twins stay in 16 bits.
- **unsupported**: the plain model runs, with a warning that names the reason.
- **not built**: transformers makes no generating model of this type from a configuration alone.
- **failed**: wrong, crashed or hung.

`caches`: static and dynamic KV caches that work. `exact`: exact mode, where it was tried.
`make families` writes this page, in an hour or more. [models.jsonl](models.jsonl) has more of each row.

## Popular model types

Open families whose downloads the ATOM Report follows (Brand and Lambert 2026, arXiv 2604.07190), and older ones that
are still among the text generation models on the Hub:

{_table([known[name] for name in sorted(POPULAR)])}
## All others

{_table([known[name] for name in sorted({*known}.difference(POPULAR))])}"""


def _table(outcomes: Sequence[Outcome]) -> str:
    head = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
    return head + "".join(f"| {' | '.join(row(outcome))} |\n" for outcome in outcomes)


def row(outcome: Outcome) -> tuple[str, ...]:
    """Return a type's cells."""
    kept = [f"{reason} ({len(names)})" for reason, names in sorted(outcome.kept.items())]
    without = [f"{kind} cache: {why}" for kind, why in outcome.without.items() if outcome.depths]
    reason = [outcome.reason] if outcome.reason else []
    exact, _, why_not = outcome.exact.partition(": ")
    cells = (
        f"`{outcome.model_type}`",
        SHOWN[RESULTS.index(outcome.result)],
        ", ".join(outcome.depths),
        {"equal": "yes", "refused": "no"}.get(exact, exact),
        f"{outcome.products:g}" if outcome.depths else "",
        "; ".join([*reason, *kept, *without, *([f"exact: {why_not}"] if why_not else [])]),
    )
    return tuple(" ".join(cell.replace("|", "\\|").split()) for cell in cells)


def write_page(known: Mapping[str, Outcome], path: Path = PAGE) -> None:
    path.write_text(page(known), encoding="utf-8")


def parse(text: str) -> dict[str, dict[str, str]]:
    """Return the rows of the page's tables by model type.

    Raises:
        ValueError: a row has another number of cells than the head.
    """
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").replace("\\|", "\0").split("|")] for line in lines]
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in cells]
    return {row["model type"].strip("`"): row for row in rows if row["model type"].startswith("`")}
