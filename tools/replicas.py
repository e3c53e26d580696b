"""Rounds of processes that start together from nothing and share what they make, one of which is killed.

    python -m tools.replicas --rounds 20
    python -m tools.replicas --rounds 2 --kernels eager     # no compiler: quick

Each round begins with an empty folder: no saved twins, no C++ kernels, no Inductor cache, no precompiled header.
Several processes load the same tiny model with ``on_missing_twins="save"`` and decode. At a random moment one is
killed, alone (its compiler keeps running) or with all that it started. The round is clean where

    * the others end by themselves with the logits of a round in which nobody was killed,
    * one more process starts from what is there, has these logits, and packs nothing.

Before the first round no process is killed: the twins are packed once, and no file is compiled twice.

Not handled: a machine that loses power, and folders on network disks that know no locks.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch._inductor.codecache as codecache
import torch._inductor.config as inductor

from river_compile.backend import river
from river_compile.twins import file
from tests.support.decoding import decode, new_cache
from tests.support.families import make

TIMEOUT_S = 900
OPTIONS = {"quantizer": "rtn", "group_size": 32, "exit_depth": 1, "on_missing_twins": "save"}


class Unclean(Exception):
    """A round in which something was damaged, made twice or stopped; the message says what."""


class Round:
    """One folder and the processes that share it.

    Args:
        folder: empty.
        kernels: the backend's option.
    """

    def __init__(self, folder: Path, kernels: str) -> None:
        self.folder, self._kernels = folder, kernels
        self._logs = {name: folder / f"{name}.log" for name in ("packed", "compiled")}
        compiler = folder / "bin" / "g++"
        compiler.parent.mkdir()
        real, log = shutil.which("g++") or "g++", shlex.quote(str(self._logs["compiled"]))
        compiler.write_text(f'#!/bin/sh\necho "$*" >> {log}\nexec {real} "$@"\n')
        compiler.chmod(0o755)

    def start(self, name: str) -> int:
        """Fork a process, in a separate group, that decodes and leaves a hash of its logits; return its id."""
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.setpgid(0, 0)
                (self.folder / name).write_text(self._decode())
                status = 0
            finally:
                os._exit(status)
        with contextlib.suppress(PermissionError):  # (it may be a group by now, or not yet)
            os.setpgid(child, child)
        return child

    def result(self, name: str, process: int) -> str:
        """Wait for a process and return its hash; raise an `Unclean` where it failed or hangs."""
        deadline = time.monotonic() + TIMEOUT_S
        while (ended := os.waitpid(process, os.WNOHANG)) == (0, 0):
            if time.monotonic() > deadline:
                os.killpg(process, signal.SIGKILL)
                os.waitpid(process, 0)
                raise Unclean(f"{name} had to wait for more than {TIMEOUT_S} s")
            time.sleep(0.01)  # (waitpid knows no timeout)
        if ended[1]:
            raise Unclean(f"{name} ended with status {os.waitstatus_to_exitcode(ended[1])}")
        return (self.folder / name).read_text()

    def packed(self) -> int:
        """Return how often the twins were packed."""
        return len(self._lines("packed"))

    def compiled(self) -> collections.Counter[str]:
        """Return how often each file of the shared folder was compiled."""
        commands = [shlex.split(line) for line in self._lines("compiled")]
        targets = [Path(command[command.index("-o") + 1]) for command in commands if "-o" in command]
        return collections.Counter(target.name for target in targets if self.folder in target.parents)

    def _lines(self, log: str) -> list[str]:
        return self._logs[log].read_text().splitlines() if self._logs[log].exists() else []

    def _decode(self) -> str:
        torch.set_num_threads(1)
        os.environ["RIVER_COMPILE_HOME"] = str(self.folder / "kernels")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(self.folder / "inductor")
        codecache._HEADER_DIR = str(self.folder / "headers")
        codecache._HEADER_LOCK_DIR = str(self.folder / "headers" / "locks")
        inductor.compile_threads = 1  # (threads of a process that was forked)
        inductor.cpp.cxx = (None, str(self.folder / "bin" / "g++"))
        write = file.write
        file.write = lambda *arguments: self._note("packed") or write(*arguments)
        model = make("llama", layers=2)
        model.compile(backend=river, options={**OPTIONS, "twins": self.folder / "twins", "kernels": self._kernels})
        logits = torch.stack(decode(model, new_cache(model, "static"), [1, 1])[1:])
        return hashlib.sha256(logits.numpy().tobytes()).hexdigest()

    def _note(self, log: str) -> None:
        with self._logs[log].open("a") as file:
            file.write(f"{os.getpid()}\n")


def undisturbed(shared: Round, processes: int) -> tuple[str, float]:
    """Let processes start together; return the hash of their logits and the seconds that they took."""
    began = time.monotonic()
    running = {f"process {i + 1}": shared.start(f"process {i + 1}") for i in range(processes)}
    results = {shared.result(name, process) for name, process in running.items()}
    if len(results) > 1:
        raise Unclean("the processes have different logits")
    if shared.packed() != 1:
        raise Unclean(f"the twins were packed {shared.packed()} times")
    twice = [name for name, times in shared.compiled().items() if times > 1]
    if twice:
        raise Unclean(f"compiled more than once: {', '.join(twice)}")
    return results.pop(), time.monotonic() - began


def disturbed(shared: Round, processes: int, expected: str, wait_s: float, victim: int, alone: bool) -> str:
    """Let processes start together and kill one of them; return its output until then."""
    names = [f"process {i + 1}" for i in range(processes)]
    running = {name: shared.start(name) for name in names}
    time.sleep(wait_s)  # the random moment
    kill: Callable[[int, int], None] = os.kill if alone else os.killpg
    kill(running[names[victim]], signal.SIGKILL)
    _, status = os.waitpid(running.pop(names[victim]), 0)
    found = {name: shared.result(name, process) for name, process in running.items()}
    packed = shared.packed()
    found["the next one"] = shared.result("the next one", shared.start("the next one"))
    wrong = [name for name, result in found.items() if result != expected]
    if wrong:
        raise Unclean(f"{', '.join(wrong)}: other logits")
    if shared.packed() != packed:
        raise Unclean("the next one packed the twins again")
    return "killed" if os.WIFSIGNALED(status) else "had ended"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.replicas", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20, help="in which a process is killed (%(default)s)")
    parser.add_argument("--processes", type=int, default=4, help="processes to start together (%(default)s)")
    parser.add_argument("--kernels", choices=("native", "inductor", "eager"), default="native")
    parser.add_argument("--seed", type=int, default=0, help="of victims and moments (%(default)s)")
    options = parser.parse_args(arguments)
    rng, unclean = random.Random(options.seed), 0
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        expected, seconds = undisturbed(_round(scratch, 0, options.kernels), options.processes)
        print(
            f"undisturbed: {options.processes} processes, {seconds:.1f} s, packed once, nothing compiled twice",
            flush=True,
        )
        for number in range(1, options.rounds + 1):
            wait_s, victim, alone = rng.uniform(0, seconds), rng.randrange(options.processes), rng.random() < 0.5
            shared = _round(scratch, number, options.kernels)
            how = f"round {number}: process {victim + 1}{' alone' if alone else ''} after {wait_s:.2f} s"
            try:
                print(
                    f"{how}: {disturbed(shared, options.processes, expected, wait_s, victim, alone)}, clean", flush=True
                )
            except Unclean as failure:
                unclean += 1
                print(f"{how}: UNCLEAN: {failure}", flush=True)
            shutil.rmtree(shared.folder, ignore_errors=True)
    print(f"{options.rounds - unclean} of {options.rounds} rounds clean")
    return int(unclean > 0)


def _round(scratch: str, number: int, kernels: str) -> Round:
    folder = Path(scratch, f"round{number}")
    folder.mkdir()
    return Round(folder, kernels)


if __name__ == "__main__":
    sys.exit(main())
