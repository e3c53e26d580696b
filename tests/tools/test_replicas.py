"""Processes that start together and share a folder of saved twins: packed once, and a killed one stops no other.

`python -m tools.replicas --rounds 20` does the same with the C++ kernels' and Inductor's caches.
"""

import subprocess
import sys

import pytest

from tests.support.layout import ROOT


@pytest.mark.slow
def test_two_rounds_are_clean():
    """In a separate process, which forks the others before it has computed anything."""
    command = [sys.executable, "-m", "tools.replicas", "--rounds", "2", "--kernels", "eager", "--seed", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "packed once" in done.stdout
    assert "2 of 2 rounds clean" in done.stdout
