"""How a worker process answers the benchmark that started it: one JSON object per line on stdin and stdout.

Only the standard library: workers of other programs run in environments without River and torch.
"""

from __future__ import annotations

import abc
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any


def serve(handlers: Mapping[str, Callable[..., dict]]) -> None:
    """Answer the commands of a `common.Worker` until its end of the pipe closes.

    Args:
        handlers: a function per command; it takes the command's arguments and returns what JSON can hold.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not end up among the replies
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = handlers[request.pop("command")](**request)
        except Exception as error:  # any error is the reply, and the process that asked continues without this one
            import traceback

            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


def peak_rss_bytes() -> int:
    """Return the largest resident memory of this process so far, memory-mapped files included."""
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # may count what the parent used before it started this process, so it is the second choice

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Clock:
    """Notes tokens, and the seconds from its making to each."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.times: list[float] = []
        self._start = time.perf_counter()

    def note(self, *tokens: int) -> None:
        """Note tokens that are there now."""
        now = time.perf_counter() - self._start
        self.tokens += tokens
        self.times += [now] * len(tokens)


class Peer(abc.ABC):
    """A program with a model, in its worker process."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        """Load the model of a job.

        Args:
            job: "file" is the model's file or folder, "threads" and "context" (tokens) are numbers, and a row of
                `benchmarks.decode` may have more.
        """
        self.job = job

    @abc.abstractmethod
    def generate(self, ids: list[int], clock: Clock, new_tokens: int) -> None:
        """Generate greedily after a prompt, past any end-of-sequence token, and read the whole prompt for that."""

    def forget(self) -> None:  # noqa: B027  (programs that keep nothing have nothing to do)
        """Drop what is kept of earlier prompts."""

    def build(self) -> str:
        """Return how the program was compiled, as far as it tells."""
        return ""


def run(peer: type[Peer], convert: Callable[[str, str, str], None] | None = None) -> None:
    """Be the worker of a program: answer "prepare", "generate", "facts" and "convert".

    Args:
        peer: its class.
        convert: writes a model's file or folder as another kind to a path.
    """
    loaded: list[Peer] = []

    def prepare(prompts: list[list[int]], new_tokens: int, **job: Any) -> dict:
        loaded.append(peer(job))
        if not prompts:
            return {}
        first, second = generate(prompts[0], 2)["times"]
        for number, prompt in enumerate(prompts):
            generate(prompt, 2 if number else new_tokens)
        return {"first_token_s": first, "second_token_s": second}

    def generate(ids: list[int], new_tokens: int, fresh: bool = True) -> dict:
        if fresh:
            loaded[0].forget()
        clock = Clock()
        loaded[0].generate(ids, clock, new_tokens)
        return {"tokens": clock.tokens[:new_tokens], "times": clock.times[:new_tokens]}

    def facts() -> dict:
        build = loaded[0].build()
        return {"peak_rss_bytes": peak_rss_bytes(), **({"build": build} if build else {})}

    def converted(source: str, target: str, kind: str) -> dict:
        assert convert is not None
        convert(source, target, kind)
        return {}

    serve({"prepare": prepare, "generate": generate, "facts": facts, "convert": converted})
