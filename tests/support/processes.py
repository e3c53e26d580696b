"""Processes that a test does not start itself, but that must end."""

import os
import time
from pathlib import Path


def ends(pid: int) -> bool:
    """Waits until a process has ended, which its parent need not have noticed; False if it lives on for 10 s."""
    for _ in range(100):
        if not _lives(pid):
            return True
        time.sleep(0.1)
    return False


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
