"""The row of OpenVINO: where it can run, which tokens it times, and that its text is the plain model's."""

from __future__ import annotations

import importlib.util
import json
from types import SimpleNamespace

import pytest

from benchmarks import decode_rows, llama_cpp_runner, openvino_runner
from benchmarks.decode import PROMPT
from river_compile.cli import shared
from tools import demo_models


def test_the_row_is_absent_with_its_reason(tmp_path, monkeypatch):
    def reason(kind, batch=1):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        options = SimpleNamespace(rows=["openvino"], batch=batch, gguf=None, model="smollm2")
        return decode_rows.absent(options, tmp_path).get("openvino", "")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert reason("llama") == ""
    assert "no GGUF file of model_type 'gemma3_text', only of llama" in reason("gemma3_text")
    assert "one text at a time" in reason("llama", batch=2)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino_genai" else object())
    assert "openvino-genai is not installed" in reason("llama")


def test_the_runner_times_the_tokens_that_it_asks_for():
    """Past the end of the text, greedily, and each generation reads its whole prompt."""
    pytest.importorskip("openvino_genai")
    asked = []

    class Pipeline:
        def generate(self, inputs, config, streamer):
            asked.append((inputs.input_ids.data.tolist(), config.max_new_tokens))
            assert config.ignore_eos
            assert not config.do_sample
            for token in range(config.max_new_tokens):
                streamer.write([token] if token % 2 else token)

    runner = openvino_runner.OpenVinoRunner(Pipeline(), [1, 2], [7, 8, 9, 10], {"new_tokens": 4})
    first, second = runner.first_call()
    assert 0 < first < second
    assert runner.warm_up() is None
    assert runner.rate() > 0
    assert runner.prompt_seconds(3) > 0
    assert asked == [([[1, 2]], 2), ([[1, 2]], 4), ([[1, 2]], 4), ([[7, 8, 9]], 1)]


@pytest.mark.slow
def test_its_text_is_the_plain_model_s(smollm2_folder, tmp_path):
    """The first tokens by float16 weights are those by bfloat16 weights."""
    pytest.importorskip("openvino_genai")
    pytest.importorskip("llama_cpp")
    file = llama_cpp_runner.requantize(demo_models.gguf_path("smollm2"), tmp_path / "f16.gguf", "F16")
    job = {"folder": str(smollm2_folder), "gguf": str(file), "threads": 1, "prompts": [], "prompt": PROMPT}
    runner = openvino_runner.build(job)
    tokens = [token for token, _ in openvino_runner.stream(runner.program, runner.prompt, 16)]
    model, tokenizer = shared.load(str(smollm2_folder), "float32")
    ids = shared.encode(tokenizer, PROMPT)
    assert tokens == model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :].tolist()
