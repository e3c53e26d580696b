"""The C++ code under GCC's sanitizers, and the thread pool without one.

The slow ones are `make test-sanitizers`. A sanitizer that does not work here is a skip with the compiler's words.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from river_compile.kernels.native import build
from tests.kernels.native import program, sanitized
from tests.support.examples import slow
from tests.support.layout import ROOT

# What calls each operator, on both sides of each size that decides how it runs.
OPERATORS = [
    f"tests/kernels/native/test_{name}.py"
    for name in (
        *("bf12", "bits8", "cache", "empty", "entropy", "inputs", "linear", "packing", "positions"),
        *("rescore", "tape", "vocab_blocks"),
    )
]
FUZZ = (
    "from tests.kernels.native.sanitized import use_address_sanitizer; use_address_sanitizer(); "
    "from tests.support.edited import main; main(60)"
)


@pytest.mark.parametrize("seconds", [1, slow(20)])
@pytest.mark.parametrize("sanitizer", [(), sanitized.THREAD], ids=["plain", "thread"])
def test_the_pool_runs_each_part_once_and_phases_one_after_another(sanitizer, seconds):
    """By ThreadSanitizer too; a phase of too many parts is an error and no hang."""
    start = sanitized.starter(sanitizer) if sanitizer else []
    done = program.run_pool(seconds, seed=1, flags=sanitizer, start=start)
    assert done.status == 0, done.said
    assert ", 0 wrong, too many parts refused" in done.said


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_each_phase_under_the_address_sanitizer():
    """And undefined behavior, with the kernels of this machine's best instruction set."""
    sanitized.starter(sanitized.ADDRESS)
    program.run(sanitized.library(build.supported_isas()[0]), flags=sanitized.ADDRESS).check()


def run_sanitized(*command: str) -> None:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=sanitized.preloaded(), stderr=subprocess.STDOUT,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-20_000:]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_operators_in_python_under_the_address_sanitizer():
    # (-s: the sanitizer's report would go to a file that ends with the process.)
    run_sanitized("-m", "pytest", "-x", "-s", "--timeout=0", "-p", "tests.kernels.native.sanitized", *OPERATORS)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_edited_files_under_the_address_sanitizer():
    """A minute of programs, and of twins whose kernels run."""
    run_sanitized("-c", FUZZ)
