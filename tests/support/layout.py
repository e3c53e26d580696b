"""Where the package's sources lie, under which names they are installed, and how tests build and run them."""

import ast
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.sources import FOLDERS, ROOT

OURS = ("river_compile", "benchmarks", "examples", "tools", "tests")
COPIED = (  # files that a build needs besides the folders
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "docs/troubleshooting.md",
    "docs/river.schema.json",
    "tools/build_backend.py",
    "tools/index_page.py",
)
SOURCES = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]


def build_wheel(folder: Path, kernels: bool = False) -> Path:
    """Builds a wheel from a copy of the sources, so that the checkout stays clean and no stale build leaks in.

    With `kernels` it has the compiled kernels, which takes a minute or two where the cache has none of them.
    """
    copy, out = folder / "sources", folder / "out"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in COPIED:
        (copy / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy)]
    environment = {**os.environ, "RIVER_COMPILE_KERNELS_IN_WHEEL": str(int(kernels))}
    built = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


def run_python(code: str, cwd: Path, path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter that finds `path` before everything installed."""
    environment = {**os.environ, "PYTHONPATH": str(path), **environment}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@functools.cache
def names_in(module: str) -> set[str]:
    """Returns the names that a module of the project binds anywhere, and those of its submodules."""
    parts = module.split(".")
    if parts[1:2] in (["passes"], ["kernels"]) and parts[0] == "river_compile":
        parts = parts[1:]
    folder = ROOT.joinpath(*parts)
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    names = {entry.stem for entry in folder.iterdir()} if folder.is_dir() else set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if file.exists() else ():
        match node:
            case ast.FunctionDef() | ast.ClassDef() | ast.AsyncFunctionDef():
                names.add(node.name)
            case ast.Name(ctx=ast.Store()):
                names.add(node.id)
            case ast.alias():
                names.add((node.asname or node.name).split(".")[0])
            case ast.Constant(value=str() as text) if module == "river_compile":  # exported lazily
                names.add(text)
    return names | ({"passes", "kernels"} if module == "river_compile" else set())
