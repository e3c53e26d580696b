"""Cases of kind "serving": random clients of one server, some of whom leave, ask nonsense or ask too much.

A tiny model is served in this process. Its texts are taken one after another; then the same requests come from several
clients at the same time, round after round. Every text that is finished is the one that was alone. In the end no
request is left in a row or in the queue, and memory has not risen.
"""

from __future__ import annotations

import contextlib
import gc
import http.client
import json
import logging
import random
import socket
import statistics
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from river_compile.cli import serve
from river_compile.system import trim_heap
from tests.support.tokenizers import save_tiny_llama
from tools.soak.cases import Case, Failure

CONTEXT, ROUNDS = 256, 48
# What rises faster leaks; a cache more, once, is some ten tensors in 50 requests.
BYTES_PER_REQUEST, TENSORS_PER_REQUEST = 20_000.0, 0.5
_ENDS = ("answered", "answered", "answered", "leaves", "bad", "too long")
_BAD = ({"temperature": -1}, {"top_p": 7}, {"max_tokens": 0}, {"max_tokens": "many"})


def draw(rng: random.Random) -> Case:
    clients = [[_request(rng) for _ in range(rng.choice((1, 2, 3)))] for _ in range(rng.choice((2, 4, 8)))]
    return {
        "rows": rng.choice((1, 2, 4, 8)),
        "queue": rng.choice((0, 2, 8)),
        "quality": rng.choice(("exact", "exact", "exact", "strict")),  # (with exits rows decide together)
        "clients": clients,
    }


def _request(rng: random.Random) -> Case:
    end = rng.choice(_ENDS)
    greedy, sampled = {"temperature": 0}, {"temperature": 0.8, "top_p": 0.9, "seed": rng.randrange(100)}
    length = CONTEXT + rng.randrange(50) if end == "too long" else rng.choice((1, 7, 30))
    return {
        "end": end,
        "text": "".join(rng.choice("abcdefgh ") for _ in range(length)),
        "settings": {"max_tokens": rng.choice((1, 6, 20)), **rng.choice((greedy, greedy, sampled))},
        "bad": rng.choice(_BAD) if end == "bad" else {},
        "stream": rng.random() < 0.5,
        "reads": rng.choice((0, 1, 3)),  # lines, before it leaves
    }


def run(case: Case, folder: Path) -> str:
    """Serve and let the clients come, round after round."""
    torch._dynamo.reset()
    served = _Served(case, folder / "model")
    try:
        requests = [request for client in case["clients"] for request in client]
        alone = {_key(r): served.ask(r) for r in requests if r["end"] == "answered"}
        if any(status != 200 for status, _ in alone.values()):
            raise Failure(f"alone, a good request was refused: {alone}")
        samples: list[tuple[int, int, int]] = []
        statuses: Counter[int] = Counter()
        for number in range(1, ROUNDS + 1):
            statuses += _round(served, case["clients"], alone)
            served.is_empty()
            tensors = live_tensors()  # (collects garbage, which memory is measured without)
            samples.append((number * len(requests), resident_bytes(), tensors))
        _is_flat(samples[ROUNDS // 2 :])  # (batches of other sizes have run by then, with their graphs and caches)
    finally:
        served.server.close()
    return "passed" if 429 not in statuses else "passed, some refused"


def smaller(case: Case) -> Iterator[Case]:
    clients = case["clients"]
    if len(clients) > 1:
        for i in range(len(clients)):
            yield {**case, "clients": [*clients[:i], *clients[i + 1 :]]}
    for i, client in enumerate(clients):
        if len(client) > 1:
            yield {**case, "clients": [*clients[:i], client[:-1], *clients[i + 1 :]]}


class _Served:
    """A server of a tiny model in this process."""

    def __init__(self, case: Case, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        # (Only with the C++ kernels prompts join.)
        how = {"num_assistant_tokens": 3, "kernels": "native", "group_size": 32, "compile_cache": False}
        where = (save_tiny_llama(folder, CONTEXT), "127.0.0.1", self.port, "float32", case["rows"], case["queue"])
        self.server = serve.make_server(*where, strict=case["quality"] == "strict", **how)
        logging.getLogger("uvicorn.access").disabled = True
        while not self.server.started:
            self.server.wait(0.01)

    def send(self, request: Case) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        messages = [{"role": "user", "content": request["text"]}]
        body = {"messages": messages, "stream": request["stream"], **request["settings"], **request["bad"]}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        return connection

    def ask(self, request: Case) -> tuple[int, str]:
        """Return the status and the text of an answer that is waited for."""
        with contextlib.closing(self.send(request)) as connection:
            response = connection.getresponse()
            said = response.read().decode()
        if response.status != 200 or not request["stream"]:
            found = json.loads(said) if response.status == 200 else {}
            return response.status, found["choices"][0]["message"]["content"] if found else said
        chunks = [json.loads(line[6:]) for line in said.splitlines() if line.startswith("data: {")]
        if any("error" in chunk for chunk in chunks):
            return 400, said
        return 200, "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])

    def leave(self, request: Case) -> None:
        """Send a request and close the connection after a few lines, or none, of what comes."""
        with contextlib.closing(self.send(request)) as connection:
            if request["reads"]:
                response = connection.getresponse()
                for _ in range(request["reads"]):
                    response.readline()

    def is_empty(self) -> None:
        """Wait until no request is left in a row or in the queue."""
        for _ in range(3000):
            counters = self.server.state.manager.batch.counters
            if counters.rows_in_use == counters.queued == 0:
                return
            threading.Event().wait(0.01)
        raise Failure(f"clients have gone, and {counters.rows_in_use} rows and {counters.queued} places stay taken")


def _key(request: Case) -> str:
    return json.dumps([request["text"], request["settings"], request["stream"]])


def _round(served: _Served, clients: list[list[Case]], alone: dict[str, tuple[int, str]]) -> Counter[int]:
    """Let all clients ask at the same time; return how often each status came."""

    def visit(requests: list[Case]) -> list[int]:
        found = []
        for request in requests:
            if request["end"] == "leaves":
                served.leave(request)
                continue
            status, text = served.ask(request)
            found.append(status)
            if status == 429:
                continue
            if request["end"] != "answered":
                if status < 400:
                    raise Failure(f"a request that cannot be answered got {status}: {request}")
            elif (status, text) != alone[_key(request)]:
                raise Failure(f"among others {request} got {(status, text)!r}, alone {alone[_key(request)]!r}")
        return found

    with ThreadPoolExecutor(len(clients)) as pool:
        return Counter(status for found in pool.map(visit, clients) for status in found)


def live_tensors() -> int:
    """Return the tensors that Python holds, after a garbage collection."""
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def resident_bytes() -> int:
    """Return the process's resident memory, without what the allocator holds and nothing uses."""
    trim_heap()
    return 4096 * int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])


def _is_flat(samples: list[tuple[int, int, int]]) -> None:
    at, memory, tensors = zip(*samples, strict=True)
    rises = [statistics.linear_regression(at, values).slope for values in (memory, tensors)]
    print(f"memory: {rises[0]:+.0f} bytes and {rises[1]:+.4f} tensors a request over {at[-1]} requests")
    if rises[0] > BYTES_PER_REQUEST or rises[1] > TENSORS_PER_REQUEST:
        raise Failure(f"memory rises by {rises[0]:.0f} bytes and {rises[1]:.3f} tensors a request")
