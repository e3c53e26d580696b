"""The file of a backbone's 12-bit weights in the compile cache, written for later processes.

Not handled: reading it, which is that of any weights (:mod:`river_compile.twins.pack`), and when it is written.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from river_compile.compile_cache.folder import Entry, warn_not_writable
from river_compile.config import RiverConfig
from river_compile.passes.program import Matmul
from river_compile.twins.digests import Digests
from river_compile.twins.file import entry_for, is_stored, write_stored
from river_compile.twins.making import Job, Statistics, spilled
from river_compile.twins.weights import LOSSLESS, Parameters


def has_backbone_file(matmuls: Sequence[Matmul], inputs: Sequence[Any], digests: Digests) -> bool:
    """Whether the compile cache has the lossless weights of these matmuls."""
    return is_stored(_entry_and_job(matmuls, inputs, digests)[0])


def write_backbone_file(matmuls: Sequence[Matmul], inputs: Sequence[Any], digests: Digests) -> None:
    """Pack lossless weights for the compile cache, unless it has them or the parameters change meanwhile."""
    entry, job = _entry_and_job(matmuls, inputs, digests)
    if is_stored(entry):
        return
    try:
        entry.make_folder()
        # One after another is moved to a file: all of them are three quarters of the model.
        with tempfile.TemporaryDirectory(dir=entry.folder, prefix=".spilled.") as folder:
            keep = functools.partial(spilled, Path(folder))
            write_stored(entry, [*job.make_unless_changed(matmuls, lossless=True, keep=keep).values()])
    except OSError as error:
        warn_not_writable(error)


def _entry_and_job(matmuls: Sequence[Matmul], inputs: Sequence[Any], digests: Digests) -> tuple[Entry, Job]:
    """Return the entry of lossless weights, and the job that makes them."""
    parameters = {matmul: Parameters.from_inputs(matmul, inputs) for matmul in matmuls}
    job = Job(RiverConfig(), Statistics(), torch.device("cpu"), parameters, digests.of(parameters))
    return entry_for(matmuls, job.digests, LOSSLESS), job
