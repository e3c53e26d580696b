"""Quantizers compared: what twins cost in quality and in packing time, on three kinds of text.

    python -m benchmarks.twins
    python -m benchmarks.twins --model gemma3-270m --quantizer hqq --quantizer gptq --json twins.json

Every row decodes the same texts token by token through all twins: the model's own answers, passages of Python's
documentation, and HumanEval's problems (where that package is installed). "KL" and "same" (next token) compare with
full depth. "prompt in 4 bits": the KL of answers whose prompt ran through the twins too. "gptq" and "awq" know what the
matrices read in the package's texts, in text that the model samples, or in its answers to other questions.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StaticCache

import river_compile
from benchmarks import common
from benchmarks.quality import humaneval
from benchmarks.texts import CALIBRATION, MEASURED, Answer, answers
from river_compile.building.graph_record import GraphRecord, Graphs
from river_compile.cli import shared
from river_compile.cli.shared import topics
from river_compile.evaluation.meter import compiled
from river_compile.exits import forced_depth
from river_compile.kernels.portable import token_kl
from river_compile.record import find_record
from river_compile.twins.making import Statistics
from river_compile.twins.observe import Observation
from river_compile.twins.own_text import sample
from river_compile.upstream.transformers import cache_argument
from tools import demo_models

SAMPLED, ANSWERS = "sampled text", "answers"
ROWS = ("rtn", "hqq", "awq", "gptq", *(f"{name}, {text}" for text in (SAMPLED, ANSWERS) for name in ("awq", "gptq")))
KINDS = ("own", "docs", "code")
HEADERS = (
    "quantizer", *(f"{what} {kind}" for kind in KINDS for what in ("KL", "same")), "prompt in 4 bits",
    "SQNR weights", "packing s", "MB",
)  # fmt: skip


Passes = dict[str, list[Tensor]]  # by kind of text: of each, logits [tokens, V]


class Decoder:
    """Feeds texts to a compiled model token by token, with a static cache."""

    def __init__(self, model: PreTrainedModel, texts: Mapping[str, Sequence[Answer]]) -> None:
        self._model, self._texts = model, texts
        self._cache_name = cache_argument(model)
        longest = max(text.ids.shape[1] for group in texts.values() for text in group)
        self._cache = StaticCache(config=model.config.get_text_config(), max_cache_len=longest)

    def run(self, depth: int, kinds: Sequence[str] = KINDS) -> Passes:
        """Decode every text of some kinds at one exit depth."""
        found = [kind for kind in kinds if kind in self._texts]
        return {kind: [self._decode(text, depth) for text in self._texts[kind]] for kind in found}

    def _decode(self, text: Answer, depth: int) -> Tensor:
        self._cache.reset()
        length = text.ids.shape[1]
        self._step(text.ids, 0, text.prompt)
        with forced_depth(depth):
            logits = [self._step(text.ids, at, at + 1) for at in range(text.prompt, length)]
        return torch.cat(logits)

    def _step(self, ids: Tensor, start: int, stop: int) -> Tensor:
        held = {self._cache_name: self._cache, "use_cache": True}
        positions = torch.arange(start, stop)[None]
        return self._model(input_ids=ids[:, start:stop], position_ids=positions, **held).logits[:, -1].clone()


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
    rows, reference = [], None
    for name in options.quantizer:
        quantizer, _, source = name.partition(", ")
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        graphs = find_record(model).of(Graphs)
        _observe(model, tokenizer, source, options)
        before = [*graphs]
        settings = {"quantizer": quantizer, "group_size": options.group_size}
        with decoding(model, texts, {**settings, "first_exit": 1}) as decoder:
            decoder.run(0, ["own"])  # compiles
            reference = reference or decoder.run(model.config.get_text_config().num_hidden_layers)
            row = {"quantizer": name, **quality(decoder, reference)}
        with decoding(model, texts, {**settings, "exit_depth": 0, "prefill": "exit"}) as decoder:
            row["prompt in 4 bits"] = _mean_kl(reference["own"], decoder.run(0, ["own"])["own"])
        rows.append({**row, **packing([graph for graph in graphs if graph not in before])})
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
        find_record(model).of(Statistics).observed = Observation()


@contextlib.contextmanager
def decoding(
    model: PreTrainedModel, texts: Mapping[str, Sequence[Answer]], settings: dict[str, object]
) -> Iterator[Decoder]:
    """Compile the model for the time of a with statement."""
    torch._dynamo.reset()
    with compiled(model, settings), torch.inference_mode():
        yield Decoder(model, texts)


def quality(decoder: Decoder, reference: Passes) -> dict:
    """Compare logits at depth 0 with full depth's."""
    row = {}
    for kind, river in decoder.run(0).items():
        pairs = list(zip(reference[kind], river, strict=True))
        same = [(a.argmax(-1) == b.argmax(-1)).float() for a, b in pairs]
        row |= {f"KL {kind}": _mean_kl(reference[kind], river), f"same {kind}": torch.cat(same).mean().item()}
    return row


def packing(graphs: Sequence[GraphRecord]) -> dict:
    """Return the signal-to-noise ratio in dB, seconds and bytes of the twins of some graphs."""
    sites = graphs[-1].twins
    return {
        "SQNR weights": statistics.fmean(site.sqnr for site in sites),
        "packing s": sum(graph.seconds["packing"] for graph in graphs),
        "MB": sum(site.nbytes for site in sites) / 1e6,
    }


def _mean_kl(reference: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return torch.cat([token_kl(a, b) for a, b in zip(reference, other, strict=True)]).mean().item()


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
