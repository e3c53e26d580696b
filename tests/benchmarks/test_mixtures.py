"""The benchmark of random mixtures: its rows, its table, and the GGUF file that llama.cpp reads."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import common, mixtures, peers
from benchmarks.random_mixtures import QWEN, qwen
from tools.gguf_files import write_gguf


class Here:
    """A worker in this process."""

    def __init__(self, *_, **__):
        mixtures._model.clear()

    def ask(self, command, **arguments):
        return getattr(mixtures, command)(**arguments)

    def close(self):
        mixtures._model.clear()


def test_rows_have_a_text_a_speed_and_what_a_token_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "Worker", Here)
    monkeypatch.setattr(common, "memory_speed", lambda _threads: {"bandwidth_bytes_per_s": 1e9})
    out = tmp_path / "out.json"
    arguments = [
        "--shape",
        "tiny",
        "--rows",
        "eager",
        "16bit",
        "--new-tokens",
        "6",
        "--repeats",
        "1",
        "--json",
        str(out),
    ]
    assert mixtures.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "memory at 1.0 GB/s" in printed
    rows = json.loads(out.read_text())["rows"]
    shape = QWEN["tiny"]
    experts = 2 * 3 * shape.layers * shape.chosen * shape.hidden * shape.intermediate
    assert rows["eager"]["chosen_bytes"] is None
    assert rows["16bit"]["chosen_bytes"] == experts
    assert [len(row["text"]) for row in rows.values()] == [6, 6]
    line = next(line for line in printed.splitlines() if line.startswith("16bit"))
    assert f"{experts / 1e6:.2f}" in line
    assert f"{mixtures.bytes_of_token(shape, 16) / 1e6:.2f}" in line
    assert line.endswith("True")


@pytest.mark.parametrize("shape", ["tiny", "gpt-oss-tiny"])
def test_a_row_that_a_shape_lacks_is_an_error(shape, monkeypatch, capsys):
    monkeypatch.setattr(peers, "why_not", lambda name: f"{name} is not installed")
    with pytest.raises(SystemExit):
        mixtures.main(["--shape", shape, "--rows", "llama_cpp_q4_0"])
    reason = "not installed" if shape == "tiny" else "gpt-oss-tiny has no such row"
    assert reason in capsys.readouterr().err


def test_a_gguf_file_has_the_models_weights(tmp_path):
    gguf = pytest.importorskip("gguf")
    shape, file = QWEN["tiny"], tmp_path / "model.gguf"
    model = qwen(shape)
    write_gguf(model, file, "BF16")
    reader = gguf.GGUFReader(file)
    assert reader.fields["qwen3moe.expert_used_count"].contents() == shape.chosen
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == len(model.state_dict()) + shape.layers  # gates and up projections are apart

    def read(name: str) -> torch.Tensor:
        tensor = tensors[name]
        return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())

    layer, i = model.model.layers[1], shape.intermediate
    both = layer.mlp.experts.gate_up_proj.float()
    assert torch.equal(read("blk.1.ffn_gate_exps.weight"), both[:, :i])
    assert torch.equal(read("blk.1.ffn_up_exps.weight"), both[:, i:])
    assert torch.equal(read("blk.1.ffn_down_exps.weight"), layer.mlp.experts.down_proj.float())
    assert torch.equal(read("blk.1.attn_q_norm.weight"), layer.self_attn.q_norm.weight.float())
    assert torch.equal(read("output.weight"), model.lm_head.weight.float())
