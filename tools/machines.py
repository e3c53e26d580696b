"""Predicted tokens/s by memory bandwidth and model, from the bytes that `benchmarks.reads` recorded.

A token takes as long as its weights take to be read. Not handled: arithmetic, attention, the KV cache and waits between
threads, which small models and machines of much bandwidth meet first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

BANDWIDTHS = (20, 40, 80, 200, 400)  # GB/s
DRAFTED, KEPT = 3, 3.3  # tokens of a cycle in exact mode, as measured with Qwen2.5-Coder-1.5B
FAST_LAYERS = 2  # 16-bit layers of a token with quality="fast": the mean exit depth of SmolLM2 is 2.05
LARGEST = 500  # tokens/s, above which a token's fixed costs, which are not predicted, are most of its time
_IN_12_BITS = 12 / 16  # of the bytes of bfloat16 weights
_IN_4_BITS = 4.5 / 16  # with a scale and a zero point for each group


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the Markdown table of a run of `benchmarks.reads`."""
    rows: dict[str, dict[str, float]] = {}
    for record in records:
        rows.setdefault(record["row"], {})[record["key"]] = record["value"]
    heads = ["model", "parameters", "memory, GB", *(f"{bandwidth} GB/s" for bandwidth in BANDWIDTHS)]
    lines = [" | ".join(heads), "---|" + "---:|" * (len(heads) - 2) + "---:"]
    for name, sizes in rows.items():
        per_token = bytes_per_token(sizes)
        cells = (" / ".join(_rate(gb * 1e9 / count) for count in per_token.values()) for gb in BANDWIDTHS)
        title = [name, f"{sizes['parameters'] / 1e9:.2g}B", _rounded(memory_bytes(sizes) / 1e9)]
        lines.append(" | ".join([*title, *cells]))
    return "".join(f"| {line} |\n" if not line.startswith("---") else f"|{line}|\n" for line in lines)


def bytes_per_token(sizes: Mapping[str, float]) -> dict[str, float]:
    """Return the bytes of weights that a token reads with plain bfloat16, in exact mode and with quality="fast"."""
    blocks, twins, head = sizes["blocks_bytes"], sizes["twins_bytes"], sizes["head_bytes"]
    share = FAST_LAYERS / sizes["blocks"]
    cycle = _IN_12_BITS * (blocks + head) + DRAFTED * (twins + _IN_4_BITS * head)
    fast = share * _IN_12_BITS * blocks + (1 - share) * twins + _IN_4_BITS * head
    return {"plain": blocks + head, "exact": cycle / KEPT, "fast": fast}


def memory_bytes(sizes: Mapping[str, float]) -> float:
    """Return the bytes of weights that River keeps in memory: in 12 bits, in 4 bits, and other ones in 16."""
    read = sizes["blocks_bytes"] + sizes["head_bytes"]
    others = 2 * sizes["parameters"] - read  # embeddings that are no head
    return _IN_12_BITS * read + sizes["twins_bytes"] + _IN_4_BITS * sizes["head_bytes"] + others


def _rate(tokens_per_s: float) -> str:
    return f"{LARGEST}+" if tokens_per_s > LARGEST else _rounded(tokens_per_s)


def _rounded(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"
