"""The shared libraries of the C++ kernels: those that the wheel brought, or compiled here.

A wheel for Linux on x86-64 has them in `built/`, one for each instruction set, beside the hash of the sources that
they are made from. They need no compiler and, being written against torch's stable ABI, no certain version of torch.
Other machines, checkouts, and installations whose sources were changed compile what they use.

Not handled: when a library is loaded, and what it computes (:mod:`river_compile.kernels.native.load` and `packing`).
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from river_compile.kernels.native.build import SOURCES, build, find_compiler, torch_flags
from river_compile.kernels.native.isa import ISAS, Isa

BUILT = Path(__file__).parent / "built"
_MADE_FROM = "sources.sha256"
_TORCH = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # the oldest release that a library is to run with: 2.11
_PACKING = ("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")


def kernels_for(isa: Isa) -> Path:
    """Returns the library of an instruction set's kernels; raises as :func:`build`."""
    return _library("kernels.cpp", f"kernels_{isa.name}", [*isa.flags, f"-DRIVER_ISA_{isa.name.upper()}"])


def packing_for(isa: Isa) -> Path:
    """Returns the library that packs matrices; raises as :func:`build`."""
    return _library("packing.cpp", f"packing_{isa.name}", [*isa.flags, *_PACKING])


def operators() -> Path:
    """Returns the library of the operators ``torch.ops.river_native.*``; raises as :func:`build`."""
    return _library("bindings.cpp", "operators", [*torch_flags(), _TORCH])


def all_ready_made() -> bool:
    """Whether the wheel brought the libraries of these sources, so that nothing has to be compiled."""
    return _ready_made("operators") is not None


def build_all(folder: Path) -> int:
    """Compiles every library into a folder, for a wheel, with the hash of their sources.

    Returns:
        Their bytes.

    Raises:
        CannotBuild: there is no compiler, or it refuses the sources.
    """
    with ThreadPoolExecutor(2) as pool:
        made = [pool.submit(operators)]
        made += [pool.submit(function, isa) for isa in ISAS for function in (kernels_for, packing_for)]
        libraries = [future.result() for future in made]
    folder.mkdir(parents=True, exist_ok=True)
    for library in libraries:
        name, _, _ = library.stem.rpartition("_")
        shutil.copy(library, folder / f"{name}.so")
    (folder / _MADE_FROM).write_text(_hash_of_sources())
    return sum(library.stat().st_size for library in libraries)


def _library(source: str, name: str, flags: Sequence[str]) -> Path:
    return _ready_made(name) or build(find_compiler(), source, name, flags)


def _ready_made(name: str) -> Path | None:
    library, made_from = BUILT / f"{name}.so", BUILT / _MADE_FROM
    if not library.exists() or not made_from.exists() or made_from.read_text() != _hash_of_sources():
        return None
    return library


def _hash_of_sources() -> str:
    digest = hashlib.sha256()
    for file in sorted(SOURCES.iterdir()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
