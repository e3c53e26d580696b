"""Loads the model that a command names: a folder, or a name on the hub.

Not handled: models that are no causal language models, which are refused.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from river_compile.cli.output import use_threads

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_CAUSAL = ("CausalLM", "LMHead", "ConditionalGeneration", "Decoder")  # in the names of classes with a causal head
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def start(
    name: str | Path, dtype: torch.dtype | str, threads: int = 0
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model for a command, on so many threads and with quiet libraries."""
    use_threads(threads)
    quiet()
    return load(name, dtype)


def load(name: str | Path, dtype: torch.dtype | str = "bfloat16") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model for inference.

    Args:
        name: a Hugging Face model folder, or a name on the hub.
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
def loading(folder: str) -> Iterator[None]:
    """Inside, any error of a loader becomes a ValueError that names the folder."""
    try:
        yield
    except Exception as error:  # (each library has its own)
        why = textwrap.shorten(f"{type(error).__name__}: {error}", 400, placeholder=" ...")
        raise ValueError(f"{folder} cannot be loaded: {why}") from error


def config_of(folder: str) -> PretrainedConfig:
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


def resolve(name: str | Path) -> str:
    """Returns the folder or the hub's name of a model, as transformers takes it.

    Raises:
        ValueError: it is neither a folder with a ``config.json`` nor a name such as ``owner/name``.
    """
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return str(folder)
    if not _HUB_NAME.fullmatch(str(name)) or folder.exists():
        raise ValueError(
            f"model={str(name)!r} is neither a folder with a config.json nor a name on the hub (owner/name); call "
            "`river chat FOLDER`; in a clone, `make demo` or `python -m tools.demo_models smollm2` fetches a small "
            "model and prints its folder"
        )
    return str(name)


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
