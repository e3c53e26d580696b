"""Writes random gpt-oss checkpoints whose experts are MXFP4, as the published ones are.

Not handled: sense. These models say nothing about quality.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GptOssConfig

from tools.families.tiny import draw_weights

_NOT_CONVERTED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


def write_gpt_oss(folder: Path, config: GptOssConfig, seed: int = 0) -> int:
    """Write a checkpoint in two shards; return the bytes of its experts' blocks and scales."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    stacks = {name for name, _ in model.named_parameters() if name.endswith(("gate_up_proj", "down_proj"))}
    shapes = {name: model.get_parameter(name).shape for name in stacks}
    for name in stacks:  # (what takes the most is not made in 16 bits)
        module, _, own = name.rpartition(".")
        setattr(model.get_submodule(module), own, None)
    model = model.to_empty(device="cpu").requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.fill_(name.endswith("norm.weight"))
        if name.endswith("_bias"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    draw_weights(model, seed)
    experts: dict[str, torch.Tensor] = {}
    for name in sorted(stacks):
        count, k, n = shapes[name]
        groups = (count, n, k // 32)
        experts[f"{name}_blocks"] = torch.randint(0, 256, (*groups, 16), generator=generator, dtype=torch.uint8)
        # Values of a variance of 1.6 / K, about: the mean square of E2M1 numbers is 7.6.
        middle = 127 + round(-0.5 * torch.tensor(7.6 / 1.6 * k).log2().item())
        experts[f"{name}_scales"] = torch.randint(
            middle - 1, middle + 2, groups, generator=generator, dtype=torch.uint8
        )
    plain = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    shards = {f"model-0000{i}-of-00002.safetensors": tensors for i, tensors in enumerate((plain, experts), start=1)}
    for file, tensors in shards.items():
        save_file(tensors, folder / file, {"format": "pt"})
    index = {
        "metadata": {"total_size": sum(t.nbytes for tensors in shards.values() for t in tensors.values())},
        "weight_map": {name: file for file, tensors in shards.items() for name in tensors},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    settings = {
        **config.to_dict(),
        "architectures": ["GptOssForCausalLM"],
        "dtype": "bfloat16",
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": _NOT_CONVERTED},
    }
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return sum(tensor.nbytes for tensor in experts.values())
