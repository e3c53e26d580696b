"""Decode speed of the plain model, Inductor, River, llama.cpp and OpenVINO, side by side.

    python -m benchmarks.decode --record decode        # the rows of README.md's table, whose numbers it keeps
    python -m benchmarks.decode --model DIR --gguf FILE --rows eager fast llama_cpp --json decode.json
    python -m benchmarks.decode --batch 8 --rows eager fast --neighbour
    python -m benchmarks.decode --prompts 32 256 1024

Every row is a separate process with an empty Inductor cache. Each generates the same prompt's greedy continuation
(`--batch` of them together), once to compile, once to warm up, and then `--repeats` times; the repeats of all rows
alternate. Columns:

    decode tokens/s   median over the repeats, prefill excluded, all texts of the batch together
    beside another    the same with one other process busy all the time, where `--neighbour` asks for it
    outside, ms       of a token, what is not in River's executor: choosing it, its inputs, and for `torch_compile`
                      Dynamo's guards and transformers' loop
    first token, s    from the call that compiles to the first new token: packing and compiling the prompt's graph
    second token, s   the same to the second new token: the decode graph is compiled too
    pp256 tokens/s    how fast a prompt of so many tokens is read, for each length that `--prompts` names
    mean depth        backbone blocks executed per decoded token
    peak RSS, MiB     of the row's process, loading included (mapped weight files count)

`--device cuda` measures random models on a GPU, `--estimate` says what can be said without one (cuda_decode.py).
All processes stay in memory until the end. `--one-process` measures one row after another instead, for models of a
billion parameters or more: OpenVINO alone keeps three times the bytes of a 16-bit file.
llama.cpp and OpenVINO are optional (`pip install llama-cpp-python openvino-genai`). The row `openvino` has the GGUF
file's weights rounded to float16, since OpenVINO GenAI reads no bfloat16 there. Nothing here looks at the quality of
the text.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict
from pathlib import Path

from benchmarks import common, cuda_decode, decode_rows, llama_cpp_runner
from benchmarks.decode_rows import ACCELERATED, FULL_DEPTH, GGUF_RUNNERS, ROWS
from river_compile.cli import shared
from tools import demo_models

PROMPT = "Write a Python function that returns the n-th Fibonacci number."


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    options = _parse(arguments)
    if options.worker:
        bench = Bench()
        common.serve({"prepare": bench.prepare, "measure": bench.measure})
        return 0
    try:
        if cuda_decode.wanted(options):
            cuda_decode.check(options)
            return cuda_decode.main(options)
        folder = Path(demo_models.resolve(options.model))
        absent = decode_rows.absent(options, folder)
        rows = [name for name in decode_rows.wanted(options) if name not in absent]
        with tempfile.TemporaryDirectory() as scratch:
            results = run(rows, _files(rows, folder, options, Path(scratch)), options)
    except (ValueError, demo_models.ModelUnavailable, common.WorkerFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    outcome = summarize(results, options, absent)
    show(outcome)
    common.write_outcome(outcome, options.json)
    common.record(outcome, options)
    return 0


def _files(rows: list[str], folder: Path, options: argparse.Namespace, scratch: Path) -> dict[str, Path]:
    """Return the GGUF file or the model folder of each row, writing those that need it."""
    written: dict[str, Path] = {}
    if any(map(decode_rows.needs_gguf, rows)):
        written[""] = llama_cpp_runner.gguf_file(options.gguf, options.model)
    for kind in {ROWS[name].file for name in rows} - {""}:
        written[kind] = llama_cpp_runner.requantize(written[""], scratch / f"{kind}.gguf", kind)
    files = {}
    for name in rows:
        row, files[name] = ROWS[name], folder
        if row.backend in GGUF_RUNNERS:
            files[name] = written[row.file]
        elif row.file:
            files[name] = scratch / f"{row.file}-model"
            if not files[name].exists():
                demo_models.convert(f"the {row.file} file", written[row.file], files[name], row.dtype or options.dtype)
    return files


def run(rows: list[str], files: Mapping[str, Path], options: argparse.Namespace) -> dict[str, dict]:
    """Prepare all rows one after another, then alternate their repeats; return the raw results of each.

    With `--one-process` each row is measured alone instead, and its process ends before the next one begins.
    """
    from tqdm import tqdm

    settings = ["tokens_per_s", "tokens_per_s_beside"] if options.neighbour else ["tokens_per_s"]
    results: dict[str, dict] = {}
    with tqdm(total=len(rows) * (1 + options.repeats * len(settings)), unit="run", desc="decode") as bar:
        for group in [[name] for name in rows] if options.one_process else [rows]:
            results |= _measured(group, files, options, settings, bar)
    return results


def _measured(
    rows: list[str], files: Mapping[str, Path], options: argparse.Namespace, settings: list[str], bar
) -> dict[str, dict]:
    """Return the raw results of rows whose repeats alternate."""
    results: dict[str, dict] = {}
    with ExitStack() as stack:
        workers = {}
        for name in rows:
            bar.set_postfix_str(f"preparing {name}")
            workers[name] = stack.enter_context(closing(common.Worker("benchmarks.decode", name, options.threads)))
            results[name] = workers[name].ask("prepare", **_job(name, files[name], options))
            results[name].update({setting: [] for setting in settings}, prompts={str(n): [] for n in options.prompts})
            bar.update()
        for turn, (name, worker), setting in itertools.product(range(options.repeats), workers.items(), settings):
            bar.set_postfix_str(f"round {turn + 1}: {name}")
            with common.busy_process() if setting == "tokens_per_s_beside" else nullcontext():
                alone = setting == "tokens_per_s"
                measured = worker.ask("measure", prompts=options.prompts if alone else [])
            results[name][setting].append(measured["tokens_per_s"])
            results[name]["peak_rss_bytes"] = measured["peak_rss_bytes"]
            results[name]["outside_ms"] = min(
                filter(None, (measured.get("outside_ms"), results[name].get("outside_ms"))), default=None
            )
            for length, rate in measured["prompts"].items():
                results[name]["prompts"][length].append(rate)
            bar.update()
    return results


def summarize(results: dict[str, dict], options: argparse.Namespace, absent: dict[str, str]) -> dict:
    """Return the outcome as the JSON file holds it."""
    rows = {name: {**result, **_medians(result)} for name, result in results.items()}
    speeds = {name: row["decode_tokens_per_s"] for name, row in rows.items()}
    first = {name: row["first_token_s"] for name, row in rows.items()}
    second = {name: row["second_token_s"] for name, row in rows.items()}
    return {
        **common.setting("decode", options),
        "batch": options.batch,
        "prompts": options.prompts,
        "rows": rows,
        "absent": absent,
        "ratios": common.ratios(speeds, decode_rows.SPEED_RATIOS),
        "first_token_ratios": common.ratios(first, decode_rows.FIRST_TOKEN_RATIOS),
        "second_token_ratios": common.ratios(second, decode_rows.FIRST_TOKEN_RATIOS),
    }


def _medians(result: dict) -> dict[str, float]:
    medians = {"decode_tokens_per_s": "tokens_per_s", "beside_tokens_per_s": "tokens_per_s_beside"}
    prompts = {f"pp{length}_tokens_per_s": statistics.median(rates) for length, rates in result["prompts"].items()}
    return prompts | {to: statistics.median(result[of]) for to, of in medians.items() if of in result}


def show(outcome: dict) -> None:
    """Print the table, why rows are absent, and the ratios."""
    common.print_setting(outcome)
    print()
    columns = {
        "decode tokens/s": "decode_tokens_per_s",
        "beside another": "beside_tokens_per_s",
        **{f"pp{length} tokens/s": f"pp{length}_tokens_per_s" for length in outcome["prompts"]},
        "outside, ms": "outside_ms",
        "first token, s": "first_token_s",
        "second token, s": "second_token_s",
        "mean depth": "mean_depth",
    }
    measured = {head: key for head, key in columns.items() if all(key in row for row in outcome["rows"].values())}
    common.print_table(
        ["", *measured, "peak RSS, MiB"],
        [
            [name, *(row[key] for key in measured.values()), round(row["peak_rss_bytes"] / 2**20)]
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
        """Load, compiles and warms up; return the times of the first tokens and the mean exit depth."""
        runner = GGUF_RUNNERS.get(job["backend"])
        self.run = runner.build(job) if runner else _torch_runner(job)
        first, second = self.run.first_call()
        self._prompt_rates(job["prompts"])
        return {"first_token_s": first, "second_token_s": second, "mean_depth": self.run.warm_up()}

    def measure(self, prompts: list[int]) -> dict:
        """Read prompts of these lengths and generates, once; return the speeds and the peak memory so far."""
        rates = self._prompt_rates(prompts)
        outside = getattr(self.run, "outside_ms", lambda: None)()  # (no runner of a GGUF file has it)
        return {
            "tokens_per_s": self.run.rate(),
            "outside_ms": outside,
            "prompts": rates,
            "peak_rss_bytes": common.peak_rss_bytes(),
        }

    def _prompt_rates(self, lengths: list[int]) -> dict[str, float]:
        return {str(length): length / self.run.prompt_seconds(length) for length in lengths}


class TorchRunner:
    """Generates with a Hugging Face model, compiled or not.

    The plain model has the cache that `generate` gives it by default; compiled ones have a static cache.
    """

    def __init__(self, model, prompt, text, job: dict) -> None:
        self.model, self.prompt, self.text, self.job = model, prompt, text, job

    def first_call(self) -> tuple[float, float]:
        """Compile and return the seconds from there to the first and to the second new token."""
        start = time.perf_counter()
        options = {
            k: self.model.config.num_hidden_layers if v == FULL_DEPTH else v for k, v in self.job["options"].items()
        }
        if self.job["backend"] in ACCELERATED:
            import river_compile

            quality = ACCELERATED[self.job["backend"]]
            river_compile.accelerate(self.model, quality, background_packing=False, **options)
        elif self.job["backend"] != "eager":
            backend = "river" if self.job["backend"] == "torch_compile" else self.job["backend"]
            self.model.compile(backend=backend, options=options)
        setup = time.perf_counter() - start
        first, second = self._generate(stop_after=2).times
        return setup + first, setup + second

    def warm_up(self) -> float:
        """Generate once untimed and return the mean exit depth, which greedy repeats share."""
        if self.job["backend"] not in ("river", "torch_compile"):
            self._generate()
            return float(self.model.config.num_hidden_layers)
        import river_compile

        with river_compile.trace() as trace:
            self._generate()
        return trace.mean_depth

    def rate(self) -> float:
        """Return the decode tokens/s of one generation."""
        return self._generate().decode_tokens_per_s * self.prompt.shape[0]

    def outside_ms(self) -> float | None:
        """Return the milliseconds of a token outside of River's executor; None without one."""
        if self.job["backend"] in ("eager", "inductor"):
            return None
        from river_compile.runtime.state import on_step

        inside = []
        with on_step(lambda _, record: inside.append(record.seconds)):
            times = self._generate().times
        tokens = len(times) - 1
        steps = inside[1:]  # (the prompt's is the first)
        return 1e3 * (times[-1] - times[0] - sum(steps)) / tokens

    def prompt_seconds(self, length: int) -> float:
        """Return the seconds to the first new token after a prompt of so many tokens."""
        return self._generate(stop_after=1, prompt=self.text[:, :length]).first_token_s

    def _generate(self, stop_after: int | None = None, prompt=None):
        from river_compile.reporting.timing import generate

        # (An accelerated model makes a static cache itself.)
        static, prompt = self.job["backend"] in ("inductor", "torch_compile"), self.prompt if prompt is None else prompt
        return generate(self.model, prompt, self.job["new_tokens"], static_cache=static, stop_after=stop_after)


def _torch_runner(job: dict) -> TorchRunner:
    import torch

    from river_compile.cli.bench import beginning

    shared.quiet()
    torch.set_num_threads(job["threads"])
    model, tokenizer = demo_models.load(job["folder"], dtype=job["dtype"])
    prompt = shared.encode(tokenizer, job["prompt"]).repeat(job["batch"], 1)
    text = beginning(tokenizer, max(job["prompts"], default=1)).repeat(job["batch"], 1)
    return TorchRunner(model, prompt, text, job)


def _job(name: str, file: Path, options: argparse.Namespace) -> dict:
    """Return what a worker must know to prepare a row."""
    row = ROWS[name]
    own = row.backend in (*ACCELERATED, "torch_compile") and not row.file
    twins = {"twins": options.twins} if own and options.twins else {}
    return {
        **asdict(row),
        "options": row.options | twins,
        "dtype": row.dtype or options.dtype,
        "folder": str(demo_models.resolve(options.model) if row.backend in GGUF_RUNNERS else file),
        "gguf": str(file),
        "new_tokens": options.new_tokens,
        "threads": options.threads,
        "batch": options.batch,
        "prompt": PROMPT,
        "prompts": options.prompts,
    }


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    shared = ("model", "dtype", "new-tokens", "threads", "repeats", "json", "record", "worker")
    parser = common.command_line(__doc__, *shared)
    parser.add_argument(
        "--batch", type=common.number(1), default=1, help="texts that are generated together (%(default)s)"
    )
    parser.add_argument(
        "--prompts", nargs="+", type=common.number(1), default=[], metavar="N", help="lengths of prompts to read, too"
    )
    parser.add_argument(
        "--twins", metavar="DIR", help="packed twins, as `river quantize` writes them, for River's rows"
    )
    parser.add_argument("--one-process", action="store_true", help="one row after another, if memory is short")
    parser.add_argument("--neighbour", action="store_true", help="also measure next to one busy process")
    parser.add_argument(
        "--gguf", type=Path, help="the GGUF file that the model folder was made of, for llama_cpp and openvino"
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=[*ROWS, decode_rows.ALL],
        default=decode_rows.DEFAULT,
        metavar="ROW",
        help=f"{', '.join(ROWS)}; or all (the rows of README.md's table)",
    )
    cuda_decode.add_arguments(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
