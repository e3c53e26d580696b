"""Where the package's sources lie, under which names they are installed, and how tests build and run them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tools.house.sources import FOLDERS, ROOT

SOURCES = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]


def build_wheel(folder: Path) -> Path:
    """Builds a wheel from a copy of the sources, so that the checkout stays clean and no stale build leaks in."""
    copy, out = folder / "sources", folder / "out"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


def run_python(code: str, cwd: Path, path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter that finds `path` before everything installed."""
    environment = {**os.environ, "PYTHONPATH": str(path), **environment}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done
