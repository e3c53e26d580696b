"""The rows of `benchmarks.decode`: a configuration each, the ratios that are printed, and which rows run here."""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import common, peers
from tools import demo_models
from tools.figures import PROGRAMS

ACCELERATED = {"river": "fast", "exact": "exact"}  # quality by backend
FULL_DEPTH = "full"  # stands for an exit depth of all blocks, whose number only the worker knows
ALL = "all"  # names all rows on the command line
OWN_FILE = "its own"  # the kind of the GGUF file that the model was made of
DRAFT_LENGTHS = (2, 4, 8)
SMALL, ITSELF, BOTH = "small", "itself", "both"  # who drafts: a smaller model, the model's own 4-bit weights
_LLAMA, _SERVER = "llama-cpp-python", "xllamacpp"


@dataclass(frozen=True)
class Row:
    """One configuration.

    Attributes:
        backend: "eager" or "inductor"; "river" (quality "fast") or "exact", of a model that `accelerate` changed;
            "torch_compile", `model.compile(backend="river")` and transformers' loop; or the name of a peer.
        options: of the River backend.
        kinds: of weights that a peer writes first and runs; of several the fastest. None for the model as it is.
        drafts: whose 4-bit weights draft for a peer, and in exact mode who does, where not `ITSELF` alone: a smaller
            model in place of the twins, or `BOTH`.
        same_as: the row of the same program without drafts, whose text this one should give.
    """

    backend: str
    options: dict = field(default_factory=dict)
    kinds: tuple[str, ...] = ()
    drafts: str = ""
    same_as: str = ""

    @property
    def is_peer(self) -> bool:
        return self.backend in peers.PEERS


ROWS = {
    "eager": Row("eager"),
    "inductor": Row("inductor"),
    "llama_cpp": Row(_LLAMA, kinds=(OWN_FILE,)),
    "llama_cpp_best4": Row(_LLAMA, kinds=("Q4_0", "Q4_K_M", "IQ4_NL")),
    "llama_cpp_q4_0": Row(_LLAMA, kinds=("Q4_0",)),
    "llama_cpp_bf16": Row(_LLAMA, kinds=("BF16",)),
    "llama_cpp_q8": Row(_LLAMA, kinds=("Q8_0",)),
    "llama_cpp_server_bf16": Row(_SERVER, kinds=("BF16",)),
    "llama_cpp_draft_itself": Row(_SERVER, kinds=("BF16",), drafts=ITSELF, same_as="llama_cpp_server_bf16"),
    "llama_cpp_draft_small": Row(_SERVER, kinds=("BF16",), drafts=SMALL, same_as="llama_cpp_server_bf16"),
    "openvino": Row("openvino", kinds=("fp16",)),
    "openvino_8bit": Row("openvino", kinds=("int8",)),
    "openvino_4bit": Row("openvino", kinds=("int4",)),
    "onnxruntime_4bit": Row("onnxruntime", kinds=("int4",)),
    "vllm": Row("vllm"),
    "no_draft": Row("river", options={"exit_depth": FULL_DEPTH}),
    "no_draft_16bit": Row("river", options={"exit_depth": FULL_DEPTH, "target_weights": "model"}),
    "no_draft_12bit": Row("river", options={"exit_depth": FULL_DEPTH, "target_weights": "12bit"}),
    "no_draft_checks": Row("river", options={"threshold": 1.0}),  # checks run after every block and never fire
    "exact": Row("exact", same_as="no_draft"),
    "exact_16bit": Row("exact", options={"target_weights": "model"}, same_as="no_draft_16bit"),
    "exact_12bit": Row("exact", options={"target_weights": "12bit"}, same_as="no_draft_12bit"),
    **{f"exact_{q}": Row("exact", options={"quantizer": q}, same_as="no_draft") for q in ("gptq", "mse", "hqq", "rtn")},
    "exact_groups_32": Row("exact", options={"group_size": 32}, same_as="no_draft"),
    "exact_assistant": Row("exact", drafts=SMALL, same_as="no_draft"),
    "exact_assistant_12bit": Row("exact", options={"target_weights": "12bit"}, drafts=SMALL, same_as="no_draft_12bit"),
    "exact_both": Row("exact", drafts=BOTH, same_as="no_draft"),
    "fast": Row("river", options={"threshold": 0.7}),
    "budget": Row("river"),  # tuned by default
    "depth_3": Row("river", options={"exit_depth": 3}),
    "all_4bit": Row("river", options={"exit_depth": 0}),
    "all_4bit_groups_32": Row("river", options={"exit_depth": 0, "group_size": 32}),
    "torch_compile": Row("torch_compile"),
    "torch_compile_all_4bit": Row("torch_compile", options={"exit_depth": 0}),
}
DEFAULT = list(PROGRAMS)  # the rows of the README's table
_RIVALS = ("eager", "llama_cpp", "llama_cpp_best4", "llama_cpp_draft_itself", "llama_cpp_draft_small", "openvino")
SPEED_RATIOS = (
    *(("exact", rival) for rival in ("no_draft", *_RIVALS)),
    *(("exact_assistant", other) for other in ("exact", "no_draft", "llama_cpp_best4", "llama_cpp_draft_small")),
    *(("exact_mse", f"exact_{other}") for other in ("gptq", "hqq", "rtn")),
    *((f"{row}_groups_32", row) for row in ("exact", "all_4bit")),
    *(("exact_both", other) for other in ("exact", "exact_assistant")),
    *(("exact_assistant_12bit", other) for other in ("exact_12bit", "llama_cpp_q4_0", "llama_cpp_draft_small")),
    *(("fast", other) for other in ("no_draft", "eager", "inductor", "torch_compile")),
    *((row, "llama_cpp_bf16") for row in ("no_draft_16bit", "no_draft_12bit", "exact_16bit", "exact_12bit")),
    *(("no_draft_12bit", "no_draft_16bit"), ("exact_12bit", "exact_16bit"), ("no_draft_checks", "no_draft_16bit")),
    *(("all_4bit", other) for other in ("torch_compile_all_4bit", "llama_cpp_best4")),
)
_BITS = {"BF16": 16.0, "fp16": 16.0, "Q8_0": 8.5, "int8": 8.0}  # of a weight, by kind


def wanted(options: argparse.Namespace) -> list[str]:
    """Return the rows that a command line names."""
    return list(ROWS) if ALL in options.rows else options.rows


def absent(options: argparse.Namespace) -> dict[str, str]:
    """Return the wanted rows that cannot run here, each with the reason."""
    reasons = {name: why_not(ROWS[name], options) for name in wanted(options)}
    return {name: reason for name, reason in reasons.items() if reason}


def why_not(row: Row, options: argparse.Namespace) -> str:
    """Return why a row cannot run here, "" where it can."""
    reasons = []
    if row.is_peer:
        reasons += ["it is measured with one text at a time" if getattr(options, "batch", 1) > 1 else ""]
        reasons += ["it is measured on a CPU" if getattr(options, "device", "cpu") != "cpu" else ""]
        reasons.append(peers.why_not(row.backend))
    if row.kinds and peers.PEERS[row.backend].reads == "gguf":
        reasons += [peers.why_not(_LLAMA) if row.kinds != (OWN_FILE,) or row.drafts else "", why_no_gguf(options)]
    if row.drafts in (SMALL, BOTH) and options.model not in demo_models.SMALLER:
        reasons.append("no smaller model with the same tokens is known")
    return next(filter(None, reasons), "")


def why_no_gguf(options: argparse.Namespace) -> str:
    """Return why there is no GGUF file, "" where there is one."""
    if getattr(options, "gguf", None) is None and options.model not in demo_models.MODELS:
        return "the model did not come from a GGUF file (name one with --gguf)"
    return ""


def gguf_file(options: argparse.Namespace) -> Path:
    """Return the GGUF file that the model was made of.

    Raises:
        ValueError: the named file is not there.
    """
    named: Path | None = getattr(options, "gguf", None)
    if named is None:
        return demo_models.gguf_path(options.model)
    if not named.is_file():
        raise ValueError(f"--gguf {named} is not a file; name the GGUF file that the model was made of")
    return named


def worker(name: str, row: Row, threads: int) -> common.Worker:
    """Start the process of a row."""
    if row.is_peer:
        return common.Worker(peers.script(row.backend), name, threads, python=peers.python(row.backend))
    return common.Worker("benchmarks.decode", name, threads)


def choices(row: Row, folder: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the files and settings with which a row may run, by name: one, or several of which the fastest counts.

    Raises:
        ValueError: a file is not there.
        common.WorkerFailed: a peer could not write a file.
    """
    if not row.is_peer:
        small = {"assistant": demo_models.resolve(demo_models.SMALLER[options.model])} if row.drafts else {}
        return {"": {"folder": str(folder), **small}}
    reads_gguf = peers.PEERS[row.backend].reads == "gguf"
    source, writer = (gguf_file(options), _LLAMA) if reads_gguf else (folder, row.backend)
    files = {kind: source if kind == OWN_FILE else peers.converted(writer, source, kind) for kind in row.kinds}
    found: dict[str, dict[str, Any]] = {kind: {"file": str(file)} for kind, file in (files or {"": source}).items()}
    if not row.drafts:
        return found
    drafter = source if row.drafts == ITSELF else demo_models.gguf_path(demo_models.SMALLER[options.model])
    drafts = str(peers.converted(_LLAMA, drafter, "Q4_0"))
    return {
        f"{length} drafted tokens": {**files, "drafts": drafts, "draft_tokens": length}
        for files, length in itertools.product(found.values(), DRAFT_LENGTHS)
    }


def bits_read(row: Row, dtype: str, result: dict[str, Any]) -> float | None:
    """Return the bits that a row reads of each weight for a token, None where a token's reads are not the same."""
    if row.drafts or row.backend == "exact":
        return None
    if row.is_peer:
        return _BITS.get(row.kinds[0]) if row.kinds else 16.0
    if row.backend in ("eager", "inductor"):
        return 32.0 if dtype == "float32" else 16.0
    return result.get("target_bits") if row.options.get("exit_depth") == FULL_DEPTH else None
