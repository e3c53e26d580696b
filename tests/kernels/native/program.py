"""The test programs of `phases/` and `pool/`, which run kernels and the thread pool without torch.

Each is compiled once, here or for ARM, with a sanitizer or without.

Not handled: other architectures than this machine's and 64-bit ARM.
"""

from __future__ import annotations

import functools
import hashlib
import re
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from river_compile.kernels.files import atomic_write, cached_file, locked
from river_compile.kernels.native import build

PHASES, POOL = (Path(__file__).parent / name for name in ("phases", "pool"))
_FLAGS = ("-O1", "-std=c++20", "-ffp-contract=off", "-pthread", "-rdynamic")
_PREFIX = "aarch64-linux-gnu-"
_ARM_TOOLS = (f"{_PREFIX}g++", "qemu-aarch64")
_ARM_LIBRARIES = "/usr/aarch64-linux-gnu"
_SUMMARY = re.compile(r"^(\d+) of (\d+) kernels checked, (\d+) cases failed$", re.MULTILINE)


def require_arm_tools() -> None:
    """Skips a test where no compiler or no emulator of ARM is installed."""
    for tool in _ARM_TOOLS:
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed; make test-arm installs it")


@functools.cache
def arm_compiler() -> build.Compiler:
    return build.compiler_of(_ARM_TOOLS[0])


def arm_library(isa: build.Isa) -> Path:
    """Returns the kernels of an instruction set, compiled for ARM."""
    return build.kernels_library(isa, arm_compiler())


@dataclass(frozen=True)
class Done:
    """What a run of the program printed, and how it ended."""

    said: str
    status: int

    def check(self) -> None:
        """Asserts that every kernel of the library was checked and that no case failed."""
        summary = _SUMMARY.search(self.said)
        assert summary is not None, f"exit status {self.status}\n{self.said}"
        checked, kernels, failed = map(int, summary.groups())
        assert checked == kernels > 0 == failed, self.said
        assert self.status == 0

    @property
    def met_unknown_instruction(self) -> bool:
        return self.status == -signal.SIGILL


def run(library: Path, *arguments: str, flags: Sequence[str] = ()) -> Done:
    """Runs the phases of a library of this machine's architecture; `flags`: of a sanitizer."""
    return _run([str(_program(build.find_compiler(), PHASES, flags)), str(library), *arguments])


def run_pool(seconds: float, seed: int, flags: Sequence[str] = (), start: Sequence[str] = ()) -> Done:
    """Runs the thread pool for some seconds; `flags`: of a sanitizer, `start`: a command that starts the program."""
    return _run([*start, str(_program(build.find_compiler(), POOL, flags)), str(seconds), str(seed)])


def run_arm(library: Path, core: str, *arguments: str) -> Done:
    """Runs the program on a library for ARM, emulated on a core as QEMU names it."""
    emulator = ["qemu-aarch64", "-cpu", core, "-L", _ARM_LIBRARIES]
    return _run([*emulator, str(_program(arm_compiler(), PHASES)), str(library), *arguments])


def _run(command: Sequence[str]) -> Done:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=500)
    return Done(done.stdout, done.returncode)


def _program(compiler: build.Compiler, folder: Path, flags: Sequence[str] = ()) -> Path:
    """Returns the program that a compiler makes of a folder, from the cache folder of compiled kernels."""
    headers = (build.SOURCES / name for name in ("phases.h", "operators/thread_pool.h"))
    sources = sorted(file for file in (*folder.rglob("*"), *headers) if file.is_file())
    texts = [compiler.command.encode(), compiler.version.encode(), *map(str.encode, (*_FLAGS, *flags))]
    texts += [source.read_bytes() for source in sources]
    digest = hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]
    name = f"native/{folder.name}_{digest}"
    return cached_file(name, Path.exists, functools.partial(_compile, compiler, folder, flags))


def _compile(compiler: build.Compiler, folder: Path, flags: Sequence[str], program: Path) -> None:
    sources, includes = sorted(map(str, folder.glob("*.cpp"))), (f"-I{folder}", f"-I{build.SOURCES}")
    with locked(program):
        if program.exists():
            return
        with atomic_write(program) as scratch:
            command = [compiler.command, *_FLAGS, *flags, *includes, *sources, "-ldl", "-o", str(scratch)]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            assert done.returncode == 0, done.stdout
