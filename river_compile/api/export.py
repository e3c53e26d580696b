"""Twins as a checkpoint for other programs: a 4-bit model of the same network, in the compressed-tensors format.

transformers and vLLM load the folder like any other, vLLM with 4-bit kernels, for example as the draft of the 16-bit
model. Each linear of a twin becomes ``weight_packed`` (int32 ``[N, K / 8]``, eight nibbles in a word) and
``weight_scale`` ``[N, K / group]``, merged ones apart again; everything else is the model's: embeddings, norms and the
head in 16 bits. Values are the twins' to the bit.

The format has no zeros but integers, and its readers know symmetric grids best, so that it takes what
``quantizer="symmetric"`` makes. Not handled, and refused by name: other quantizers, stacks of experts, GPT-2's
transposed matrices, and several group sizes in one model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from river_compile.api.twins import packed_twins
from river_compile.errors import ArtifactError, OptionError
from river_compile.kernels.checks import PATH
from river_compile.kernels.files import appearing
from river_compile.kernels.quant.grid import QuantizedWeight
from river_compile.model_record import unwrap
from river_compile.runtime.tensor_parallel import ranks_of
from river_compile.twins.weights import TwinWeight

FORMATS = ("compressed-tensors",)


def export(model: nn.Module, folder: str | Path, format: str = "compressed-tensors") -> Path:
    """Writes a model's twins as a checkpoint that transformers and vLLM load as a 4-bit model.

    Args:
        model: a transformers model that has generated with ``quantizer="symmetric"``, so that its twins are packed.
        folder: where to; must not exist or be empty. It appears complete or not at all.
        format: "compressed-tensors", the only one.

    Returns:
        The folder.

    Raises:
        OptionError: (a ``ValueError``) an unknown format.
        ArtifactError: (a ``ValueError``) nothing is packed, the format cannot hold it, or it cannot be written.
    """
    folder = Path(PATH("folder", folder, ArtifactError))
    if format not in FORMATS:
        raise OptionError(f"format={format!r} is unknown; use {FORMATS[0]!r}")
    if ranks_of(unwrap(model).parameters()).several:
        raise ArtifactError(
            f"cannot export to {folder}: each rank holds a part of the twins alone; export from a model that was "
            "loaded without distributed_config="
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtifactError(f"cannot export to {folder}: it exists and is not an empty folder; name another")
    plain: Any = unwrap(model)
    sites = list(packed_twins(model, folder))
    _check(sites, folder)
    state: dict[str, Tensor] = dict(plain.state_dict())
    for site in sites:
        for name, grid in _linears(site):
            state |= _tensors(name, grid, state.pop(f"{name}.weight").dtype, folder)
    names = {name for site in sites for name in site.name.split("|")}
    left = [path for path, module in plain.named_modules() if isinstance(module, nn.Linear) and path not in names]
    try:
        with appearing(folder) as scratch:
            plain.save_pretrained(scratch, state_dict=state)
            config = json.loads((scratch / "config.json").read_text(encoding="utf-8"))
            config["quantization_config"] = _quantization(sites[0].group_size, left)
            (scratch / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ArtifactError(f"cannot export to {folder}: {error}") from error
    return folder


def _check(sites: Sequence[TwinWeight], folder: Path) -> None:
    """Refuses twins that the format cannot hold."""
    why = ""
    for site in sites:
        if site.matmul.experts or site.matmul.transposed:
            why = (
                f"{site.name} is {'a stack of experts' if site.matmul.experts else 'transposed'}, and only linears are"
            )
        elif site.input_scale is not None:
            why = f"the inputs of {site.name} are scaled; use quantizer='symmetric'"
        elif site.group_size != sites[0].group_size:
            sizes = sorted({site.group_size for site in sites})
            why = f"groups of {sizes[0]} and {sizes[-1]} weights in one model; use group_size={sizes[0]}"
        if why:
            raise ArtifactError(f"cannot export to {folder}: {why}")
    if not sites:
        raise ArtifactError(f"cannot export to {folder}: all twins stay in 16 bits")


def _linears(site: TwinWeight) -> Iterator[tuple[str, QuantizedWeight]]:
    """Yields the module path and the grid of each linear of a product."""
    assert site.weight is not None
    grid = site.weight.unpack()
    parts = (tensor.split(list(site.matmul.out_features)) for tensor in (grid.q, grid.scale, grid.zero))
    for name, q, scale, zero in zip(site.name.split("|"), *parts, strict=True):
        yield name, QuantizedWeight(q, scale, zero, grid.group_size)


def _tensors(name: str, grid: QuantizedWeight, dtype: torch.dtype, folder: Path) -> dict[str, Tensor]:
    """Returns the tensors of one linear; `dtype` is that of its weight in the model."""
    scale = grid.scale.to(dtype)
    why = ""
    if grid.zero.any():
        why = f"the grid of {name} has zeros, which the format does not; generate with quantizer='symmetric' first"
    elif not torch.equal(scale.float(), grid.scale):
        why = f"{dtype} does not hold the scales of {name}; load the model in bfloat16"
    if why:
        raise ArtifactError(f"cannot export to {folder}: {why}")
    return {
        f"{name}.weight_packed": (grid.q[:, 0::2] | grid.q[:, 1::2] << 4).contiguous().view(torch.int32),
        f"{name}.weight_scale": scale,
        f"{name}.weight_shape": torch.tensor(grid.shape),
    }


def _quantization(group_size: int, left: Sequence[str]) -> dict[str, Any]:
    """Returns the quantization config for transformers and vLLM: which layers have 4 bits, and how."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group_size}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": list(left),
    }
