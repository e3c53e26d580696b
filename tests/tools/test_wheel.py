"""An installed wheel, alone in a folder: found by torch, imported at no cost, and under one name."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.layout import build_wheel, run_python


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Installs the wheel alone into a folder of its own and returns that folder."""
    target = tmp_path_factory.mktemp("installed")
    wheel = build_wheel(tmp_path_factory.mktemp("wheel"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    done = subprocess.run([*command, str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def test_torch_finds_it_without_importing_it_and_its_parts_come_from_its_folder(installed, tmp_path):
    """After `pip install`, "river" is among Dynamo's backends; only looking it up imports the package."""
    code = """
import sys, torch._dynamo
assert "river" in torch._dynamo.list_backends()
assert "river_compile" not in sys.modules
river = torch._dynamo.lookup_backend("river")
import river_compile, river_compile.passes as passes, river_compile.kernels as kernels
print(river.__module__, river_compile.__file__, passes.__file__, kernels.__file__)
"""
    module, *files = run_python(code, tmp_path, installed).stdout.split()
    assert module == "river_compile.backend"
    assert all(Path(file).is_relative_to(installed / "river_compile") for file in files)


def test_it_brings_no_package_of_a_common_name(installed):
    """One name and a command."""
    added = {entry.name for entry in installed.iterdir() if not entry.name.endswith(".dist-info")}
    assert added <= {"river_compile", "bin", "Scripts"}


def test_importing_prints_nothing_and_loads_neither_torch_nor_triton(installed, tmp_path):
    code = "import sys, river_compile; assert not {'torch', 'triton', 'transformers'} & set(sys.modules)"
    done = run_python(code, tmp_path, installed)
    assert (done.stdout, done.stderr) == ("", "")
