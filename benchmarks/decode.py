"""Decode speed of the plain model, Inductor, River and llama.cpp, side by side.

    python -m benchmarks.decode
    python -m benchmarks.decode --model DIR --gguf FILE --rows eager river llama_cpp --json decode.json

Every row is a process of its own with an empty Inductor cache. Each generates the same prompt's greedy continuation,
batch 1, once to compile, once to warm up, and then `--repeats` times; the repeats of all rows take turns. Columns:

    decode tokens/s   median over the repeats, prefill excluded
    first token, s    from the call that compiles to the first new token: packing and compiling the prompt's graph
    second token, s   the same to the second new token: the decode graph is compiled too
    mean depth        backbone blocks executed per decoded token
    peak RSS, MiB     of the row's process, loading included (mapped weight files count)

`--device cuda` measures random models on a GPU, `--estimate` says what can be said without one (cuda_decode.py).
All processes stay in memory until the end: choose `--rows` for models of more than about a billion parameters.
Nothing here looks at the quality of the text.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks import common, cuda_decode
from river_compile.cli import models

PROMPT = "Write a Python function that returns the n-th Fibonacci number."
NEVER = "never"  # stands for an exit depth of all blocks, whose number only the worker knows


@dataclass(frozen=True)
class Row:
    """One configuration.

    Attributes:
        backend: "eager", "inductor", "river" or "llama_cpp".
        dtype: None for the dtype of the command line.
        options: of the River backend.
    """

    backend: str
    dtype: str | None = None
    options: dict = field(default_factory=dict)


ROWS = {
    "eager": Row("eager"),
    "inductor": Row("inductor"),
    "inductor_fp16": Row("inductor", dtype="float16"),
    "river_never": Row("river", options={"exit_depth": NEVER}),
    "river_never_checks": Row("river", options={"threshold": 1.0}),  # checks run after every block and never fire
    "river_depth0": Row("river", options={"exit_depth": 0}),
    "river": Row("river"),
    "llama_cpp": Row("llama_cpp"),
    "llama_cpp_bf16": Row("llama_cpp", dtype="bfloat16"),  # the same weights, written in 16 bits
}
_LLAMA_CPP = ("llama_cpp", "llama_cpp_bf16")
SPEED_RATIOS = (
    ("river", "river_never"),
    ("river", "eager"),
    ("river", "inductor"),
    ("river", "inductor_fp16"),
    ("river_depth0", "llama_cpp"),
    ("river_never", "llama_cpp_bf16"),
    ("river_never_checks", "river_never"),
)
FIRST_TOKEN_RATIOS = (("river", "inductor"),)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    options = _parse(arguments)
    if options.worker:
        bench = Bench()
        common.serve({"prepare": bench.prepare, "measure": bench.measure})
        return 0
    try:
        if cuda_decode.wanted(options):
            cuda_decode.check(options)
            return cuda_decode.main(options)
        folder = models.resolve(options.model)
        absent = _absent_rows(options)
        rows = [name for name in options.rows if name not in absent]
        gguf = _gguf_file(options) if set(rows) & set(_LLAMA_CPP) else None
        with tempfile.TemporaryDirectory() as scratch:
            files = {"llama_cpp": gguf}
            if gguf is not None and "llama_cpp_bf16" in rows:
                files["llama_cpp_bf16"] = _in_bfloat16(gguf, Path(scratch))
            results = run(rows, folder, files, options)
    except (ValueError, models.ModelUnavailable, common.WorkerFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    outcome = summarize(results, options, absent)
    show(outcome)
    common.write_outcome(outcome, options.json)
    return 0


def run(rows: list[str], folder: Path, gguf: Mapping[str, Path | None], options: argparse.Namespace) -> dict[str, dict]:
    """Prepares all rows one after another, then lets them take turns; returns the raw results of each."""
    from tqdm import tqdm

    results: dict[str, dict] = {}
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=len(rows) * (1 + options.repeats), unit="run", desc="decode"))
        workers = {}
        for name in rows:
            bar.set_postfix_str(f"preparing {name}")
            workers[name] = stack.enter_context(closing(common.Worker("benchmarks.decode", name, options.threads)))
            results[name] = workers[name].ask("prepare", **_job(name, folder, gguf.get(name), options))
            results[name]["tokens_per_s"] = []
            bar.update()
        for turn in range(options.repeats):
            for name, worker in workers.items():
                bar.set_postfix_str(f"round {turn + 1}: {name}")
                measured = worker.ask("measure")
                results[name]["tokens_per_s"].append(measured["tokens_per_s"])
                results[name]["peak_rss_bytes"] = measured["peak_rss_bytes"]
                bar.update()
    return results


def summarize(results: dict[str, dict], options: argparse.Namespace, absent: dict[str, str]) -> dict:
    """Returns the outcome as the JSON file holds it."""
    rows = {
        name: {**result, "decode_tokens_per_s": statistics.median(result["tokens_per_s"])}
        for name, result in results.items()
    }
    speeds = {name: row["decode_tokens_per_s"] for name, row in rows.items()}
    first = {name: row["first_token_s"] for name, row in rows.items()}
    second = {name: row["second_token_s"] for name, row in rows.items()}
    return {
        **common.setting("decode", options),
        "rows": rows,
        "absent": absent,
        "ratios": common.ratios(speeds, SPEED_RATIOS),
        "first_token_ratios": common.ratios(first, FIRST_TOKEN_RATIOS),
        "second_token_ratios": common.ratios(second, FIRST_TOKEN_RATIOS),
    }


def show(outcome: dict) -> None:
    """Prints the table, why rows are absent, and the ratios."""
    common.print_setting(outcome)
    print()
    common.print_table(
        ["", "decode tokens/s", "first token, s", "second token, s", "mean depth", "peak RSS, MiB"],
        [
            [
                name,
                row["decode_tokens_per_s"],
                row["first_token_s"],
                row["second_token_s"],
                row["mean_depth"],
                round(row["peak_rss_bytes"] / 2**20),
            ]
            for name, row in outcome["rows"].items()
        ],
    )
    for name, reason in outcome["absent"].items():
        print(f"{name}: absent, {reason}")
    for title, key in (
        ("decode tokens/s", "ratios"),
        ("first token", "first_token_ratios"),
        ("second token", "second_token_ratios"),
    ):
        if outcome[key]:
            print(f"\nRatios of {title}")
        for pair, value in outcome[key].items():
            print(f"  {pair:34} {value:.2f}")


class Bench:
    """One row inside its worker process."""

    def prepare(self, **job) -> dict:
        """Loads, compiles and warms up; returns the times of the first tokens and the mean exit depth."""
        self.run = _llama_cpp_runner(job) if job["backend"] == "llama_cpp" else _torch_runner(job)
        first, second = self.run.first_call()
        return {"first_token_s": first, "second_token_s": second, "mean_depth": self.run.warm_up()}

    def measure(self) -> dict:
        """Generates once; returns the decode speed and the peak memory so far."""
        return {"tokens_per_s": self.run.rate(), "peak_rss_bytes": common.peak_rss_bytes()}


class TorchRunner:
    """Generates with a Hugging Face model, compiled or not.

    The plain model has the cache that `generate` gives it by default; compiled ones have a static cache.
    """

    def __init__(self, model, prompt, job: dict) -> None:
        self.model, self.prompt, self.job = model, prompt, job

    def first_call(self) -> tuple[float, float]:
        """Compiles and returns the seconds from there to the first and to the second new token."""
        start = time.perf_counter()
        options = {k: self.model.config.num_hidden_layers if v == NEVER else v for k, v in self.job["options"].items()}
        if self.job["backend"] != "eager":
            self.model.compile(backend=self.job["backend"], options=options)
        setup = time.perf_counter() - start
        first, second = self._generate(stop_after=2).times
        return setup + first, setup + second

    def warm_up(self) -> float:
        """Generates once untimed and returns the mean exit depth, which greedy repeats share."""
        if self.job["backend"] != "river":
            self._generate()
            return float(self.model.config.num_hidden_layers)
        import river_compile

        with river_compile.trace() as trace:
            self._generate()
        return trace.mean_depth

    def rate(self) -> float:
        """Returns the decode tokens/s of one generation."""
        return self._generate().decode_tokens_per_s

    def _generate(self, stop_after: int | None = None):
        from river_compile.cli.timing import generate

        static = self.job["backend"] != "eager"
        return generate(self.model, self.prompt, self.job["new_tokens"], static_cache=static, stop_after=stop_after)


class LlamaCppRunner:
    """Generates with llama.cpp from the GGUF file that the model was made of."""

    def __init__(self, llama, prompt: list[int], job: dict) -> None:
        self.llama, self.prompt, self.job = llama, prompt, job

    def first_call(self) -> tuple[float, float]:
        """Returns the seconds to the first and to the second new token; nothing is compiled."""
        first, second = self._generate(2)
        return first, second

    def warm_up(self) -> None:
        """Generates once untimed; there are no exits to report."""
        self._generate(self.job["new_tokens"])

    def rate(self) -> float:
        """Returns the decode tokens/s of one generation."""
        from river_compile.cli.timing import decode_rate

        return decode_rate(self._generate(self.job["new_tokens"]))

    def _generate(self, new_tokens: int) -> list[float]:
        """Generates greedily, past any end-of-sequence token; returns the seconds to each new token."""
        self.llama.reset()
        start = time.perf_counter()
        stream = self.llama.generate(self.prompt, top_k=1, temp=0.0, repeat_penalty=1.0, reset=True)
        return [time.perf_counter() - start for _, _ in zip(range(new_tokens), stream, strict=False)]


def _torch_runner(job: dict) -> TorchRunner:
    import torch

    models.quiet()
    torch.set_num_threads(job["threads"])
    model, tokenizer = models.load(job["folder"], dtype=job["dtype"])
    return TorchRunner(model, models.encode(tokenizer, PROMPT), job)


def _llama_cpp_runner(job: dict) -> LlamaCppRunner:
    from llama_cpp import Llama
    from transformers import AutoTokenizer

    models.quiet()
    prompt = models.encode(AutoTokenizer.from_pretrained(job["folder"]), PROMPT)[0].tolist()
    llama = Llama(
        model_path=job["gguf"],
        n_ctx=len(prompt) + job["new_tokens"] + 1,
        n_threads=job["threads"],
        n_threads_batch=job["threads"],
        verbose=False,
    )
    return LlamaCppRunner(llama, prompt, job)


def _job(name: str, folder: Path, gguf: Path | None, options: argparse.Namespace) -> dict:
    """Returns what a worker must know to prepare a row."""
    row = ROWS[name]
    return {
        **asdict(row),
        "dtype": row.dtype or options.dtype,
        "folder": str(folder),
        "gguf": str(gguf),
        "new_tokens": options.new_tokens,
        "threads": options.threads,
    }


def _absent_rows(options: argparse.Namespace) -> dict[str, str]:
    """Returns the wanted rows that cannot run here, each with the reason."""
    reason = ""
    if importlib.util.find_spec("llama_cpp") is None:
        reason = "llama-cpp-python is not installed (pip install llama-cpp-python)"
    elif options.gguf is None and options.model not in models.MODELS:
        reason = "the model did not come from a GGUF file (name one with --gguf)"
    return {name: reason for name in _LLAMA_CPP if name in options.rows and reason}


def _gguf_file(options: argparse.Namespace) -> Path:
    """Returns the GGUF file that the model was made of."""
    if options.gguf is None:
        return models.gguf_path(options.model)
    if not options.gguf.is_file():
        raise ValueError(f"--gguf {options.gguf} is not a file; name the GGUF file that the model was made of")
    return options.gguf


def _in_bfloat16(gguf: Path, folder: Path) -> Path:
    """Writes a GGUF file's weights as bfloat16, which llama.cpp does itself."""
    import llama_cpp

    target = folder / "bfloat16.gguf"
    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype, how.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_BF16, True
    if llama_cpp.llama_model_quantize(str(gguf).encode(), str(target).encode(), ctypes.byref(how)):
        raise ValueError(f"llama.cpp cannot write {gguf} in bfloat16")
    return target


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    shared = ("model", "dtype", "new-tokens", "threads", "repeats", "json", "worker")
    parser = common.command_line(__doc__, *shared)
    parser.add_argument("--gguf", type=Path, help="the GGUF file that the model folder was made of, for llama_cpp")
    parser.add_argument(
        "--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW", help=", ".join(ROWS)
    )
    cuda_decode.add_arguments(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
