"""What transformers' logits processors and stopping criteria take of a token, and what River's equals of them do.

    python -m benchmarks.processors
    python -m benchmarks.processors --vocabularies 32000

Microseconds a call, one row of 512 ids, the median over `--repeats` calls. A processor without a figure of River's runs
as it is, and a criterion with one is replaced by a comparison of the new token and the length.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from transformers.generation import (
    EosTokenCriteria,
    MaxLengthCriteria,
    logits_process,
)

from benchmarks import common
from river_compile.decoding.processors import BARRED, processed

LENGTH = 512
_ENDS = frozenset((2, 3))


def processors(vocabulary: int) -> Iterator[logits_process.LogitsProcessor]:
    """Yield a processor of each class that generate makes from its options, in a state in which it works."""
    ends, others = [2, vocabulary - 1], [*range(100, 120)]
    yield logits_process.MinLengthLogitsProcessor(2 * LENGTH, ends)
    yield logits_process.MinNewTokensLengthLogitsProcessor(LENGTH - 8, 64, ends)
    yield logits_process.SuppressTokensLogitsProcessor(others)
    yield logits_process.SuppressTokensAtBeginLogitsProcessor(others, LENGTH)
    yield logits_process.ForcedEOSTokenLogitsProcessor(LENGTH + 1, ends)
    yield logits_process.NoBadWordsLogitsProcessor([[token] for token in others], ends)
    yield logits_process.SequenceBiasLogitsProcessor({(token, token + 1): -2.0 for token in others})
    yield logits_process.RepetitionPenaltyLogitsProcessor(1.1)
    yield logits_process.NoRepeatNGramLogitsProcessor(3)
    yield logits_process.TemperatureLogitsWarper(0.7)
    yield logits_process.TopKLogitsWarper(50)
    yield logits_process.TopPLogitsWarper(0.9)
    yield logits_process.MinPLogitsWarper(0.05)
    yield logits_process.TypicalLogitsWarper(0.9)


def measure(vocabulary: int, repeats: int) -> list[list[object]]:
    """Return a line of the table for each class."""
    ids, scores = torch.arange(LENGTH)[None], torch.randn(1, vocabulary)
    lines: list[list[object]] = []
    for processor in processors(vocabulary):
        theirs, ours = partial(processor, ids, scores), partial(processed, [processor], ids, scores, [0])
        known = type(processor) in BARRED
        lines.append(_line(processor, vocabulary, theirs, ours if known else None, repeats))
    for criterion in (MaxLengthCriteria(2 * LENGTH), EosTokenCriteria([2, 3])):
        lines.append(_line(criterion, vocabulary, partial(criterion, ids, None), partial(_ends, ids), repeats))
    return lines


def _ends(ids: Tensor) -> bool:
    """Do what `decoding.speculative.Texts` does for a row."""
    return ids.shape[1] >= 2 * LENGTH or int(ids[0, -1]) in _ENDS


def _line(
    what: object, vocabulary: int, theirs: Callable[[], object], ours: Callable[[], object] | None, repeats: int
) -> list[object]:
    times = [None if call is None else _microseconds(call, repeats) for call in (theirs, ours)]
    return [type(what).__name__, vocabulary, *times]


def _microseconds(call: Callable[[], object], repeats: int) -> float:
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return 1e6 * statistics.median(taken)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = common.command_line(__doc__, "threads", "json")
    parser.add_argument("--vocabularies", nargs="+", type=int, default=[49_152, 152_064])
    parser.add_argument("--repeats", type=int, default=200)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    lines = [line for vocabulary in options.vocabularies for line in measure(vocabulary, options.repeats)]
    common.print_table(["", "vocabulary", "transformers, us", "river, us"], lines)
    common.write_outcome({"benchmark": "processors", "lines": lines}, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
