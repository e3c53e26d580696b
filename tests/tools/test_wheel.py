"""An installed wheel, alone in a folder: found by torch, imported at no cost, under one name, without a compiler."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from river_compile.kernels.native.build import ISAS
from tests.support.layout import build_wheel, run_python

WITH_KERNELS = sys.platform == "linux" and platform.machine() == "x86_64"
GENERATES = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import river_compile
from river_compile.kernels.native import build

def no(*_):
    raise AssertionError("something was compiled")

build._run = no
torch.manual_seed(0)
config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, vocab_size=128)
model = LlamaForCausalLM(config).eval()
ids = torch.arange(1, 8)[None]
plain = model.generate(ids, do_sample=False, max_new_tokens=12)
text = river_compile.accelerate(model).generate(ids, do_sample=False, max_new_tokens=12)
kinds = {graph["kind"] for graph in river_compile.report(model).to_dict()["graphs"]}
print(torch.equal(plain, text), sorted(kinds))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Installs the wheel alone into its own folder and returns that folder."""
    target = tmp_path_factory.mktemp("installed")
    wheel = build_wheel(tmp_path_factory.mktemp("wheel"), kernels=WITH_KERNELS)
    assert wheel.name.endswith("-py3-none-linux_x86_64.whl" if WITH_KERNELS else "-py3-none-any.whl")
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


@pytest.mark.skipif(not WITH_KERNELS, reason="wheels carry compiled kernels for Linux on x86-64")
def test_it_has_the_kernels_of_each_instruction_set_and_a_machine_without_a_compiler_uses_them(installed, tmp_path):
    built = {file.name for file in (installed / "river_compile" / "kernels" / "native" / "built").iterdir()}
    names = {f"{kind}_{isa.name}.so" for kind in ("kernels", "packing") for isa in ISAS}
    assert built == {*names, "operators.so", "sources.sha256"}
    done = run_python(GENERATES, tmp_path, installed, CXX="false", RIVER_COMPILE_HOME=str(tmp_path / "cache"))
    assert done.stdout.split(maxsplit=1) == ["True", "['decode', 'prefill']\n"], done.stdout + done.stderr
    assert not [*(tmp_path / "cache").rglob("*.so")]
