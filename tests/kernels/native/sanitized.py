"""Libraries of C++ kernels and test programs compiled with GCC's sanitizers.

As pytest's plugin (`-p tests.kernels.native.sanitized`), in a process that starts with `preloaded()`, it makes all
tests use libraries with AddressSanitizer. Not handled: Clang, whose runtime is found otherwise, and leaks.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from river_compile.kernels.native import build

# Calls in place of the checks themselves: without them the matmuls take an hour to compile. Kernels read elements of
# any alignment by design. Stacks for uses after a return hold vectors at 32 bytes, of which GCC 12 reads 64 aligned.
ADDRESS = (
    *("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize=null,alignment,object-size"),
    *("-fno-sanitize-recover=undefined", "--param", "asan-instrumentation-with-call-threshold=0"),
    *("--param", "asan-use-after-return=0"),
)
THREAD = ("-g1", "-fsanitize=thread")
_OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
_PROBE = "#include <thread>\nint main() { std::thread([] {}).join(); }\n"


def use_address_sanitizer() -> None:
    """Makes this process compile and load libraries with AddressSanitizer."""
    build._FLAGS = (*build._FLAGS, *ADDRESS)


def pytest_configure() -> None:
    use_address_sanitizer()


def library(isa: build.Isa) -> Path:
    """Returns an instruction set's kernels with AddressSanitizer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_FLAGS", (*build._FLAGS, *ADDRESS))
        return build.kernels_library(isa)


def starter(flags: Sequence[str]) -> list[str]:
    """Returns the command that starts programs of a sanitizer, mostly none; skips where it cannot run here."""
    started, said = _probe(tuple(flags))
    if started is None:
        name = next(flag for flag in flags if flag.startswith("-fsanitize="))
        pytest.skip(f"{build.find_compiler().command} {name} does not work here: {said}")
    return started


@functools.cache
def _probe(flags: tuple[str, ...]) -> tuple[list[str] | None, str]:
    command = build.find_compiler().command
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "probe.cpp"), Path(folder, "probe")
        source.write_text(_PROBE)
        compiling = [command, "-std=c++20", "-pthread", *flags, str(source), "-o", str(program)]
        done = subprocess.run(compiling, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            return None, _last_line(done.stdout)
        # ThreadSanitizer of older compilers has no place for the addresses that newer kernels draw.
        for start in ([], ["setarch", "-R"] if shutil.which("setarch") else []):
            done = subprocess.run([*start, program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode == 0:
                return start, ""
        return None, _last_line(done.stdout)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it says nothing"])[-1]


def preloaded() -> dict[str, str]:
    """Returns the environment of a Python that loads such libraries; skips where the compiler has no runtime for it."""
    starter(ADDRESS)
    command = build.find_compiler().command
    libraries = []
    for name in ("libasan.so", "libstdc++.so.6"):  # (the second for what the first one asks of exceptions)
        found = subprocess.run([command, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        if not Path(found).is_absolute():
            pytest.skip(f"{command} has no {name}")
        libraries.append(found)
    return {**os.environ, **_OPTIONS, "LD_PRELOAD": " ".join(libraries)}
