"""Loads what a command names as a model: a demo model or a folder.

Not handled: models that are no causal language models, which are refused.
"""

from __future__ import annotations

import contextlib
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from river_compile.cli.demo_models import MODELS, ModelUnavailable, fetch, gguf_path, quiet

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "MODELS", "ModelUnavailable", "config_of", "encode", "fetch", "gguf_path", "load", "load_or_exit", "loading",
    "quiet", "resolve",
]  # fmt: skip

_CAUSAL = ("CausalLM", "LMHead", "ConditionalGeneration", "Decoder")  # in the names of classes with a causal head


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


@contextlib.contextmanager
def loading(folder: Path | str) -> Iterator[None]:
    """Inside, whatever a loader raises on a folder's files becomes a ValueError that names the folder."""
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


def load_or_exit(
    name: str | Path, dtype: torch.dtype | str = "bfloat16"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model as `load` does; where there is none, ends the program with the reason and exit status 1."""
    try:
        return load(name, dtype)
    except (ModelUnavailable, ValueError) as error:
        sys.exit(f"error: {error}")


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
    """Returns the prompt's ids ``[1, length]``, as a user's message where the model has a chat template."""
    if not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt")["input_ids"]
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]
