"""OpenVINO as a row of `benchmarks.decode`: OpenVINO GenAI on a GGUF file, with its own defaults, in batches of one.

Its precision of activations and KV cache is what it chooses for the machine.
Not handled: architectures whose GGUF files OpenVINO does not read.
"""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.gguf_runner import GgufRunner, token_ids

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # of GGUF files that OpenVINO GenAI reads, as transformers names them


def build(job: dict) -> OpenVinoRunner:
    """Return the runner of a job of `benchmarks.decode`."""
    from openvino_genai import LLMPipeline

    pipeline = LLMPipeline(job["gguf"], "CPU", INFERENCE_NUM_THREADS=job["threads"])
    return OpenVinoRunner(pipeline, *token_ids(job), job)


class OpenVinoRunner(GgufRunner):
    """Generates with OpenVINO from a GGUF file; `program` is its `LLMPipeline`."""

    def seconds(self, new_tokens: int, prompt: list[int] | None = None) -> list[float]:
        return [seconds for _, seconds in stream(self.program, prompt or self.prompt, new_tokens)]


def stream(pipeline: Any, prompt: list[int], new_tokens: int) -> list[tuple[int, float]]:
    """Generate greedily, past any end-of-sequence token; return each new token and the seconds to it."""
    import numpy as np
    from openvino import Tensor
    from openvino_genai import GenerationConfig, StreamerBase, StreamingStatus, TokenizedInputs

    found: list[tuple[int, float]] = []

    class Clock(StreamerBase):
        def write(self, tokens: int | list[int]) -> StreamingStatus:
            now = time.perf_counter() - start
            found.extend((token, now) for token in (tokens if isinstance(tokens, list) else [tokens]))
            return StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    ids = np.array([prompt], dtype=np.int64)
    greedy = GenerationConfig(max_new_tokens=new_tokens, ignore_eos=True, do_sample=False)
    start = time.perf_counter()
    pipeline.generate(TokenizedInputs(Tensor(ids), Tensor(np.ones_like(ids))), greedy, Clock())
    return found


def why_not(folder: Path, batch: int) -> str:
    """Return why a row cannot run here, "" where it can."""
    if batch > 1:
        return "it is measured with one text at a time"
    if importlib.util.find_spec("openvino_genai") is None:
        return "openvino-genai is not installed (pip install openvino-genai)"
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind not in ARCHITECTURES:
        return f"OpenVINO reads no GGUF file of model_type {kind!r}, only of {', '.join(ARCHITECTURES)}"
    return ""
