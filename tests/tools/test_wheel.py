"""An installed wheel, alone in a folder: found by torch, imported at no cost, under one name, without a compiler."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from river_compile.kernels.native import build as native
from river_compile.kernels.native.build import isas_of
from river_compile.kernels.native.machine import ARM, X86, target_architecture
from tests.support.layout import ROOT, build_wheel, run_python
from tools import build_backend
from tools.index_page import addresses, description

MACHINE = target_architecture()
TAGS = {("linux", X86): "linux_x86_64", ("linux", ARM): "linux_aarch64", ("darwin", ARM): "macosx_11_0_arm64"}
TAG = TAGS.get((sys.platform, MACHINE))
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
    wheel = build_wheel(tmp_path_factory.mktemp("wheel"), kernels=TAG is not None)
    assert wheel.name.endswith(f"-py3-none-{TAG or 'any'}.whl")
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


RELATIVE = r"\]\((?![a-z]+:|#)"


def test_the_page_of_an_index_has_no_link_that_leads_nowhere(installed):
    """Without the repository's address, links keep their text."""
    (folder,) = installed.glob("*.dist-info")
    page = (folder / "METADATA").read_text(encoding="utf-8").partition("\n\n")[2]
    assert page.startswith("# River Compile")
    assert not re.search(RELATIVE, page)
    assert "hardware" in page


def test_links_of_an_index_lead_to_the_tag_of_the_release():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    page = description(readme, "1.2.3", {"RIVER_REPOSITORY_URL": "https://example.org/river/"})
    assert not re.search(RELATIVE, page)
    assert page.count("](") == readme.count("](")
    for target in re.findall(r"https://example.org/river/(?:blob|raw)/v1.2.3/([^)#]+)", page):
        assert (ROOT / target).exists(), target
    assert re.search(r"!\[[^]]+\]\(https://example.org/river/raw/v1.2.3/docs/images/", page)
    assert description("`[a](b)` [a](b) ![c](d)\n```\n[a](b)\n```\n", "1", {}) == "`[a](b)` a \n```\n[a](b)\n```\n"


def test_addresses_are_those_of_who_builds():
    assert set(addresses({})) == {"Paper"}
    found = addresses({"RIVER_REPOSITORY_URL": "https://example.org/river", "RIVER_SITE_URL": "https://site.org/"})
    assert found["Repository"] == "https://example.org/river"
    assert found["Documentation"] == "https://site.org"


@pytest.mark.skipif(TAG is None, reason="this machine's wheels carry no compiled kernels")
def test_it_has_the_kernels_of_each_instruction_set_and_a_machine_without_a_compiler_uses_them(installed, tmp_path):
    built = {file.name for file in (installed / "river_compile" / "kernels" / "native" / "built").iterdir()}
    names = {f"{kind}_{isa.name}.so" for kind in ("kernels", "packing") for isa in isas_of(MACHINE)}
    assert built == {*names, "operators.so", "sources.sha256"}
    done = run_python(GENERATES, tmp_path, installed, CXX="false", RIVER_COMPILE_HOME=str(tmp_path / "cache"))
    assert done.stdout.split(maxsplit=1) == ["True", "['decode', 'prefill']\n"], done.stdout + done.stderr
    assert not [*(tmp_path / "cache").rglob("*.so")]


@pytest.mark.parametrize(
    ("system", "platform", "tag"),
    [
        ("linux", "linux-x86_64", "linux_x86_64"),
        ("linux", "linux-aarch64", "linux_aarch64"),
        ("darwin", "macosx-14.0-arm64", "macosx_11_0_arm64"),
        ("linux", "linux-riscv64", ""),
        ("darwin", "macosx-10.13-x86_64", ""),
        ("win32", "win-amd64", ""),
    ],
)
def test_a_wheel_with_kernels_says_which_machine_it_is_for(system, platform, tag, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setenv("_PYTHON_HOST_PLATFORM", platform)
    monkeypatch.setenv("RIVER_COMPILE_KERNELS_IN_WHEEL", "1")
    monkeypatch.setenv("MACOSX_DEPLOYMENT_TARGET", "11.0")
    monkeypatch.setattr(native, "BUILT", tmp_path / "built")
    monkeypatch.setattr(native, "build_all", lambda folder: folder.mkdir() or 1)
    monkeypatch.setattr(build_backend.build_meta, "build_wheel", lambda folder, settings, metadata: settings)
    needed = build_backend.get_requires_for_build_wheel()
    assert any(name.startswith("torch") for name in needed) == bool(tag)
    options = build_backend.build_wheel("dist", {"--build-option": "--quiet"})["--build-option"]
    assert options == (["--quiet", f"--plat-name={tag}"] if tag else "--quiet")
    assert not (tmp_path / "built").exists()


def test_a_wheel_of_a_checkout_compiles_nothing_unless_asked(monkeypatch):
    monkeypatch.setenv("_PYTHON_HOST_PLATFORM", "linux-x86_64")
    for asked, compiles in (("0", False), ("1", True), (None, False)):
        monkeypatch.delenv("RIVER_COMPILE_KERNELS_IN_WHEEL", raising=False)
        if asked is not None:
            monkeypatch.setenv("RIVER_COMPILE_KERNELS_IN_WHEEL", asked)
        needed = build_backend.get_requires_for_build_wheel()
        assert any(name.startswith("torch") for name in needed) == compiles
