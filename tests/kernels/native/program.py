"""The test program of `phases/`, which checks a library of kernels without torch: compiled once, here or for ARM.

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

FOLDER = Path(__file__).parent / "phases"
_FLAGS = ("-O1", "-std=c++20", "-ffp-contract=off", "-pthread", "-rdynamic", f"-I{build.SOURCES}")
_PREFIX = "aarch64-linux-gnu-"
_ARM_TOOLS = (f"{_PREFIX}g++", f"{_PREFIX}objdump", "qemu-aarch64")
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


def instructions(library: Path) -> list[str]:
    """Returns the mnemonics of all instructions of a library for ARM, in order."""
    listing = subprocess.check_output([_ARM_TOOLS[1], "-d", "--no-show-raw-insn", str(library)], text=True)
    return re.findall(r"^ *[0-9a-f]+:\t(\S+)", listing, re.MULTILINE)


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


def run(library: Path, *arguments: str) -> Done:
    """Runs the program on a library of this machine's architecture."""
    return _run([str(_program(build.find_compiler())), str(library), *arguments])


def run_arm(library: Path, core: str, *arguments: str) -> Done:
    """Runs the program on a library for ARM, emulated on a core as QEMU names it."""
    emulator = ["qemu-aarch64", "-cpu", core, "-L", _ARM_LIBRARIES]
    return _run([*emulator, str(_program(arm_compiler())), str(library), *arguments])


def _run(command: Sequence[str]) -> Done:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return Done(done.stdout, done.returncode)


def _program(compiler: build.Compiler) -> Path:
    """Returns the program that a compiler makes, from the cache folder of compiled kernels."""
    sources = sorted([*FOLDER.iterdir(), build.SOURCES / "phases.h"])
    inputs = [compiler.command, compiler.version, *_FLAGS[:-1]]
    texts = [*map(str.encode, inputs), *(source.read_bytes() for source in sources)]
    digest = hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]
    return cached_file(f"native/phases_{digest}", Path.exists, functools.partial(_compile, compiler))


def _compile(compiler: build.Compiler, program: Path) -> None:
    sources = sorted(map(str, FOLDER.glob("*.cpp")))
    with locked(program):
        if program.exists():
            return
        with atomic_write(program) as scratch:
            command = [compiler.command, *_FLAGS, *sources, "-ldl", "-o", str(scratch)]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            assert done.returncode == 0, done.stdout
