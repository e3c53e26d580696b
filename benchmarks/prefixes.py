"""A conversation's second turn: seconds to its first token with the first turn kept, and with a fresh prompt.

    python -m benchmarks.prefixes
    python -m benchmarks.prefixes --model DIR --tokens 4000 --rows exact --json prefixes.json

The first turn is a prompt of `--tokens` tokens with an answer of `--new-tokens`; the second adds a message of
`--message` tokens. Rows, each in its own process, which alternate:

    exact, strict, fast   `river_compile.accelerate`; a fresh prompt runs on the same cache, whose text is forgotten
    plain                 transformers, which keeps nothing
    llama_cpp             llama.cpp on the GGUF file that the model was made of, if it is installed (benchmarks.peers);
                          it keeps what its cache holds, unless it is told to forget that

Each row runs both turns once before it is timed. Medians; "ratio" is that of kept to fresh, a median of each round's.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable
from contextlib import ExitStack, closing

from benchmarks import common, decode_rows
from river_compile.cli import shared
from river_compile.decoding.prefix_cache import PrefixPool
from tools import demo_models

ROWS = ("exact", "strict", "fast", "plain", "llama_cpp")
MODULE = "benchmarks.prefixes"


class Conversation:
    """Two turns of a model by transformers, accelerated or not."""

    def __init__(self, job: dict) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        import river_compile
        from river_compile.cli.bench import beginning

        shared.quiet()
        self._job = job
        self._model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=job["dtype"]).eval()
        if job["row"] != "plain":
            river_compile.accelerate(self._model, job["row"], background_packing=False)
        text = beginning(AutoTokenizer.from_pretrained(job["folder"]), job["tokens"] + job["message"])
        self._first, self._message = text[:, : job["tokens"]], text[:, job["tokens"] :]

    def turns(self) -> dict:
        """Return the seconds to the first token of the second turn, kept (None for plain) and fresh."""
        import torch

        import river_compile
        from river_compile.reporting.timing import generate

        answer = generate(self._model, self._first, self._job["new_tokens"], static_cache=False)
        second = torch.cat([self._first, torch.tensor([answer.tokens]), self._message], dim=1)
        if self._job["row"] == "plain":
            return {"kept_s": None, "fresh_s": generate(self._model, second, 2, static_cache=False).first_token_s}
        before = river_compile.report(self._model).record.of(PrefixPool).texts.reused
        kept = generate(self._model, second, 2, static_cache=False, fresh=False)
        found = river_compile.report(self._model).record.of(PrefixPool).texts.reused - before
        fresh = generate(self._model, second, 2, static_cache=False)
        same = kept.tokens == fresh.tokens
        return {"kept_s": kept.first_token_s, "fresh_s": fresh.first_token_s, "kept_tokens": found, "same": same}


class LlamaCppConversation:
    """The same by llama.cpp, whose worker this one of the benchmark's own process asks."""

    def __init__(self, worker: common.Worker, job: dict, text: list[int]) -> None:
        self._worker, self._new_tokens = worker, job["new_tokens"]
        self._first, self._message = text[: job["tokens"]], text[job["tokens"] :]
        context = len(text) + job["new_tokens"] + 2
        worker.ask("prepare", prompts=[], file=job["file"], threads=job["threads"], context=context, new_tokens=1)

    def turns(self) -> dict:
        """As above; the tokens that llama.cpp keeps are those before the message but the last."""
        answer = self._ask(self._first, self._new_tokens)["tokens"]
        second = [*self._first, *answer, *self._message]
        kept, fresh = self._ask(second, 1, fresh=False), self._ask(second, 1)
        same = kept["tokens"] == fresh["tokens"]
        return {"kept_s": kept["times"][0], "fresh_s": fresh["times"][0], "kept_tokens": None, "same": same}

    def _ask(self, ids: list[int], tokens: int, fresh: bool = True) -> dict:
        return self._worker.ask("generate", ids=ids, new_tokens=tokens, fresh=fresh)


_conversations: list[Conversation] = []  # of a worker


def begin(job: dict) -> dict:
    """Make a worker's conversation, and run it once."""
    _conversations.append(Conversation(job))
    return _conversations[-1].turns()


def turns() -> dict:
    """Run it again."""
    return _conversations[-1].turns()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    shared = ("model", "dtype", "new-tokens", "repeats", "threads", "json", "worker")
    parser = common.command_line(__doc__, *shared, new_tokens=64)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[*ROWS], help="which rows (all)")
    parser.add_argument("--tokens", type=common.number(32), default=2000, help="of the first prompt (%(default)s)")
    parser.add_argument("--message", type=common.number(1), default=32, help="tokens of the second (%(default)s)")
    options: argparse.Namespace = parser.parse_args(arguments)
    if options.worker:
        common.serve({"begin": begin, "turns": turns})
        return 0
    rows = common.attempted(_measure, options)
    if rows is None:
        return 1
    outcome = {**common.setting("prefixes", options), "tokens": options.tokens, "message": options.message}
    outcome["rows"] = {name: summary(measured) for name, measured in rows.items()}
    common.print_setting(outcome)
    common.print_table(
        ["", "kept, s", "fresh, s", "ratio", "tokens kept", "same token"],
        [[name, *row.values()] for name, row in outcome["rows"].items()],
    )
    common.write_outcome(outcome, options.json)
    return 0


def summary(measured: list[dict]) -> dict:
    """Return a row's medians."""
    kept = [turn["kept_s"] for turn in measured]
    fresh = [turn["fresh_s"] for turn in measured]
    keeps = None not in kept
    return {
        "kept_s": statistics.median(kept) if keeps else None,
        "fresh_s": statistics.median(fresh),
        "ratio": statistics.median(k / f for k, f in zip(kept, fresh, strict=True)) if keeps else None,
        "kept_tokens": measured[-1].get("kept_tokens"),
        "same_token": "yes" if all(turn.get("same", True) for turn in measured) else "no",
    }


def _measure(options: argparse.Namespace) -> dict[str, list[dict]]:
    folder = demo_models.resolve(options.model)
    job = {name: getattr(options, name) for name in ("dtype", "tokens", "message", "new_tokens", "threads")}
    job["folder"] = folder
    rows: dict[str, list[dict]] = {}
    with ExitStack() as stack:
        asked: dict[str, Callable[[], dict]] = {}
        for row in options.rows:
            if row == "llama_cpp":
                reason = decode_rows.why_not(decode_rows.ROWS[row], options)
                if reason:
                    print(f"llama_cpp is left out: {reason}", file=sys.stderr)
                    continue
            print(f"{row} ...", file=sys.stderr)
            if row == "llama_cpp":
                worker = stack.enter_context(closing(decode_rows.worker(row, decode_rows.ROWS[row], options.threads)))
                file = {"file": str(decode_rows.gguf_file(options))}
                asked[row] = LlamaCppConversation(worker, job | file, _text(job)).turns
                asked[row]()
            else:
                worker = stack.enter_context(closing(common.Worker(MODULE, row, options.threads)))
                worker.ask("begin", job={**job, "row": row})
                asked[row] = functools.partial(worker.ask, "turns")
        for _ in range(options.repeats):
            for row, again in asked.items():
                rows.setdefault(row, []).append(again())
    return rows


def _text(job: dict) -> list[int]:
    from transformers import AutoTokenizer

    from river_compile.cli.bench import beginning

    return beginning(AutoTokenizer.from_pretrained(job["folder"]), job["tokens"] + job["message"])[0].tolist()


if __name__ == "__main__":
    sys.exit(main())
