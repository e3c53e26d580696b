"""The rows of `benchmarks.decode`: a configuration each, the ratios that are printed, and which rows run here."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import llama_cpp_runner, openvino_runner
from tools.figures import PROGRAMS

ACCELERATED = {"river": "fast", "exact": "exact"}  # quality by backend
FULL_DEPTH = "full"  # stands for an exit depth of all blocks, whose number only the worker knows
GGUF_RUNNERS = {"llama_cpp": llama_cpp_runner, "openvino": openvino_runner}  # by backend: those that read a GGUF file
ALL = "all"  # names all rows on the command line


@dataclass(frozen=True)
class Row:
    """One configuration.

    Attributes:
        backend: "eager" or "inductor"; "llama_cpp" or "openvino", which read a GGUF file; "river" (quality "fast") or
            "exact", of a model that `accelerate` changed; "torch_compile", `model.compile(backend="river")` and
            transformers' loop.
        dtype: None for the dtype of the command line.
        options: of the River backend.
        file: the kind of GGUF file that llama.cpp writes the weights to first, "" for the model as it is.
    """

    backend: str
    dtype: str | None = None
    options: dict = field(default_factory=dict)
    file: str = ""


ROWS = {
    "eager": Row("eager"),
    "inductor": Row("inductor"),
    "inductor_fp16": Row("inductor", dtype="float16"),
    "llama_cpp": Row("llama_cpp"),
    "llama_cpp_bf16": Row("llama_cpp", file="BF16"),
    "llama_cpp_q8": Row("llama_cpp", file="Q8_0"),
    "openvino": Row("openvino", file="F16"),  # (it reads no BF16)
    "openvino_4bit": Row("openvino"),
    "no_draft": Row("river", options={"exit_depth": FULL_DEPTH}),
    "no_draft_16bit": Row("river", options={"exit_depth": FULL_DEPTH, "target_weights": "model"}),
    "no_draft_12bit": Row("river", options={"exit_depth": FULL_DEPTH, "target_weights": "12bit"}),
    "no_draft_q8": Row("river", "float32", {"exit_depth": FULL_DEPTH, "target_weights": "8bit"}, "Q8_0"),
    "no_draft_checks": Row("river", options={"threshold": 1.0}),  # checks run after every block and never fire
    "exact": Row("exact"),
    "exact_16bit": Row("exact", options={"target_weights": "model"}),
    "exact_12bit": Row("exact", options={"target_weights": "12bit"}),
    "exact_q8": Row("exact", "float32", {"target_weights": "8bit"}, "Q8_0"),
    "fast": Row("river"),
    "all_4bit": Row("river", options={"exit_depth": 0}),
    "torch_compile": Row("torch_compile"),
    "torch_compile_all_4bit": Row("torch_compile", options={"exit_depth": 0}),
}
DEFAULT = list(PROGRAMS)  # the rows of the README's table
SPEED_RATIOS = (
    ("exact", "eager"),
    ("exact", "no_draft"),
    ("exact", "llama_cpp"),
    ("exact", "openvino"),
    ("no_draft", "llama_cpp_bf16"),
    ("fast", "no_draft"),
    ("fast", "eager"),
    ("fast", "inductor"),
    ("fast", "inductor_fp16"),
    ("fast", "torch_compile"),
    ("all_4bit", "torch_compile_all_4bit"),
    ("all_4bit", "llama_cpp"),
    ("no_draft_16bit", "llama_cpp_bf16"),
    ("no_draft_12bit", "no_draft_16bit"),
    ("no_draft_12bit", "llama_cpp_bf16"),
    ("exact_16bit", "llama_cpp_bf16"),
    ("exact_12bit", "exact_16bit"),
    ("exact_12bit", "llama_cpp_bf16"),
    ("no_draft_q8", "llama_cpp_q8"),
    ("exact_q8", "llama_cpp_q8"),
    ("no_draft_checks", "no_draft_16bit"),
)
FIRST_TOKEN_RATIOS = (("fast", "inductor"),)


def wanted(options: argparse.Namespace) -> list[str]:
    """Return the rows that a command line names."""
    return list(ROWS) if ALL in options.rows else options.rows


def absent(options: argparse.Namespace, folder: Path) -> dict[str, str]:
    """Return the wanted rows that cannot run here, each with the reason."""
    reasons = {name: _why_not(ROWS[name], options, folder) for name in wanted(options)}
    return {name: reason for name, reason in reasons.items() if reason}


def needs_gguf(name: str) -> bool:
    """Whether a row reads a GGUF file, or weights that were written to one."""
    return ROWS[name].backend in GGUF_RUNNERS or bool(ROWS[name].file)


def _why_not(row: Row, options: argparse.Namespace, folder: Path) -> str:
    reasons = []
    if row.backend == "llama_cpp" or row.file:
        reasons.append(llama_cpp_runner.why_not(options.gguf, options.model, options.batch))
    if row.backend == "openvino":
        reasons.append(openvino_runner.why_not(folder, options.batch))
        reasons.append(llama_cpp_runner.why_no_file(options.gguf, options.model))
    return next(filter(None, reasons), "")
