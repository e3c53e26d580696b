"""From C++ sources to a shared library in the cache folder, with the compiler that Inductor finds.

A library's name holds the hash of everything that it is made from: sources, flags, compiler and version of torch. The
library ends with the hash of its own bytes, which loading it ignores; one that does not match is built again.
Of processes that need the same library at once one compiles it, and the others wait for it.

Not handled: compilers other than GCC and Clang, and Windows.
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
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir

from river_compile.kernels.files import appearing, in_cache, making

log = logging.getLogger("river_compile.kernels.native.build")

SOURCES = Path(__file__).parent / "sources"
_FLAGS = ("-O3", "-std=c++20", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off", "-pthread", "-w")
_ROOM = 16 << 20  # bytes, of which a library takes a few
_DIGEST = hashlib.sha256().digest_size
_INSTALL = "install g++ (Debian and Ubuntu: apt-get install g++), or set CXX to a compiler that works"
# What code of Inductor's includes and is linked with.
_PROBE = """
#if !__has_include(<Python.h>)
#error Python.h is not there: install the headers of Python (Debian and Ubuntu: apt-get install python3-dev)
#endif
#include <omp.h>
int threads() { return omp_get_max_threads(); }
"""


class CannotBuild(Exception):
    """There is no compiler, it refuses the sources, or nothing can be written; the message says which."""


@dataclass(frozen=True)
class Compiler:
    """A compiler's command, and all that it says of its version."""

    command: str
    version: str


def find_compiler() -> Compiler:
    """Returns the compiler that Inductor uses with the settings of the calling thread.

    Raises:
        CannotBuild: there is none.
    """
    from torch._inductor import config
    from torch._inductor.cpp_builder import get_compiler_version_info, get_cpp_compiler

    if os.name == "nt":
        raise CannotBuild("the C++ kernels are made for GCC and Clang, not for compilers on Windows")
    try:
        command = get_cpp_compiler()
    except Exception as error:  # Inductor has no public class for it
        tried = ", ".join(filter(None, config.cpp.cxx)) if isinstance(config.cpp.cxx, tuple) else config.cpp.cxx
        raise CannotBuild(f"there is no C++ compiler {tried} that works; {_INSTALL}") from error
    return Compiler(command, get_compiler_version_info(command))


def working_compiler() -> Compiler:
    """Returns the same compiler once it has compiled a few lines, with what Inductor's code needs, where that writes.

    Raises:
        CannotBuild: there is none, or it cannot.
    """
    compiler = find_compiler()
    _try_out(compiler)
    return compiler


@functools.cache
def _try_out(compiler: Compiler) -> None:
    flags = ("-std=c++17", "-fPIC", "-shared", "-fopenmp", f"-I{sysconfig.get_path('include')}")
    try:
        with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
            source, library = Path(folder, "probe.cpp"), Path(folder, "probe.so")
            source.write_text(_PROBE)
            _run([compiler.command, *flags, str(source), "-o", str(library)])
    except CannotBuild as error:
        lines = str(error).splitlines()
        why = next((line for line in lines if "error" in line), lines[-1])
        raise CannotBuild(f"{compiler.command} compiles no C++ here ({why}); {_INSTALL}") from error
    except OSError as error:
        raise CannotBuild(
            f"Inductor's cache cannot be written ({error}); set TORCHINDUCTOR_CACHE_DIR to a folder that can"
        ) from error


def build(compiler: Compiler, source: str, name: str, flags: Sequence[str]) -> Path:
    """Returns the library that `source` is compiled to, compiling it where the cache has none that is whole.

    Args:
        compiler: GCC or Clang.
        source: file name within `SOURCES`, whose headers lie beside it.
        name: how the library's own name begins.
        flags: beyond those that every library gets.

    Raises:
        CannotBuild: the compiler refuses the source, or nothing can be written.
    """
    command = [compiler.command, *_FLAGS, source, *flags]
    made_from = [*command, compiler.version, torch.__version__, sys.platform]
    texts = [file.read_bytes() for file in sorted(SOURCES.iterdir()) if file.is_file()]
    digest = hashlib.sha256(b"\0".join([*map(str.encode, made_from), *texts])).hexdigest()[:16]
    try:
        return in_cache(f"native/{name}_{digest}.so", _is_whole, functools.partial(_make, command))
    except OSError as error:
        raise CannotBuild(f"compiled code can be written nowhere ({error}); set TMPDIR to a folder that can") from error


def _make(command: list[str], library: Path) -> None:
    with making(library):
        if _is_whole(library):
            return
        if library.exists():
            warnings.warn(f"the compiled kernels {library} were damaged and are rebuilt", stacklevel=4)
        if shutil.disk_usage(library.parent).free < _ROOM:  # (or a compiler works for a minute and fails)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(library.parent))
        start = time.perf_counter()
        with appearing(library) as scratch:
            _run([*command, "-o", str(scratch)])
            with scratch.open("ab") as file:
                file.write(hashlib.sha256(scratch.read_bytes()).digest())
        log.info("compiled %s in %.1f s", library.name, time.perf_counter() - start)


def torch_flags() -> list[str]:
    """Returns flags for a source that includes torch's headers and calls its library."""
    folder = Path(torch.__file__).parent
    return [f"-I{folder / 'include'}", f"-L{folder / 'lib'}", "-ltorch_cpu"]


def _is_whole(library: Path) -> bool:
    try:
        content = library.read_bytes()
    except FileNotFoundError:  # (whoever cleans up may come between any two looks)
        return False
    return hashlib.sha256(content[:-_DIGEST]).digest() == content[-_DIGEST:]


def _run(command: list[str]) -> None:
    """Runs a compiler's command, which ends with the file to write."""
    try:
        done = subprocess.run(command, cwd=SOURCES, capture_output=True, text=True)
    except OSError as error:
        raise CannotBuild(f"the C++ compiler {command[0]} does not start: {error}") from error
    if done.returncode:
        log.info("%s failed", " ".join(command))
        last = "\n".join(done.stderr.strip().splitlines()[-20:])
        raise CannotBuild(f"{command[0]} failed:\n{last or f'exit status {done.returncode}'}")
    if not Path(command[-1]).exists():
        raise CannotBuild(f"{command[0]} wrote nothing")
