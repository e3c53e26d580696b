"""Runs mypy over the three packages as they are installed: `passes/` and `kernels/` below `river_compile/`.

    python -m tools.typecheck [arguments of mypy]

The checkout keeps these folders at its top, where mypy would not find them under their installed names. So a temporary
folder of symbolic links stands in for an installation. Settings lie in pyproject.toml.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Returns mypy's exit status; paths in its messages are those of the checkout."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder, "river_compile")
        package.mkdir()
        for entry in (ROOT / "river_compile").iterdir():
            (package / entry.name).symlink_to(entry)
        for name in ("passes", "kernels"):
            (package / name).symlink_to(ROOT / name)
        command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "-p", "river_compile"]
        command += ["--cache-dir", str(ROOT / ".mypy_cache"), *sys.argv[1:]]
        environment = {**os.environ, "MYPYPATH": folder}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    print(done.stdout.replace("river_compile/passes/", "passes/").replace("river_compile/kernels/", "kernels/"), end="")
    print(done.stderr, end="", file=sys.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
