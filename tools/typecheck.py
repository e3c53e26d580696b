"""Runs mypy over the packages as they are installed, and over the Python of the README and the documentation.

The checkout keeps `passes/` and `kernels/` at its top, so a temporary folder of symbolic links stands in for an
installation. Arguments go to mypy, whose settings lie in pyproject.toml.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(r"^```python\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
# What the documents' examples take as given.
_GIVEN = """from typing import Any
import river_compile
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.distributed import DistributedConfig
model: PreTrainedModel
tokenizer: Any
inputs: dict[str, Any]
texts: list[str]
folder: str
"""


def examples() -> Iterator[tuple[str, str]]:
    """Yield a module name and the Python of each example in the README and the documentation."""
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for number, block in enumerate(_BLOCK.findall(document.read_text(encoding="utf-8")), start=1):
            yield f"{document.stem.lower().replace('-', '_')}_example_{number}", block


def main(arguments: list[str] | None = None) -> int:
    """Return mypy's exit status; paths in its messages are those of the checkout."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder, "river_compile")
        package.mkdir()
        for entry in (ROOT / "river_compile").iterdir():
            (package / entry.name).symlink_to(entry)
        for name in ("passes", "kernels"):
            (package / name).symlink_to(ROOT / name)
        (Path(folder) / "tools").symlink_to(ROOT / "tools")
        modules = ["-p", "river_compile"]
        for name, block in examples():
            Path(folder, f"{name}.py").write_text(_GIVEN + block, encoding="utf-8")
            modules += ["-m", name]
        command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), *modules]
        command += ["--cache-dir", str(ROOT / ".mypy_cache"), *(sys.argv[1:] if arguments is None else arguments)]
        environment = {**os.environ, "MYPYPATH": folder}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    print(done.stdout.replace("river_compile/passes/", "passes/").replace("river_compile/kernels/", "kernels/"), end="")
    print(done.stderr, end="", file=sys.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
