"""Shared by the commands: options, output as a page or one JSON document, models and texts.

Not handled: models that are not causal language models; they are refused.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import re
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from river_compile.version import __version__

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

FAILED, NO = 1, 3  # exit codes

DTYPES = ("bfloat16", "float16", "float32")
_MOST_THREADS = 1024  # beyond it the system's limits end the process


def _checked_dtype(name: str) -> str:
    if name not in DTYPES:
        raise ValueError(f"--dtype {name!r} is not known; use one of {', '.join(DTYPES)}")
    return name


AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON document (schema: river_compile/docs/river.schema.json).")
]
Model = Annotated[str, typer.Argument(help="A model folder, or a name on the hub.")]
Dtype = Annotated[
    str, typer.Option(help="Dtype of the weights: bfloat16, float16 or float32.", callback=_checked_dtype)
]
Threads = Annotated[int, typer.Option("--threads", "-t", help="PyTorch threads (0: PyTorch's default).")]
Quality = Annotated[
    str | None,
    typer.Option(help="exact (same output) or fast (early exit). Default: exact, or fast with a calibration."),
]
Strict = Annotated[bool, typer.Option("--strict", help="Fail if exact mode cannot be bit-identical.")]
Calibration = Annotated[Path | None, typer.Option(help="Exit rule written by `river tune`.")]
Twins = Annotated[Path | None, typer.Option(help="Twins written by `river quantize`.")]
Assistant = Annotated[
    str | None,
    typer.Option(help="A smaller model with the same tokens, which drafts (a folder, or a name on the hub)."),
]
PrefixCache = Annotated[
    bool, typer.Option("--prefix-cache/--no-prefix-cache", help="Keep long prompts on disk for later processes.")
]
Texts = Annotated[Path | None, typer.Option(help="Texts separated by empty lines. Default: Python's documentation.")]

_CAUSAL = ("CausalLM", "LMHead", "ConditionalGeneration", "Decoder")  # in the names of classes with a causal head
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def error_line(error: BaseException) -> str:
    """Return an error's message as one line."""
    return " ".join(str(error).split()) or type(error).__name__


def show(command: str, result: dict[str, Any], as_json: bool, page: Callable[[Console], object]) -> None:
    """Print a command's result, as JSON with the command and the version, or as a page."""
    if as_json:
        whole = {"command": command, "version": __version__, **result}
        json.dump(_to_jsonable(whole), sys.stdout, indent=2, allow_nan=False)
        print()
        return
    from rich.console import Console

    page(Console(highlight=False))


def _to_jsonable(value: Any) -> Any:
    """Replace infinite numbers by "inf" or "-inf", and NaN by None."""
    if isinstance(value, dict):
        return {key: _to_jsonable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_jsonable(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> Any:
    """Return a table: text left-aligned, numbers right-aligned with two decimals, None as a dash."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="bold")
    for i, header in enumerate(headers):
        numeric = any(isinstance(row[i], (int, float)) for row in rows)
        made.add_column(header, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        made.add_row(*map(cell, row))
    return made


def cell(value: object) -> str:
    """Format a table's cell."""
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def megabytes(size: float) -> str:
    """Format bytes in units of 10^6 or 10^9."""
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"


def use_threads(threads: int) -> None:
    """Set PyTorch's threads; 0 keeps its default."""
    import torch

    if not 0 <= threads <= _MOST_THREADS:
        allowed = "1 or more, or 0 for torch's own choice" if threads < 0 else f"at most {_MOST_THREADS}"
        raise ValueError(f"--threads {threads} is not allowed; give {allowed}")
    if threads:
        torch.set_num_threads(threads)


def start(
    name: str | Path, dtype: torch.dtype | str, threads: int = 0, *, as_it_comes: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model for a command, with quiet libraries; see `load`."""
    use_threads(threads)
    quiet()
    return load(name, dtype, as_it_comes=as_it_comes)


def load(
    name: str | Path, dtype: torch.dtype | str = "bfloat16", *, as_it_comes: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model in eval mode on the CPU, and its tokenizer; raise a ValueError.

    With `as_it_comes` experts in MXFP4 stay so: for commands that neither run the plain model nor save it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from river_compile.api.mxfp4 import load_as_it_comes

    folder = resolve(name)
    config_of(folder)
    read = load_as_it_comes if as_it_comes else AutoModelForCausalLM.from_pretrained
    with loading(folder):
        return read(folder, dtype=dtype).eval(), AutoTokenizer.from_pretrained(folder)


def load_assistant(name: str | None, dtype: torch.dtype | str, device: str = "cpu") -> dict[str, Any]:
    """Return the argument of `accelerate` for ``--assistant``, empty without one; raise a ValueError."""
    return {} if name is None else {"assistant_model": load(name, dtype)[0].to(device)}


@contextlib.contextmanager
def loading(folder: str) -> Iterator[None]:
    """Inside, any error becomes a ValueError that names the folder."""
    try:
        yield
    except Exception as error:  # each library has its own
        why = textwrap.shorten(f"{type(error).__name__}: {error}", 400, placeholder=" ...")
        raise ValueError(f"{folder} cannot be loaded: {why}") from error


def config_of(folder: str) -> PretrainedConfig:
    """Return a causal language model's config; raise a ValueError for a model without a causal head."""
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
    """Return a model's folder or its name on the hub; raise a ValueError for other names."""
    folder = Path(name).expanduser()
    if os.path.isfile(folder / "config.json"):  # (False for a path that no system takes, too)
        return str(folder)
    if not _HUB_NAME.fullmatch(str(name)) or os.path.exists(folder):
        raise ValueError(
            f"model={str(name)[:200]!r} is neither a folder with a config.json nor a name on the hub (owner/name). "
            "Pass a model folder. In a clone, `make demo` or `python -m tools.demo_models smollm2` fetches a small "
            "model and prints its folder"
        )
    return str(name)


def context_of(model: PreTrainedModel) -> int | None:
    """Return the number of positions that a model knows, None if its config states none."""
    positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return positions


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> torch.Tensor:
    """Return a prompt's ids ``[1, length]``, as a user's message if there is a chat template."""
    return encode_chat(tokenizer, [{"role": "user", "content": prompt}])


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> torch.Tensor:
    """Return a conversation's ids ``[1, length]``; without a chat template, those of its last message.

    Raises:
        ValueError: a message has bytes that are no text (a surrogate stands for each).
    """
    for message in messages:
        try:
            message["content"].encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the {message['role']}'s message is no text in UTF-8: {error}") from None
    if not tokenizer.chat_template:
        return tokenizer(messages[-1]["content"], return_tensors="pt")["input_ids"]
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    return tokenizer.apply_chat_template(messages, **options)["input_ids"]


def quiet() -> None:
    """Silence libraries for a command; not for library code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # Missing weights, which are random then, are still reported.
    logging.getLogger("transformers.modeling_utils").setLevel(logging.WARNING)


def topics() -> list[str]:
    """Return a passage of each topic of Python's `help()`, without its heading."""
    from pydoc_data.topics import topics

    return list(dict.fromkeys(text.partition("\n\n")[2] for text in topics.values()))


def check_output(file: Path) -> None:
    """Raise a ValueError if a command could not write a file at its end; its folder is made."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            if file.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except OSError as error:
        raise ValueError(f"--output {file!s:.200} cannot be written: {error.strerror}; name another file") from None


def passages(file: Path | None) -> list[str]:
    """Return a file's texts, separated by empty lines, or :func:`topics`; raise a ValueError."""
    if file is None:
        return topics()
    try:
        found = [text.strip() for text in file.read_text(encoding="utf-8").split("\n\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--texts {file} cannot be read: {error}") from None
    if not any(found):
        raise ValueError(f"--texts {file} has no text; give one text after another, separated by empty lines")
    return [text for text in found if text]
