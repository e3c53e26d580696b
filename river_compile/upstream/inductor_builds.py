"""What Inductor compiles from C++ appears whole in the cache that processes share, or not at all.

Inductor lets the compiler write libraries and precompiled headers where other processes look for them, under a lock
that ends with the process that holds it. Whoever comes after a killed process takes what is there for whole, and fails
at every start from then on. Here the compiler writes beside the place, and what it wrote is moved there.

Not handled: other compilers' command lines than those with ``-o`` (Windows), which are run as they are.
"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch._inductor import cpp_builder

from river_compile.kernels.files import appearing


def build_whole_files() -> None:
    """Makes it so in this process, from now on; calling it again changes nothing."""
    builder: Any = cpp_builder
    if not hasattr(builder.run_compile_cmd, "river_compile"):
        builder.run_compile_cmd = _moving_into_place(builder.run_compile_cmd)


def _moving_into_place(run: Callable[[str, str], Any]) -> Callable[[str, str], Any]:
    @functools.wraps(run)
    def run_beside(cmd_line: str, cwd: str) -> Any:
        command = shlex.split(cmd_line)
        if "-o" not in command[:-1]:
            return run(cmd_line, cwd)
        place = command.index("-o") + 1
        with appearing(Path(cwd, command[place])) as scratch:
            command[place] = str(scratch)
            return run(shlex.join(command), cwd)

    marked: Any = run_beside
    marked.river_compile = True
    return run_beside
