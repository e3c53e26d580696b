"""Results of model types: kept in `docs/models.jsonl`, shown in `docs/models.md`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import transformers

from .check import DRAFTED, PLAIN, TOLERANCE, UNDRAFTED, Outcome

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
BACKEND = ("all matrices", "part in 16 bits", "no", "not built", "failed")  # of the page, in the order of `RESULTS`
COLUMNS = (
    "model type",
    "accelerate",
    "backend",
    "caches",
    "4-bit matmuls per layer",
    "reason, or what stays in 16 bits",
)
_ROUTERS = "[routers](guides/moe.md)"
# What the reasons of the passes mean to someone who has a model and no graph, the first that matches.
_WORDS = (
    (r"a weight of shape .* that no plain linear layer reads", "weights that no linear layer reads"),
    (r"a router: .*", _ROUTERS),
    (r"\d+ input features have no group of \d+ or more", "matrices too small for groups of 32"),
    (
        r"Exact mode removes rejected tokens, which the recurrent state of .*",
        "a recurrent state cannot take drafts back",
    ),
    (r"Exact mode removes rejected tokens, which .* masks count the slots .*", "masks depend on the size of the cache"),
    (r"Exact mode removes rejected .* which sees what its sliding .*", "a cache that slides cannot take drafts back"),
    (r"Exact mode removes rejected .* KV cache layers of kind .*", "its KV cache cannot take drafts back"),
    (r"Exact mode verifies several new tokens in one pass, .*", "its code reads the whole text at every step"),
    (r"use_cache=False is not available.*", "generates without a KV cache"),
    (r".*the (?:blocks|layers) write no KV cache.*", "a layer keeps no KV cache"),
    (r".*Dynamo broke the graph here: .*\((.*)\)", r"Dynamo cannot trace its code in one piece (\1)"),
    (r".*no decoder (?:blocks|layers): .*", "layers of several classes"),
    (r".*one hidden state must pass .*|.*do not run one after the other.*", "layers that pass on more than one state"),
    (r".*steps ran in a graph for prompts.*", "its code reads the whole text at every step"),
    (r"Exact mode requires a model that backend='river' can rewrite: .*", "unsupported by the backend"),
    (r".*requires the (\w+) library.*", r"requires \1"),
    (r"transformers cannot: .*", "transformers cannot"),
    (r".*Error: .*", "transformers makes none from a configuration alone"),
)


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
    folders = ("river_compile", "passes", "kernels")
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    for file in (*files, ROOT / "tools/families/check.py", ROOT / "tools/families/tiny.py"):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def page(known: Mapping[str, Outcome]) -> str:
    """Return `docs/models.md`."""
    count = Counter(accelerate(outcome) for outcome in known.values())
    rewritten = sum(outcome.result in RESULTS[:2] for outcome in known.values())
    yes, undrafted, plain = count["yes"], count["no drafts"], count["no"]
    untried, total = count["not built"] + count["not tried"], f"{len(known)} causal language model types"
    return f"""# Models

Does `accelerate` make your model faster? Look up its type here (`model_type` in its `config.json`), or ask
`river check MODEL`, which reads the configuration alone.

Of {total} of transformers {transformers.__version__}, `accelerate` speeds up {yes + undrafted}:
{yes} with drafts, {undrafted} without. {plain} run at transformers' speed, {untried} could not be tried,
{count["failed"]} failed.
Each was tried as a tiny random model in float32: the output of `accelerate` is the plain model's.

- **accelerate**: "yes" with drafts; "no drafts": River's kernels decode token by token; "no": transformers' own loop
  runs, with a warning that names the reason.
- **backend**: what `torch.compile(backend="river")` and `quality="fast"` rewrite: {rewritten} types. With unquantized
  twins, generation at full depth, at depth 0 and in between has the output of plain generation, and its logits within
  {TOLERANCE:g} (or the distance between float32 and float64 if that is more). "part in 16 bits": so do some twins.
- **caches**: static and dynamic KV caches that work with the backend.
- **what stays in 16 bits**: for example routers, which choose the experts of a
  [mixture of experts](guides/moe.md). The experts themselves have 4 bits in twins.
- **not built**: transformers makes no generating model of this type from a configuration alone.

`make families` writes this page, in an hour or more. [models.jsonl](models.jsonl) has the words of each refusal.

<!-- widget: filter -->

## Popular model types

Open families whose downloads the ATOM Report follows (Brand and Lambert 2026, arXiv 2604.07190), and older ones that
are still among the text generation models on the Hub:

{_table([known[name] for name in sorted(POPULAR)])}
## All others

{_table([known[name] for name in sorted({*known}.difference(POPULAR))])}"""


def accelerate(outcome: Outcome) -> str:
    """Return what `accelerate` does for a type: "yes", "no drafts", "no", "not tried", "not built" or "failed"."""
    if outcome.result in ("cannot be built", "failed"):
        return BACKEND[RESULTS.index(outcome.result)]
    how = outcome.exact.partition(": ")[0]
    return {DRAFTED: "yes", UNDRAFTED: "no drafts", PLAIN: "no", "": "not tried"}[how]


def plain_words(reason: str) -> str:
    """Return a reason in the words of someone who has a model and no graph."""
    for pattern, words in _WORDS:
        if match := re.fullmatch(pattern, reason):
            return match.expand(words)
    return reason


def _what_stays(reason: str, name: str) -> str:
    """Return what a weight that no twin replaces is, by the reason of the passes and its name."""
    if "no plain linear layer reads" in reason:
        if re.search(r"(mlp|mixer)\.gate\.", name):
            return _ROUTERS
        if "conv" in name:
            return "convolutions"
    return plain_words(reason)


def _table(outcomes: Sequence[Outcome]) -> str:
    head = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
    return head + "".join(f"| {' | '.join(row(outcome))} |\n" for outcome in outcomes)


def row(outcome: Outcome) -> tuple[str, ...]:
    """Return a type's cells."""
    kept = Counter[str]()
    for reason, names in outcome.kept.items():
        kept.update(_what_stays(reason, name) for name in names)
    reasons = [f"{words} ({count})" for words, count in sorted(kept.items())]
    reasons += [f"{kind} cache: {plain_words(why)}" for kind, why in outcome.without.items() if outcome.depths]
    reasons += [f"backend: {plain_words(outcome.reason)}"] if outcome.result == "refused" else []
    reasons += [plain_words(outcome.reason)] if outcome.result in ("cannot be built", "failed") else []
    why = plain_words(outcome.exact.partition(": ")[2])
    reasons += [f"accelerate: {why}"] if why and why != "unsupported by the backend" else []
    cells = (
        f"`{outcome.model_type}`",
        accelerate(outcome),
        BACKEND[RESULTS.index(outcome.result)],
        ", ".join(outcome.depths),
        f"{outcome.products:g}" if outcome.depths else "",
        "; ".join(reasons),
    )
    return tuple(" ".join(cell.replace("|", "\\|").split()) for cell in cells)


def write_page(known: Mapping[str, Outcome], path: Path = PAGE) -> None:
    path.write_text(page(known), encoding="utf-8")
