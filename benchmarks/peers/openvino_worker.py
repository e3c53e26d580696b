"""OpenVINO GenAI on a folder that optimum-intel exported, with its own defaults: one text at a time.

Its precision of activations and KV cache is what it chooses for the machine.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import protocol


class OpenVino(protocol.Peer):
    """An `LLMPipeline`."""

    def __init__(self, job):
        from openvino_genai import LLMPipeline

        super().__init__(job)
        self._pipeline = LLMPipeline(job["file"], "CPU", INFERENCE_NUM_THREADS=job["threads"])

    def generate(self, ids, clock, new_tokens):
        import numpy as np
        from openvino import Tensor
        from openvino_genai import GenerationConfig, StreamerBase, StreamingStatus, TokenizedInputs

        class Streamer(StreamerBase):
            def write(self, tokens):
                clock.note(*(tokens if isinstance(tokens, list) else [tokens]))
                return StreamingStatus.RUNNING

            def end(self):
                pass

        prompt = np.array([ids], dtype=np.int64)
        greedy = GenerationConfig(max_new_tokens=new_tokens, ignore_eos=True, do_sample=False)
        self._pipeline.generate(TokenizedInputs(Tensor(prompt), Tensor(np.ones_like(prompt))), greedy, Streamer())


def convert(source: str, target: str, kind: str) -> None:
    """Export a model folder with weights of a kind: "fp16" (which bfloat16 ones become), "int8" or "int4"."""
    program = Path(sys.executable).with_name("optimum-cli")
    how = ["--task", "text-generation-with-past", "--weight-format", kind]
    if kind == "int4":
        how += ["--group-size", "64"]  # (128 by default, by which SmolLM2's rows cannot be divided)
    subprocess.run([program, "export", "openvino", "--model", source, *how, target], check=True)


if __name__ == "__main__":
    protocol.run(OpenVino, convert)
