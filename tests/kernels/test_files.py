"""Locks of files between processes: turns, and killed holders."""

import os
import select
import signal

import pytest

from river_compile.kernels.files import atomic_write, locked


@pytest.fixture
def target(tmp_path):
    return tmp_path / "cache" / "made"


def hold(target, scratch_too):
    """Forks a process that takes the lock, perhaps begins to write, and waits; returns its id."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with locked(target), atomic_write(target) as scratch:
                if scratch_too:
                    scratch.write_text("half")
                os.write(writes, b"!")
                signal.pause()
        finally:
            os._exit(1)
    os.read(reads, 1)
    os.close(reads)
    os.close(writes)
    return child


@pytest.mark.parametrize("scratch_too", [False, True])
def test_a_killed_process_gives_its_turn_away_and_its_rubbish_is_removed(target, scratch_too):
    others = target.parent / ".made.too.abcdefgh"
    others.mkdir(parents=True)
    child = hold(target, scratch_too)
    assert len([path for path in target.parent.iterdir() if path.is_dir()]) == 2
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not target.exists()
    with locked(target), atomic_write(target) as scratch:
        scratch.write_text("whole")
    assert target.read_text() == "whole"
    assert sorted(file.name for file in target.parent.iterdir()) == [".made.lock", others.name, "made"]


def test_others_wait_for_their_turn(target):
    child = hold(target, scratch_too=False)
    reads, writes = os.pipe()
    second = os.fork()
    if second == 0:
        with locked(target):
            os.write(writes, b"!")
            os._exit(0)
    assert not select.select([reads], [], [], 0.2)[0], "it had its turn while the lock was held"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert os.read(reads, 1) == b"!"
    os.waitpid(second, 0)
    os.close(reads)
    os.close(writes)
