"""The shared libraries of the C++ kernels: prebuilt in the wheel, or compiled here into the cache folder.

Not handled: compilers other than GCC and Clang, Windows, integer tiles of AMX, SVE and SME. Loading is in
`native.load`.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir

from river_compile.kernels.checks import one_of
from river_compile.kernels.files import atomic_write, cached_file, locked
from river_compile.kernels.messages import with_id
from river_compile.kernels.native.machine import ARM, X86, architecture, arm_features, target_architecture

log = logging.getLogger("river_compile.kernels.native.build")

SOURCES = Path(__file__).parent / "sources"  # of three libraries; includes are named by their path in it
# A wheel of one machine holds a library for each of its instruction sets here, next to the hash of their sources. They
# are written against torch's stable ABI. Checkouts and installations with changed sources compile their own.
BUILT = Path(__file__).parent / "built"
_HASH_FILE = "sources.sha256"
_FLAGS = ("-O3", "-std=c++20", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off", "-pthread", "-w", "-I.")
_KERNELS = ("kernels/kernels.cpp", "kernels/gemm.cpp")
_PACKING = ("packing/packing.cpp",)
_OPERATORS = ("operators/bindings.cpp",)
_STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # 2.11, the oldest release that a library runs with
_PACKING_FLAGS = ("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
_MIN_FREE_BYTES = 16 << 20  # a library takes a few MiB
_DIGEST = hashlib.sha256().digest_size
_MACOS = sys.platform == "darwin"
_INSTALL = (
    "Install Apple's compiler and OpenMP (xcode-select --install; brew install libomp), or set CXX to a compiler that "
    "works"
    if _MACOS
    else "Install g++ (Debian and Ubuntu: apt-get install g++), or set CXX to a compiler that works"
)
# Inductor's code includes and links with these.
_PROBE = """
#if !__has_include(<Python.h>)
#error Python.h is not there: install the headers of Python (Debian and Ubuntu: apt-get install python3-dev)
#endif
#include <omp.h>
int threads() { return omp_get_max_threads(); }
"""

_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma")
_AVX512_NEEDS = ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "fma3")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX2_NEEDS = ("avx2", "fma3", "f16c")


class CannotBuild(Exception):
    """There is no compiler, it rejects the sources, or no folder is writable; the message says which."""


@dataclass(frozen=True)
class Isa:
    """An instruction set."""

    name: str
    flags: tuple[str, ...]  # of the compiler
    needs: tuple[str, ...]  # the processor's capabilities, as torch names those of x86 and `arm_features` those of ARM


PORTABLE = Isa("portable", (), ())

# By architecture, best first. "amx" multiplies bfloat16 weights by tiles; the rest of it is "avx512_bf16", which has
# dot products of pairs and else is "avx512_vnni".
_X86_ISAS = (
    Isa(
        "amx",
        (*_AVX512, "-mavx512vnni", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
        (*_AVX512_NEEDS, "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16"),
    ),
    Isa(
        "avx512_bf16",
        (*_AVX512, "-mavx512vnni", "-mavx512bf16"),
        (*_AVX512_NEEDS, "avx512_vnni", "avx512_bf16"),
    ),
    Isa("avx512_vnni", (*_AVX512, "-mavx512vnni"), (*_AVX512_NEEDS, "avx512_vnni")),
    Isa("avx512", _AVX512, _AVX512_NEEDS),
    Isa("avx_vnni", (*_AVX2, "-mavxvnni"), (*_AVX2_NEEDS, "avx_vnni")),
    Isa("avx2", _AVX2, _AVX2_NEEDS),
)
_ARM_ISAS = (
    Isa("neon_i8mm", ("-march=armv8.2-a+dotprod+i8mm+bf16",), ("neon", "dotprod", "i8mm", "bf16")),
    Isa("neon_dotprod", ("-march=armv8.2-a+dotprod",), ("neon", "dotprod")),
    Isa("neon", ("-march=armv8-a",), ("neon",)),
)


def isas_of(machine: str) -> tuple[Isa, ...]:
    """Return the instruction sets of an architecture, best first; "portable" is the last one of each."""
    return (*{X86: _X86_ISAS, ARM: _ARM_ISAS}.get(machine, ()), PORTABLE)


def choose_isa() -> Isa:
    """Return ``RIVER_COMPILE_ISA``, else the best instruction set; raise ValueError if it does not run here."""
    by_name = {isa.name: isa for isa in supported_isas()}
    name = os.environ.get("RIVER_COMPILE_ISA")
    return by_name[one_of(*by_name)("RIVER_COMPILE_ISA", name)] if name else supported_isas()[0]


@functools.cache
def supported_isas() -> tuple[Isa, ...]:
    """Return the instruction sets of this machine, best first."""
    found = _capabilities()
    if "amx_tile" in found and not (hasattr(torch.cpu, "_init_amx") and torch.cpu._init_amx()):
        found.discard("amx_tile")  # the system must permit tiles for each process
    return tuple(isa for isa in isas_of(architecture()) if found.issuperset(isa.needs))


def _capabilities() -> set[str]:
    if architecture() != X86:
        return arm_features() if architecture() == ARM else set()
    if hasattr(torch.cpu, "get_capabilities"):
        return {name for name, has in torch.cpu.get_capabilities().items() if has is True}
    least = {"AVX512": (*_AVX512_NEEDS, "avx2"), "AVX2": _AVX2_NEEDS}  # older versions of torch report no more
    return set(least.get(torch.backends.cpu.get_cpu_capability(), ()))


def kernels_library(isa: Isa, compiler: Compiler | None = None) -> Path:
    """Return the library of an instruction set's kernels, by another compiler if one is given; raise as `build`."""
    name, flags = f"kernels_{isa.name}", [*isa.flags, f"-DRIVER_ISA_{isa.name.upper()}"]
    return build(compiler, _KERNELS, name, flags) if compiler else _library(_KERNELS, name, flags)


def packing_library(isa: Isa) -> Path:
    """Return the library that packs weights; raise as :func:`build`."""
    return _library(_PACKING, f"packing_{isa.name}", [*isa.flags, *_PACKING_FLAGS])


def operators_library() -> Path:
    """Return the library of the operators ``torch.ops.river_native.*``; raise as :func:`build`."""
    return _library(_OPERATORS, "operators", [*torch_flags(), _STABLE_ABI])


def has_prebuilt() -> bool:
    """Whether the wheel has the libraries of these sources, so that nothing has to be compiled."""
    return _prebuilt("operators") is not None


def build_all(folder: Path) -> int:
    """Compile the libraries of a wheel's machine into its folder and return their bytes; raise as :func:`build`."""
    isas = isas_of(target_architecture())
    with ThreadPoolExecutor(2) as pool:
        made = [pool.submit(operators_library)]
        made += [pool.submit(function, isa) for isa in isas for function in (kernels_library, packing_library)]
        libraries = [future.result() for future in made]
    folder.mkdir(parents=True, exist_ok=True)
    for library in libraries:
        name, _, _ = library.stem.rpartition("_")
        (folder / f"{name}.so").write_bytes(library.read_bytes()[:-_DIGEST])  # tools of wheels reject what follows
    (folder / _HASH_FILE).write_text(hash_of_sources())
    return sum(library.stat().st_size for library in libraries)


def _library(sources: Sequence[str], name: str, flags: Sequence[str]) -> Path:
    return _prebuilt(name) or build(find_compiler(), sources, name, flags)


def _prebuilt(name: str) -> Path | None:
    library, hash_file = BUILT / f"{name}.so", BUILT / _HASH_FILE
    if not library.exists() or not hash_file.exists() or hash_file.read_text() != hash_of_sources():
        return None
    return library


def hash_of_sources() -> str:
    digest = hashlib.sha256()
    for file in sorted(SOURCES.rglob("*")):
        if file.is_file():
            digest.update(file.relative_to(SOURCES).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Compiler:
    """A compiler's command and its full version text."""

    command: str
    version: str


def find_compiler() -> Compiler:
    """Return the compiler that Inductor uses with the calling thread's settings; raise CannotBuild if none works."""
    from torch._inductor import config
    from torch._inductor.cpp_builder import get_cpp_compiler

    if os.name == "nt":
        raise CannotBuild("The C++ kernels need GCC or Clang. Compilers on Windows are not supported. Use WSL")
    given = config.cpp.cxx
    names = [*filter(None, given if isinstance(given, (tuple, list)) else [given])]
    # Inductor's search finds the first name that works too, unless it may install one, but imports code generators.
    if names and shutil.which(names[0]) and not os.environ.get("TORCH_INDUCTOR_INSTALL_GXX"):
        first = compiler_of(names[0])
        if first.version:
            return first
    try:
        command = get_cpp_compiler()
    except Exception as error:  # Inductor has no public class for it
        raise CannotBuild(f"No C++ compiler works here (tried {', '.join(names)}). {_INSTALL}") from error
    return compiler_of(command)


def compiler_of(command: str) -> Compiler:
    """Return the compiler of a command."""
    from torch._inductor.cpp_builder import get_compiler_version_info

    return Compiler(command, get_compiler_version_info(command))


def working_compiler() -> Compiler:
    """Return the same compiler after a test build in Inductor's cache; raise CannotBuild if that fails."""
    compiler = find_compiler()
    _try_out(compiler)
    return compiler


@functools.cache
def _try_out(compiler: Compiler) -> None:
    include = sysconfig.get_path("include")
    flags = ("-std=c++17", "-fPIC", "-shared", *_openmp_flags(compiler.command), f"-I{include}")
    try:
        with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
            source, library = Path(folder, "probe.cpp"), Path(folder, "probe.so")
            source.write_text(_PROBE)
            _run([compiler.command, *flags, str(source), "-o", str(library)])
    except CannotBuild as error:
        lines = str(error).splitlines()
        why = next((line for line in lines if "error" in line), lines[-1])
        raise CannotBuild(f"{compiler.command} cannot compile C++ here ({why}). {_INSTALL}") from error
    except OSError as error:
        raise CannotBuild(
            f"Cannot write Inductor's cache ({error}). Set TORCHINDUCTOR_CACHE_DIR to a writable folder"
        ) from error


def _openmp_flags(command: str) -> list[str]:
    """Return Inductor's flags for OpenMP, which Apple's compiler lacks and Homebrew or conda add."""
    if not _MACOS:
        return ["-fopenmp"]
    from torch._inductor.cpp_builder import _get_openmp_args

    flags, link_flags, includes, folders, libraries, others = _get_openmp_args(command)
    return [
        *(f"-{flag}" for flag in (*flags, *link_flags)),
        *(f"-I{folder}" for folder in includes),
        *(f"-L{folder}" for folder in folders),
        *(f"-l{library}" for library in libraries),
        *others,
    ]


def build(compiler: Compiler, sources: Sequence[str], name: str, flags: Sequence[str]) -> Path:
    """Return the cached library `name` of files in `SOURCES`; raise CannotBuild."""
    command = [compiler.command, *_FLAGS]
    make = functools.partial(_make, command, sources, flags)
    inputs = [*command, *sources, *flags, compiler.version, torch.__version__, sys.platform, target_architecture()]
    digest = hashlib.sha256("\0".join([*inputs, hash_of_sources()]).encode()).hexdigest()[:16]
    try:
        return cached_file(f"native/{name}_{digest}.so", _is_whole, make)
    except OSError as error:
        raise CannotBuild(f"No folder for compiled code is writable ({error}). Set TMPDIR to one that is") from error


def _make(command: Sequence[str], sources: Sequence[str], flags: Sequence[str], library: Path) -> None:
    with locked(library):
        if _is_whole(library):
            return
        if library.exists():
            warnings.warn(
                with_id("RC103", f"The compiled kernels {library} were damaged and are rebuilt"), stacklevel=4
            )
        if shutil.disk_usage(library.parent).free < _MIN_FREE_BYTES:  # else the compiler fails after a minute
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(library.parent))
        start = time.perf_counter()
        with atomic_write(library) as scratch:
            _compile(command, sources, flags, scratch)
            with scratch.open("ab") as file:  # a loader ignores bytes after the end
                file.write(hashlib.sha256(scratch.read_bytes()).digest())
        log.info("compiled %s in %.1f s", library.name, time.perf_counter() - start)


def _compile(command: Sequence[str], sources: Sequence[str], flags: Sequence[str], library: Path) -> None:
    """Compile a library; several sources at the same time."""
    if len(sources) == 1:
        return _run([*command, *sources, *flags, "-o", str(library)])
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".objects.") as folder:
        objects = [str(Path(folder, f"{Path(source).name}.o")) for source in sources]
        commands = [[*command, "-c", s, *flags, "-o", o] for s, o in zip(sources, objects, strict=True)]
        # A pool of concurrent.futures takes no work once the main thread has ended, and a build continues then.
        with ThreadPool(len(sources)) as pool:
            pool.map(_run, commands)
        return _run([*command, *objects, *flags, "-o", str(library)])


def torch_flags() -> list[str]:
    """Return the flags of a library that calls torch, which is loaded before it."""
    folder = Path(torch.__file__).parent
    links = ["-undefined", "dynamic_lookup"] if _MACOS else [f"-L{folder / 'lib'}", "-ltorch_cpu"]
    return [f"-I{folder / 'include'}", *links]


def _is_whole(library: Path) -> bool:
    try:
        content = library.read_bytes()
    except FileNotFoundError:  # another process may delete it at any time
        return False
    return hashlib.sha256(content[:-_DIGEST]).digest() == content[-_DIGEST:]


def _run(command: list[str]) -> None:
    """Run a compiler's command, whose last argument is the file to write."""
    try:
        done = subprocess.run(command, cwd=SOURCES, capture_output=True, text=True)
    except OSError as error:
        raise CannotBuild(f"The C++ compiler {command[0]} does not start: {error}") from error
    if done.returncode:
        log.info("%s failed", " ".join(command))
        last = "\n".join(done.stderr.strip().splitlines()[-20:])
        raise CannotBuild(f"{command[0]} failed:\n{last or f'exit status {done.returncode}'}")
    if not Path(command[-1]).exists():
        raise CannotBuild(f"{command[0]} wrote nothing")
