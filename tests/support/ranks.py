"""Starts the ranks of one program on this machine, as ``torchrun`` does, and ends them all where one fails.

:class:`Wire` counts what a rank hands to collectives. Not handled: several machines, and ranks that are to start again.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[2]


def run_ranks(
    arguments: Sequence[str], ranks: int = 2, timeout: float = 600, environment: Mapping[str, str] | None = None
) -> tuple[list[int], str]:
    """Run ``python ARGUMENTS`` once for each rank, with the variables that torch.distributed reads, and one thread.

    Args:
        arguments: such as ``["-m", "module", "argument"]``.
        ranks: processes.
        timeout: seconds after which those that still run are killed; half a minute after the first one failed, too.
        environment: variables besides the caller's.

    Returns:
        Their exit statuses (negative: the signal), and what they printed, one after another.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    shared |= {"OMP_NUM_THREADS": "1", **(environment or {})}
    shared["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory(prefix="river_ranks_") as folder:
        files = [Path(folder) / str(rank) for rank in range(ranks)]
        processes = []
        for rank, file in enumerate(files):
            with file.open("w") as out:
                mine = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                command = [sys.executable, *arguments]
                processes.append(subprocess.Popen(command, env=mine, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT))
        end = time.monotonic() + timeout
        try:
            while any(process.poll() is None for process in processes) and time.monotonic() < end:
                if any(process.poll() for process in processes):
                    end = min(end, time.monotonic() + 30)
                time.sleep(0.05)  # (nothing waits for whichever process ends first)
        finally:
            for process in processes:
                process.kill()
        return [process.wait() for process in processes], "\n".join(file.read_text() for file in files)


class Wire(TorchDispatchMode):
    """Counts the collectives that a rank calls inside.

    Attributes:
        messages: by name ("all_reduce") and the bytes of what the rank hands over.
    """

    def __init__(self) -> None:
        super().__init__()
        self.messages: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        name = func._schema.name.rpartition("::")[2].rstrip("_")
        if func.namespace in ("c10d", "_c10d_functional") and name != "wait_tensor":
            given = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
            self.messages[name, given.nbytes] += 1
        return func(*args, **(kwargs or {}))
