"""Build an emulated ARM machine in a folder: Python, torch, transformers and River's wheel for aarch64 (qemu-user).

    python -m tools.arm_environment build FOLDER    # downloads 3 GB and compiles the wheel: ten minutes of two cores
    python -m tools.arm_environment check FOLDER    # generates with each instruction set: minutes each
    FOLDER/python script.py                         # anything else

It needs Debian's or Ubuntu's apt-get with the packages g++-aarch64-linux-gnu and qemu-user. Not handled: speed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from river_compile.kernels.native.build import isas_of
from river_compile.kernels.native.machine import ARM
from tools.house.sources import ROOT

TORCH = "torch==2.11.*"  # the oldest that a wheel's libraries run with
PACKAGES = (
    TORCH,
    "transformers>=5.17",
    "torchao>=0.15",
    "numpy",
    "safetensors",
    "xxhash",
    "filelock",
    "jinja2",
    "sympy",
)
PACKAGES += ("tqdm", "typer", "rich")
SYSTEM = ("python3", "libstdc++6", "libgomp1", "libc6")
_PLATFORMS = [f"--platform=manylinux_2_{minor}_aarch64" for minor in range(17, 35)] + [
    "--platform=manylinux2014_aarch64"
]
_APT = """APT::Architecture "arm64";
APT::Architectures {{ "arm64"; }};
APT::Install-Recommends "false";
Dir::State::lists "{0}/lists";
Dir::State::status "{0}/status";
Dir::Cache "{0}/cache";
"""
_GENERATES = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import river_compile
from river_compile.kernels.native import build, load
torch.manual_seed(0)
config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, vocab_size=128)
for dtype in (torch.float32, torch.bfloat16):
    model, ids = LlamaForCausalLM(config).eval().to(dtype), torch.arange(1, 8)[None]
    plain = model.generate(ids, do_sample=False, max_new_tokens=12)
    river_compile.accelerate(model, compile_cache=False)
    assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=12), plain), dtype
    assert load.loaded(), river_compile.report(model)
    drafted = river_compile.report(model).exact.by_source
    print(build.choose_isa().name, dtype, "the plain model's text", dict(drafted), flush=True)
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("build", "check"))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    if options.what == "check":
        return check(folder)
    folder.mkdir(parents=True, exist_ok=True)
    python = install_system(folder)
    install_packages(folder, python)
    install_wheel(folder)
    print(f"{folder / 'python'} is Python {python} for aarch64")
    return 0


def install_system(folder: Path) -> str:
    """Unpack Debian's Python and its libraries below `folder`; return its version, such as "3.13"."""
    apt, system = folder / "apt", folder / "system"
    (apt / "lists/partial").mkdir(parents=True, exist_ok=True)
    (apt / "cache/archives/partial").mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    (apt / "apt.conf").write_text(_APT.format(apt))
    environment = {**os.environ, "APT_CONFIG": str(apt / "apt.conf")}
    subprocess.run(["apt-get", "update"], env=environment, check=True)
    subprocess.run(["apt-get", "install", "--yes", "--download-only", *SYSTEM], env=environment, check=True)
    for name in ("lib", "bin", "sbin"):  # links that Debian makes on installation
        (system / "usr" / name).mkdir(parents=True, exist_ok=True)
        if not (system / name).is_symlink():
            (system / name).symlink_to(f"usr/{name}")
    for package in sorted((apt / "cache/archives").glob("*.deb")):
        subprocess.run(["dpkg-deb", "--extract", str(package), str(system)], check=True)
    return (system / "usr/bin/python3").readlink().name.removeprefix("python")


def install_packages(folder: Path, python: str) -> None:
    """Install the packages for aarch64 below `folder`, and the command ``python`` that finds them."""
    site = folder / "site"
    how = [f"--python-version={python}", "--only-binary=:all:", "--no-compile", "--upgrade", f"--target={site}"]
    subprocess.run([sys.executable, "-m", "pip", "install", *_PLATFORMS, *how, *PACKAGES], check=True)
    libraries = ":".join(map(str, [*sorted(site.glob("nvidia/*/lib")), folder / "system/usr/lib/aarch64-linux-gnu"]))
    command = folder / "python"
    command.write_text(
        f"#!/bin/sh\nexport PYTHONPATH=$PYTHONPATH:{folder / 'river'}:{site}\n"
        f"exec qemu-aarch64 -cpu max -L {folder / 'system'} -E LD_LIBRARY_PATH={libraries} "
        f'{folder / "system/usr/bin/python3"} "$@"\n'
    )
    command.chmod(0o755)


def install_wheel(folder: Path) -> None:
    """Compile this checkout's wheel for aarch64 and unpack it below `folder`."""
    compiler, wheels = folder / "c++", folder / "wheels"
    compiler.write_text(f'#!/bin/sh\nexec aarch64-linux-gnu-g++ -L{folder / "site/torch/lib"} "$@"\n')
    compiler.chmod(0o755)
    environment = {
        **os.environ,
        "CXX": str(compiler),
        "RIVER_COMPILE_KERNELS_IN_WHEEL": "1",
        "_PYTHON_HOST_PLATFORM": f"linux-{ARM}",
    }
    shutil.rmtree(wheels, ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        f"--outdir={wheels}",
        str(ROOT),
    ]  # by way of the archive: ROOT stays clean
    subprocess.run(command, env=environment, check=True)
    (wheel,) = wheels.glob("*.whl")
    shutil.rmtree(folder / "river", ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "river")


def check(folder: Path) -> int:
    """Generate on the emulated machine with each instruction set, without a compiler; return the number of failures."""
    failures = 0
    for isa in isas_of(ARM):
        environment = {**os.environ, "RIVER_COMPILE_ISA": isa.name, "CXX": "false", "PYTHONPATH": ""}
        environment["RIVER_COMPILE_HOME"] = str(folder / "home")
        done = subprocess.run([str(folder / "python"), "-c", _GENERATES], env=environment, cwd=folder)
        if done.returncode:
            print(f"{isa.name}: exit status {done.returncode}")
            failures += 1
    return failures


if __name__ == "__main__":
    sys.exit(main())
