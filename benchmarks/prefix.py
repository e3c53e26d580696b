"""The first token after a long beginning that an earlier process has read, which the prefix cache keeps on disk.

    python -m benchmarks.prefix --model qwen-coder-1.5b --tokens 2000 --question 20

One process reads the beginning with a question, and ends. Another one has answered a short prompt, then gets the same
beginning with other questions: from the disk ("disk"), again ("memory"), and without the cache ("fresh"). The whole
answers of "fresh" and "disk" are compared. A third one's first call is such a question ("disk, first call"). Drafts are
off and weights are the model's: both concern later tokens only, and would be packed in each empty cache.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import closing

from benchmarks import common
from river_compile.cli import shared
from tools import demo_models

MODULE = "benchmarks.prefix"
_WARM_UP = 8


class Model:
    """A model in a worker's process."""

    def __init__(self) -> None:
        self.model = None

    def load(self, folder: str, dtype: str) -> dict:
        """Load and accelerate it, with the prefix cache on disk; return the seconds of loading."""
        from transformers import AutoModelForCausalLM

        shared.quiet()
        began = time.perf_counter()
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self._accelerate(True)
        return {"load_s": time.perf_counter() - began}

    def ask(self, ids: list[int], tokens: int, cached: bool = True) -> dict:
        """Generate after a prompt; return times, new ids, and how many tokens of the prompt came from the disk.

        Not `cached`: without the disk from now on, and without the texts in memory.
        """
        import torch

        import river_compile
        from river_compile.reporting.timing import generate

        if not cached:
            self._accelerate(False)
        before = river_compile.report(self.model).to_dict()["kept_texts"]
        made = generate(self.model, torch.tensor([ids]), tokens, static_cache=False, fresh=not cached)
        after = river_compile.report(self.model).to_dict()["kept_texts"]
        reused = {name: after[name] - before[name] for name in ("reused", "from_disk")}
        return {"first_token_s": made.times[0], "ids": list(made.tokens), **reused}

    def _accelerate(self, prefix_cache: bool) -> None:
        import river_compile

        options = {"self_speculation": False, "num_assistant_tokens": 0, "target_weights": "model"}
        river_compile.accelerate(self.model, prefix_cache=prefix_cache, **options)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = common.command_line(
        __doc__, "model", "dtype", "new-tokens", "threads", "json", "record", "worker", new_tokens=16
    )
    parser.add_argument("--tokens", type=common.number(256), default=2000, help="of the beginning (%(default)s)")
    parser.add_argument("--question", type=common.number(1), default=20, help="tokens of a question (%(default)s)")
    options: argparse.Namespace = parser.parse_args(arguments)
    if options.worker:
        model = Model()
        common.serve({"load": model.load, "generate": model.ask})
        return 0
    rows = common.attempted(_measure, options)
    if rows is None:
        return 1
    outcome = {**common.setting("prefix", options), "rows": rows}
    common.print_setting(outcome)
    heads = ["", "first token, s", "prompt tokens", "from memory or disk", "from disk"]
    keys = ("first_token_s", "prompt_tokens", "reused", "from_disk")
    common.print_table(heads, [[name, *map(row.get, keys)] for name, row in rows.items()])
    same = rows["fresh"].pop("ids") == rows["disk"].pop("ids")
    print(f"\nThe answers of fresh and disk are {'the same' if same else 'DIFFERENT'}")
    common.write_outcome(outcome, options.json)
    common.record(outcome, options)
    return 0 if same else 1


def _measure(options: argparse.Namespace) -> dict[str, dict]:
    folder = demo_models.resolve(options.model)
    first, *questions = _prompts(folder, options.tokens, options.question)
    rows: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as cache:

        def process(name: str) -> common.Worker:
            print(f"{name} ...", file=sys.stderr)
            worker = common.Worker(MODULE, name, options.threads, {"RIVER_COMPILE_CACHE_DIR": cache})
            worker.ask("load", folder=str(folder), dtype=options.dtype)
            return worker

        def row(worker: common.Worker, ids: list[int], **more: bool) -> dict:
            said = worker.ask("generate", ids=ids, tokens=options.new_tokens, **more)
            return {**said, "prompt_tokens": len(ids)}

        with closing(process("the first process")) as worker:
            row(worker, first)
        with closing(process("the second process")) as worker:
            row(worker, first[:_WARM_UP])
            from_disk, from_memory = row(worker, questions[0]), row(worker, questions[1])
            rows["fresh"] = row(worker, questions[0], cached=False)
            rows |= {"disk": from_disk, "memory": from_memory}
        with closing(process("the third process")) as worker:
            rows["disk, first call"] = row(worker, questions[2])
    return rows


def _prompts(folder: str, tokens: int, question: int) -> list[list[int]]:
    """Return four prompts that share their first tokens: passages of Python's documentation."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("\n\n".join(shared.topics()))["input_ids"]
    beginning, rest = ids[:tokens], ids[tokens:]
    return [beginning + rest[number * 1000 :][:question] for number in range(4)]


if __name__ == "__main__":
    sys.exit(main())
