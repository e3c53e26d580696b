"""Clients that come at random to one server: tokens/s of all of them, and how long each waits for its first token.

    python -m benchmarks.serving --clients 8 --requests 4 --new-tokens 128 --json serving.json

The k-th client comes after a Poisson process of `--rate` a second, from a seed, and asks its questions one after
another. Servers alternate and meet the same clients: `river serve`, the same with one row, and llama.cpp's own server
with as many slots (benchmarks.peers: xllamacpp). Not handled: other machines for clients and server.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks import common, decode_rows, peers
from benchmarks.prompts import mixed
from tools import demo_models

START_S = 600.0  # to load, trace and pack where nothing is stored


@dataclass(frozen=True)
class Answer:
    """What one client saw of one answer; times by the clock of this process."""

    asked: float
    first: float
    ended: float
    tokens: int


class Server:
    """A server in its own process.

    Args:
        name: of its row.
        command: its arguments; "PORT" among them becomes a free port.
        environment: more variables of its process.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.name = name
        self._folder = tempfile.TemporaryDirectory(prefix="river_benchmark_")
        self._log = Path(self._folder.name) / "log.txt"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [word.replace("PORT", str(self.port)) for word in command],
                stdout=log,
                stderr=log,
                cwd=common.ROOT,
                env={**os.environ, **environment},
            )

    def wait(self) -> None:
        """Wait until it is healthy.

        Raises:
            WorkerFailed: it has ended, or takes too long.
        """
        end = time.monotonic() + START_S
        while time.monotonic() < end and self._process.poll() is None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            time.sleep(0.2)
        said = "\n".join(self._log.read_text(errors="replace").splitlines()[-common.LOG_LINES :])
        raise common.WorkerFailed(f"{self.name} did not start:\n{said}")

    def ask(self, question: str, new_tokens: int) -> Answer:
        """Ask one question and read the answer as it is streamed.

        Raises:
            WorkerFailed: it has refused the request.
        """
        body = {
            "messages": [{"role": "user", "content": question}],
            "max_tokens": new_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        asked, first, tokens = time.perf_counter(), None, 0
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=START_S)
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise common.WorkerFailed(f"{self.name} answered {response.status}: {response.read(500)!r}")
        for chunk in _events(response):
            if first is None and any(choice["delta"].get("content") for choice in chunk["choices"]):
                first = time.perf_counter()
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
        connection.close()
        ended = time.perf_counter()
        return Answer(asked, ended if first is None else first, ended, tokens)

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()


def _events(response: http.client.HTTPResponse) -> Iterator[dict]:
    for line in response:
        said = line.decode().strip().removeprefix("data: ")
        if said.startswith("{"):
            chunk = json.loads(said)
            if "error" in chunk:
                raise common.WorkerFailed(f"an answer broke off: {chunk['error']}")
            yield chunk


def arrivals(clients: int, rate: float, seed: int) -> list[float]:
    """Return the seconds at which clients come, of a Poisson process of so many a second."""
    gaps = random.Random(seed)
    return [0.0, *itertools.accumulate(gaps.expovariate(rate) for _ in range(clients - 1))]


def visit(server: Server, questions: Sequence[Sequence[str]], times: Sequence[float], new_tokens: int) -> list[Answer]:
    """Let clients come to a server at these times, each with its questions; return all answers."""
    began = time.perf_counter()

    def client(own: Sequence[str], comes: float) -> list[Answer]:
        threading.Event().wait(max(0.0, began + comes - time.perf_counter()))
        return [server.ask(question, new_tokens) for question in own]

    with ThreadPoolExecutor(len(questions)) as pool:
        return [*itertools.chain.from_iterable(pool.map(client, questions, times))]


def summary(answers: Sequence[Answer]) -> dict[str, float]:
    """Return tokens/s of all answers together, and the median and 95th percentile of seconds to a first token."""
    waits = sorted(answer.first - answer.asked for answer in answers)
    span = max(answer.ended for answer in answers) - min(answer.asked for answer in answers)
    return {
        "tokens_per_s": sum(answer.tokens for answer in answers) / span,
        "tokens": sum(answer.tokens for answer in answers),
        "first_token_s": statistics.median(waits),
        "first_token_p95_s": waits[min(len(waits) - 1, int(0.95 * len(waits)))],
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = common.command_line(__doc__, "model", "dtype", "new-tokens", "threads", "json", new_tokens=48)
    parser.add_argument("--clients", type=common.number(1), nargs="+", default=[1, 4, 8, 16], help="(%(default)s)")
    parser.add_argument("--requests", type=common.number(1), default=2, help="of each client (%(default)s)")
    parser.add_argument("--rate", type=float, default=4.0, help="clients that come a second (%(default)s)")
    parser.add_argument("--rows", type=common.number(1), default=8, help="of the batch, and slots (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the times at which clients come (%(default)s)")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the file that the model was made of")
    options = parser.parse_args(arguments)
    outcome = common.attempted(_measure, options)
    if outcome is None:
        return 1
    _show(outcome)
    common.write_outcome(outcome, options.json)
    return 0


def commands(options: argparse.Namespace) -> dict[str, list[str]]:
    """Return the command of each server that can run here."""
    river = [sys.executable, "-m", "river_compile", "serve", demo_models.resolve(options.model), "--host", "127.0.0.1"]
    river += ["--port", "PORT", "--dtype", options.dtype, "--threads", str(options.threads), "--queue", "64"]
    found = {"river": [*river, "--max-num-seqs", str(options.rows)], "river_1": [*river, "--max-num-seqs", "1"]}
    if peers.why_not("xllamacpp") or decode_rows.why_no_gguf(options):
        return found
    gguf = decode_rows.gguf_file(options)
    files = {"llama_cpp": gguf}
    if not peers.why_not("llama-cpp-python"):
        files["llama_cpp_bf16"] = peers.converted("llama-cpp-python", gguf, "BF16")
    for name, file in files.items():
        theirs = [str(peers.python("xllamacpp")), str(peers.script("xllamacpp")), str(file), "PORT"]
        found[name] = [*theirs, str(options.rows), str(options.threads)]
    return found


def _measure(options: argparse.Namespace) -> dict:
    outcome = {**common.setting("serving", options), "rows": options.rows, "requests": options.requests}
    outcome |= {"rate": options.rate, "seed": options.seed, "found": []}
    prompts = itertools.cycle(mixed())  # (each once: servers keep what they have read)
    threads = {"OMP_NUM_THREADS": str(options.threads)}
    with contextlib.ExitStack() as stack:
        servers = []
        for name, command in commands(options).items():
            server = Server(name, command, threads)
            stack.callback(server.close)
            servers.append(server)
        warm = [[next(prompts)] for _ in range(options.rows)]
        for server in servers:
            server.wait()
            visit(server, warm, [0.0] * len(warm), options.new_tokens)
        for clients in options.clients:
            questions = [[next(prompts) for _ in range(options.requests)] for _ in range(clients)]
            times = arrivals(clients, options.rate, options.seed)
            for server in servers:
                found = summary(visit(server, questions, times, options.new_tokens))
                outcome["found"].append({"clients": clients, "server": server.name, **found})
    return outcome


def _show(outcome: dict) -> None:
    common.print_setting(outcome)
    print(f"{outcome['requests']} questions a client, {outcome['rate']:g} clients a second, {outcome['rows']} rows\n")
    names = ("clients", "server", "tokens", "tokens_per_s", "first_token_s", "first_token_p95_s")
    heads = ["clients", "server", "tokens", "tokens/s of all", "first token, median s", "95 %, s"]
    common.print_table(heads, [[row[name] for name in names] for row in outcome["found"]])


if __name__ == "__main__":
    sys.exit(main())
