"""Quantizers compared: what twins cost in quality and in packing time, on three kinds of text.

    python -m benchmarks.twins
    python -m benchmarks.twins --model gemma3-270m --quantizer hqq --quantizer gptq --json twins.json

Every row decodes the same texts token by token through all twins: the model's own answers, passages of Python's
documentation, and HumanEval's problems (where that package is installed). "KL" and "same" (next token) compare with
full depth. "gptq" and "awq" know what the matrices read in the package's texts, in text that the model samples, or in
its answers to other questions.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import river_compile
from benchmarks import common
from benchmarks.quality import humaneval
from benchmarks.texts import CALIBRATION, MEASURED, Answer, answers
from river_compile.building.graph_record import GraphRecord, Graphs
from river_compile.cli import shared
from river_compile.cli.shared import topics
from river_compile.evaluation.meter import TextDecoder, compiled
from river_compile.exits import forced_depth
from river_compile.kernels.portable import token_kl
from river_compile.record import record_of
from river_compile.twins.making import Statistics
from river_compile.twins.observe import Observation
from river_compile.twins.own_text import sample
from tools import demo_models

SAMPLED, ANSWERS = "sampled text", "answers"
ROWS = ("rtn", "hqq", "awq", "gptq", *(f"{name}, {text}" for text in (SAMPLED, ANSWERS) for name in ("awq", "gptq")))
KINDS = ("own", "docs", "code")
HEADERS = (
    "quantizer", *(f"{what} {kind}" for kind in KINDS for what in ("KL", "same")),
    "SQNR weights", "packing s", "MB",
)  # fmt: skip


def logits_of(model: PreTrainedModel, texts: Mapping[str, Sequence[Answer]], depth: int) -> dict[str, Tensor]:
    """Return the logits ``[tokens, V]`` of each kind of text behind its prompts, each token leaving at one depth."""
    decoder = TextDecoder(model, max(text.ids.shape[1] for group in texts.values() for text in group))
    with forced_depth(depth):
        found = {kind: [decoder.logits(text.ids, text.prompt) for text in group] for kind, group in texts.items()}
    return {kind: torch.cat(logits) for kind, logits in found.items()}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    shared.quiet()
    model, tokenizer = demo_models.load_or_exit(options.model)
    measured = {"own": answers(model, tokenizer, MEASURED[: options.texts], options.tokens)}
    measured |= other_texts(tokenizer, options)
    tokens = {kind: sum(text.ids.shape[1] - text.prompt for text in group) for kind, group in measured.items()}
    print(f"{options.model}, group size {options.group_size}, tokens of each kind: {tokens}")
    rows = measure(model, tokenizer, measured, options)
    common.print_table(HEADERS, [[_shown(name, row.get(name)) for name in HEADERS] for row in rows])
    content = {**common.setting("twins", options), "group_size": options.group_size, "tokens": tokens, "rows": rows}
    common.write_outcome(content, options.json)
    return 0


def other_texts(tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace) -> dict[str, list[Answer]]:
    """Return passages of Python's documentation and problems of HumanEval, as long as the longest answers."""
    kinds = {"docs": topics()[::-1]}
    try:
        kinds["code"] = [problem["prompt"] + problem["canonical_solution"] for problem in humaneval.problems()]
    except ImportError as error:
        print(f"without HumanEval: {error}", file=sys.stderr)
    context = 32
    found = {}
    for kind, texts in kinds.items():
        rows = (torch.tensor([tokenizer(text)["input_ids"][: context + options.tokens]]) for text in texts)
        whole = (Answer(row, context) for row in rows if row.shape[1] == context + options.tokens)
        found[kind] = list(itertools.islice(whole, options.texts))
    return found


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, Sequence[Answer]],
    options: argparse.Namespace,
) -> list[dict]:
    """Return a row for each quantizer."""
    rows: list[dict] = []
    reference: dict[str, Tensor] = {}
    graphs = record_of(model.parameters()).of(Graphs)
    for name in options.quantizer:
        quantizer, _, source = name.partition(", ")
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        _observe(model, tokenizer, source, options)
        torch._dynamo.reset()
        before = [*graphs]
        settings = {"quantizer": quantizer, "group_size": options.group_size, "first_exit": 1}
        with compiled(model, settings), torch.inference_mode():
            reference = reference or logits_of(model, texts, model.config.get_text_config().num_hidden_layers)
            found = logits_of(model, texts, 0)
        row: dict = {"quantizer": name, **packing([graph for graph in graphs if graph not in before])}
        for kind, logits in found.items():
            row[f"KL {kind}"] = token_kl(reference[kind], logits).mean().item()
            row[f"same {kind}"] = (reference[kind].argmax(-1) == logits.argmax(-1)).float().mean().item()
        rows.append(row)
    return rows


def _observe(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str, options: argparse.Namespace
) -> None:
    """Have a model's matrices observed on a row's text; on the package's it is the backend that does it."""
    if source == SAMPLED:
        river_compile.collect_statistics(model, [sample(model, 32, 32)], progress=False)
    elif source == ANSWERS:
        found = answers(model, tokenizer, CALIBRATION, options.calibration_tokens)
        river_compile.collect_statistics(model, [text.ids for text in found], progress=False)
    else:
        record_of(model.parameters()).of(Statistics).observed = Observation()


def packing(graphs: Sequence[GraphRecord]) -> dict:
    """Return the signal-to-noise ratio in dB, seconds and bytes of the twins of some graphs."""
    sites = graphs[-1].twins
    return {
        "SQNR weights": statistics.fmean(site.sqnr for site in sites),
        "packing s": sum(graph.seconds["packing"] for graph in graphs),
        "MB": sum(site.nbytes for site in sites) / 1e6,
    }


def _shown(name: str, value: object) -> object:
    if not isinstance(value, float):
        return value
    return f"{value:.1f}" if name.startswith(("SQNR", "packing", "MB")) else f"{value:.4f}"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = common.command_line(__doc__, "model", "threads", "json")
    parser.add_argument("--quantizer", action="append", choices=ROWS, help="may be repeated (default: all)")
    parser.add_argument("--group-size", type=int, default=64, choices=(32, 64, 128))
    parser.add_argument("--texts", type=int, default=12, help="texts of each kind to measure (at most 12, the default)")
    parser.add_argument("--tokens", type=int, default=48, help="longest answer that is measured (default 48)")
    parser.add_argument("--calibration-tokens", type=int, default=128, help="longest answer observed (default 128)")
    options = parser.parse_args(arguments)
    options.quantizer = options.quantizer or list(ROWS)
    return options


if __name__ == "__main__":
    sys.exit(main())
