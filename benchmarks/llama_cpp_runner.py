"""llama.cpp as a row of `benchmarks.decode`: from the GGUF file that the model was made of, in batches of one.

Not handled: rows of a batch, which its Python package cannot decode together.
"""

from __future__ import annotations

import ctypes
import importlib.util
import time
from pathlib import Path

from benchmarks.gguf_runner import GgufRunner, token_ids
from tools import demo_models


def build(job: dict) -> LlamaCppRunner:
    """Return the runner of a job of `benchmarks.decode`."""
    from llama_cpp import Llama

    prompt, text = token_ids(job)
    llama = Llama(
        model_path=job["gguf"],
        n_ctx=max(len(prompt), *job["prompts"], 1) + job["new_tokens"] + 1,
        n_threads=job["threads"],
        n_threads_batch=job["threads"],
        verbose=False,
    )
    return LlamaCppRunner(llama, prompt, text, job)


class LlamaCppRunner(GgufRunner):
    """Generates with llama.cpp from the GGUF file that the model was made of; `program` is its `Llama`."""

    def seconds(self, new_tokens: int, prompt: list[int] | None = None) -> list[float]:
        self.program.reset()
        start = time.perf_counter()
        stream = self.program.generate(prompt or self.prompt, top_k=1, temp=0.0, repeat_penalty=1.0, reset=True)
        return [time.perf_counter() - start for _, _ in zip(range(new_tokens), stream, strict=False)]


def why_not(named: Path | None, model: str, batch: int) -> str:
    """Return why a row cannot run here, "" where it can."""
    if batch > 1:
        return "llama-cpp-python decodes one text at a time"
    if importlib.util.find_spec("llama_cpp") is None:
        return "llama-cpp-python is not installed (pip install llama-cpp-python)"
    return why_no_file(named, model)


def why_no_file(named: Path | None, model: str) -> str:
    """Return why there is no GGUF file, "" where there is one."""
    if named is None and model not in demo_models.MODELS:
        return "the model did not come from a GGUF file (name one with --gguf)"
    return ""


def gguf_file(named: Path | None, model: str) -> Path:
    """Return the GGUF file that the model was made of.

    Raises:
        ValueError: the named file is not there.
    """
    if named is None:
        return demo_models.gguf_path(model)
    if not named.is_file():
        raise ValueError(f"--gguf {named} is not a file; name the GGUF file that the model was made of")
    return named


def requantize(gguf: Path, target: Path, kind: str) -> Path:
    """Let llama.cpp write a GGUF file's weights as another kind ("BF16", "Q4_1", ...); return the target.

    Raises:
        ValueError: llama.cpp cannot.
    """
    import llama_cpp

    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype, how.allow_requantize = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}"), True
    if llama_cpp.llama_model_quantize(str(gguf).encode(), str(target).encode(), ctypes.byref(how)):
        raise ValueError(f"llama.cpp cannot write {gguf} as {kind}")
    return target
