"""ONNX Runtime GenAI on a folder that its own builder made: one text at a time."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile

import onnxruntime_genai
import protocol


class OnnxRuntime(protocol.Peer):
    """A model, and a generator for each text."""

    def __init__(self, job):
        super().__init__(job)
        config = onnxruntime_genai.Config(job["file"])
        threads = {"session_options": {"intra_op_num_threads": job["threads"]}}
        config.overlay(json.dumps({"model": {"decoder": threads}}))
        self._model = onnxruntime_genai.Model(config)

    def generate(self, ids, clock, new_tokens):
        params = onnxruntime_genai.GeneratorParams(self._model)
        length = len(ids) + new_tokens
        params.set_search_options(do_sample=False, max_length=length, min_length=length, batch_size=1)
        generator = onnxruntime_genai.Generator(self._model, params)
        generator.append_tokens([ids])
        for _ in range(new_tokens):
            generator.generate_next_token()
            clock.note(int(generator.get_next_tokens()[0]))


def convert(source: str, target: str, kind: str) -> None:
    """Build a model folder's graph with weights of a kind, such as "int4", for the CPU."""
    builder = (sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", target)
    with tempfile.TemporaryDirectory() as cache:
        how = ("-p", kind, "-e", "cpu", "-c", cache, "--extra_options", "int4_accuracy_level=4")
        subprocess.run([*builder, *how], check=True)


if __name__ == "__main__":
    protocol.run(OnnxRuntime, convert)
