"""Quantizers compared: what twins cost in quality and in packing time, on three kinds of text.

    python -m benchmarks.twins
    python -m benchmarks.twins --model gemma3-270m --quantizer hqq --quantizer gptq --json twins.json
    python -m benchmarks.twins --quantizer gptq --lm-head keep w4
    python -m benchmarks.twins --quantizer gptq --blocks

Every row decodes the same texts, token by token through River: the model's own greedy answers, passages of Python's
documentation, and HumanEval's problems with their solutions (where that package is installed). "KL" and "same" (next
token) compare the logits with full depth's. Every token runs through all twins (exit depth 0) after a prompt that ran
through the backbone; "prompt in 4 bits" is the KL of answers after a prompt that ran through the twins too. "K" and
"V" are cosines of what twins and backbone write to the cache when tokens leave after block 2, by layer, on answers: the
mean and the smallest layer.

"gptq" and "awq" know what the matrices read in the package's texts, in text that the model samples, or in the model's
answers to other questions, as a user's. "packing s" has the sampling in it, but neither the time of
`collect_statistics` nor the estimate of the loss. SQNR is in dB, a mean over matrices; of outputs on the measured
answers.

`--blocks` adds a table for each row: the KL on the answers where one block's twin alone stands in for its block.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StaticCache

import river_compile
from benchmarks import common
from benchmarks.quality import humaneval
from benchmarks.quality.entries import of_cache
from benchmarks.texts import CALIBRATION, MEASURED, Answer, answers
from river_compile.building.graph_record import GraphRecord, Graphs
from river_compile.cli import shared
from river_compile.cli.shared import topics
from river_compile.evaluation.meter import compiled
from river_compile.exits import forced_depth
from river_compile.kernels.portable import token_kl
from river_compile.kernels.quant.calibrated import output_sqnr_db
from river_compile.record import find_record
from river_compile.twins.making import Statistics
from river_compile.twins.observe import Observation
from river_compile.twins.own_text import sample
from river_compile.twins.weights import TwinWeight
from river_compile.upstream.transformers import cache_argument
from tools import demo_models

SAMPLED, ANSWERS = "sampled text", "answers"
ROWS = ("rtn", "hqq", "awq", "gptq", *(f"{name}, {text}" for text in (SAMPLED, ANSWERS) for name in ("awq", "gptq")))
KINDS = ("own", "docs", "code")
EXIT_DEPTH = 2
SQNR_ROWS = 256  # of a matrix, whose outputs' noise is measured
HEADERS = (
    "quantizer", *(f"{what} {kind}" for kind in KINDS for what in ("KL", "same")), "prompt in 4 bits",
    "K mean", "K least", "V mean", "V least", "SQNR weights", "SQNR outputs", "packing s", "MB",
)  # fmt: skip
BLOCK_HEADERS = ("block", "KL", "same", "SQNR least", "of")


@dataclass(frozen=True)
class Pass:
    """One answer decoded once: logits ``[tokens, V]``, and its tokens' entries as `quality.entries` has them."""

    logits: Tensor
    entries: Tensor


Passes = dict[str, list[Pass]]  # by kind of text


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

    def _decode(self, text: Answer, depth: int) -> Pass:
        self._cache.reset()
        length = text.ids.shape[1]
        self._step(text.ids, 0, text.prompt)
        with forced_depth(depth):
            logits = [self._step(text.ids, at, at + 1) for at in range(text.prompt, length)]
        return Pass(torch.cat(logits), of_cache(self._cache, slice(text.prompt, length)))

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
    for row in rows if options.blocks else ():
        print(f"\n{row['quantizer']}, one block in 4 bits")
        common.print_table(
            BLOCK_HEADERS, [[_shown(name, block[name]) for name in BLOCK_HEADERS] for block in row["blocks"]]
        )
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
    judged = river_compile.collect_statistics(model, [text.ids for text in texts["own"]], progress=False)
    rows, reference = [], None
    for name, lm_head in itertools.product(options.quantizer, options.lm_head or [None]):
        quantizer, _, source = name.partition(", ")
        name = name if lm_head is None else f"{name}, lm_head={lm_head}"
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        graphs = find_record(model).of(Graphs)
        _observe(model, tokenizer, source, options)
        before = [*graphs]
        settings = {"quantizer": quantizer, "group_size": options.group_size, "lm_head": lm_head}
        with decoding(model, texts, {**settings, "first_exit": 1}) as decoder:
            num_blocks = decoder.run(0)["own"][0].entries.shape[1]  # compiles
            reference = reference or decoder.run(num_blocks)
            row = {"quantizer": name, **quality(decoder, reference)}
        with decoding(model, texts, {**settings, "exit_depth": 0, "prefill": "exit"}) as decoder:
            row["prompt in 4 bits"] = _mean_kl(reference["own"], decoder.run(0, ["own"])["own"])
        rows.append({**row, **packing([graph for graph in graphs if graph not in before], judged)})
        if options.blocks:
            rows[-1]["blocks"] = block_errors(model, graphs[-1], [text.ids for text in texts["own"]])
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
    """Compare logits at depth 0, and cache entries at depth 2, with full depth's."""
    row = {}
    for kind, river in decoder.run(0).items():
        pairs = list(zip(reference[kind], river, strict=True))
        same = [(a.logits.argmax(-1) == b.logits.argmax(-1)).float() for a, b in pairs]
        row |= {f"KL {kind}": _mean_kl(reference[kind], river), f"same {kind}": torch.cat(same).mean().item()}
    left = decoder.run(EXIT_DEPTH, ["own"])["own"]
    pairs = [(a.entries, b.entries) for a, b in zip(reference["own"], left, strict=True)]
    cosines = torch.cat([cosine_similarity(a, b, dim=-1) for a, b in pairs], dim=-1).mean(-1)  # [2, layers]
    for name, by_layer in zip("KV", cosines[:, EXIT_DEPTH:], strict=True):
        row |= {f"{name} mean": by_layer.mean().item(), f"{name} least": by_layer.min().item()}
    return row


def packing(graphs: Sequence[GraphRecord], observation: Observation) -> dict:
    """Return signal-to-noise ratios, seconds and bytes of the twins of some graphs."""
    sites = graphs[-1].twins
    outputs = []
    for site in sites:
        weights = site.parameters[: len(site.matmul.weights)]
        weight = torch.cat([w.T if site.matmul.transposed else w for w in weights])
        some = slice(None, None, max(1, len(weight) // SQNR_ROWS))
        moments = observation.moments_of(weights[0]).cheapest(weight.device)
        outputs.append(output_sqnr_db(weight[some], site.dequantize()[some], moments))
    return {
        "SQNR weights": statistics.fmean(site.sqnr for site in sites),
        "SQNR outputs": statistics.fmean(outputs),
        "packing s": sum(graph.seconds["packing"] for graph in graphs),
        "MB": sum(site.nbytes for site in sites) / 1e6,
    }


@torch.no_grad()
def block_errors(model: PreTrainedModel, graph: GraphRecord, texts: Sequence[Tensor]) -> list[dict]:
    """Replace one block at a time by its twin, read back from what is packed, and compare the logits.

    Args:
        model: runs as it is, not compiled.
        graph: of the model, whose twins are packed.
        texts: token ids ``[B, T]``.
    """
    found = []
    references = [model(input_ids=ids, use_cache=False).logits.flatten(0, 1) for ids in texts]
    for number, path in enumerate(graph.program.block_paths, start=1):
        packed = [site for site in graph.twins if site.name.startswith(f"{path}.")]
        weights, kls, same = _twin_weights(model, packed), [], []
        for ids, reference in zip(texts, references, strict=True):
            logits = functional_call(model, weights, (), {"input_ids": ids, "use_cache": False}).logits.flatten(0, 1)
            kls.append(token_kl(reference, logits))
            same.append((reference.argmax(-1) == logits.argmax(-1)).float())
        worst = min(packed, key=lambda site: site.quality)
        means = {"KL": torch.cat(kls).mean().item(), "same": torch.cat(same).mean().item()}
        found.append({"block": number, **means, "SQNR least": worst.quality, "of": worst.name})
    return found


def _twin_weights(model: PreTrainedModel, packed: Sequence[TwinWeight]) -> dict[str, Tensor]:
    """Return the weights of a twin by parameter name, in the model's dtype."""
    names, weights = {id(parameter): name for name, parameter in model.named_parameters()}, {}
    for site in packed:
        parts = site.dequantize().split(site.matmul.out_features)
        for source, part in zip(site.parameters[: len(site.matmul.weights)], parts, strict=True):
            part = part.unflatten(0, (site.matmul.experts, -1)) if site.matmul.experts else part
            weights[names[id(source)]] = (part.mT if site.matmul.transposed else part).to(source.dtype)
    return weights


def _mean_kl(reference: Sequence[Pass], other: Sequence[Pass]) -> float:
    return torch.cat([token_kl(a.logits, b.logits) for a, b in zip(reference, other, strict=True)]).mean().item()


def _shown(name: str, value: object) -> object:
    if not isinstance(value, float):
        return value
    return f"{value:.1f}" if name.startswith(("SQNR", "packing", "MB")) else f"{value:.4f}"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = common.command_line(__doc__, "model", "threads", "json")
    parser.add_argument("--quantizer", action="append", choices=ROWS, help="may be repeated (default: all)")
    parser.add_argument("--group-size", type=int, default=64, choices=(32, 64, 128))
    parser.add_argument("--lm-head", nargs="+", choices=("keep", "w4"), help="a row for each (default: one)")
    parser.add_argument("--blocks", action="store_true", help="also the loss of each block's twin alone")
    parser.add_argument("--texts", type=int, default=12, help="texts of each kind to measure (at most 12, the default)")
    parser.add_argument("--tokens", type=int, default=48, help="longest answer that is measured (default 48)")
    parser.add_argument("--calibration-tokens", type=int, default=128, help="longest answer observed (default 128)")
    options = parser.parse_args(arguments)
    options.quantizer = options.quantizer or list(ROWS)
    return options


if __name__ == "__main__":
    sys.exit(main())
