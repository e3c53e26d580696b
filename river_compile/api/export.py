"""Exports a model with 4-bit weights as a checkpoint for other engines.

Not handled: formats other than compressed-tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers import PreTrainedModel

from river_compile.api.accelerate import without_values
from river_compile.api.twins import current_twins
from river_compile.building.graph_record import Graphs
from river_compile.building.unsupported import obstacle
from river_compile.config import RiverConfig
from river_compile.errors import OptionError, TwinsError
from river_compile.kernels.checks import PATH
from river_compile.kernels.files import atomic_write
from river_compile.kernels.quant.grid import QuantizedWeight
from river_compile.kernels.quant.layouts import PLAIN_LAYOUT
from river_compile.passes.normalize import normalized
from river_compile.passes.program import Refusal, RiverProgram
from river_compile.passes.segments import recognise
from river_compile.passes.twins import TwinSpec, twin_layers
from river_compile.progress import stage_shown
from river_compile.record import find_record, unwrap
from river_compile.runtime.processes import processes_of
from river_compile.twins.digests import Digests
from river_compile.twins.making import Job, Statistics
from river_compile.twins.weights import Parameters, TwinWeight
from river_compile.upstream.dynamo import OwnCall, untraceable
from river_compile.upstream.transformers import cache_argument, full_static_cache

FORMATS = ("compressed-tensors",)
_PROMPT, _SLOTS = 2, 32  # of the call that `export` traces


def export(model: PreTrainedModel, folder: str | Path, format: str = "compressed-tensors") -> Path:
    """Write the twins as a 4-bit checkpoint that transformers loads like any other model; the format is vLLM's, too.

        river_compile.export(model, "checkpoint-4bit")

    Each linear of a twin becomes ``weight_packed`` (int32 ``[N, K / 8]``, eight 4-bit values in a word) and
    ``weight_scale`` ``[N, K / group]``; all other weights stay as they are. The format has no zero-points, so the model
    is quantized with ``quantizer="symmetric"``, unless its twins are that already. It stays as it is.

    Args:
        model: a transformers model, accelerated or not.
        folder: new or empty. It appears complete or not at all.
        format: "compressed-tensors", the only one.

    Returns:
        The folder.

    Raises:
        OptionError: (a ``ValueError``) an unknown format.
        TwinsError: (a ``ValueError``) the format cannot hold the twins (stacked experts, GPT-2's transposed weights,
            several group sizes), River cannot find the model's layers, or the folder cannot be written.
    """
    folder = Path(PATH("folder", folder, TwinsError))
    if format not in FORMATS:
        raise OptionError(f"format={format!r} is not allowed; use {FORMATS[0]!r}")
    if processes_of(unwrap(model).parameters()).several:
        raise TwinsError(
            f"Cannot export to {folder}: each process holds a part of the twins. Load the model without "
            "distributed_config= to export it",
            id="RC046",
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise TwinsError(f"Cannot export to {folder}: it exists and is not an empty folder. Name another", id="RC044")
    plain: Any = unwrap(model)
    twins = _symmetric_twins(plain, folder)
    _check(twins, folder)
    state: dict[str, Tensor] = dict(plain.state_dict())
    for twin in twins:
        for name, grid in _linears(twin):
            state |= _tensors(name, grid, state.pop(f"{name}.weight").dtype, folder)
    names = {name for twin in twins for name in twin.name.split("|")}
    group_size = twins[0].group_size
    left = [path for path, module in plain.named_modules() if isinstance(module, nn.Linear) and path not in names]
    try:
        with atomic_write(folder) as scratch:
            plain.save_pretrained(scratch, state_dict=state)
            config = json.loads((scratch / "config.json").read_text(encoding="utf-8"))
            config["quantization_config"] = _quantization(group_size, left)
            (scratch / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise TwinsError(f"Cannot export to {folder}: {error}. Name a writable folder", id="RC044") from error
    return folder


def _symmetric_twins(model: Any, folder: Path) -> list[TwinWeight]:
    """Return the symmetric twins of a model's blocks: its own, or new ones, of which it learns nothing."""
    record = find_record(model)
    packed = record.of(Graphs).packed if record is not None else []
    if not packed or any(twin.quantizer != "symmetric" for twin in packed):
        return _quantized(model, folder)
    head = next((path for path, module in model.named_modules() if module is model.get_output_embeddings()), "")
    return [twin for twin in current_twins(model, folder) if twin.name != head]


def _quantized(model: Any, folder: Path) -> list[TwinWeight]:
    """Quantize the matmuls of a model's blocks symmetrically; raise a TwinsError if they are not found."""
    config = RiverConfig(quantizer="symmetric")
    why_not = untraceable(model) or without_values(model)
    found = Refusal(why_not) if why_not else _decoder(model, config)
    if isinstance(found, Refusal):
        raise TwinsError(f"Cannot export to {folder}: {found}. Export a model that River accelerates", id="RC046")
    program, inputs = found
    twinned = twin_layers(TwinSpec(config.group_size, PLAIN_LAYOUT))(program)
    assert isinstance(twinned, RiverProgram), "the pass of twins refuses nothing"
    matmuls = [matmul for twin in twinned.twins for matmul in twin.packed]
    parameters = {matmul: Parameters.from_inputs(matmul, inputs) for matmul in matmuls}
    job = Job(config, Statistics(), program.plan.device, parameters, Digests().of(parameters))
    with stage_shown("packing"):
        return [*job.make(matmuls, lossless=False).values()]


@torch.no_grad()
def _decoder(model: Any, config: RiverConfig) -> tuple[RiverProgram, Sequence[Any]] | Refusal:
    """Trace a short prompt; return the decoder in it with its real inputs, or why there is none."""
    found: list[tuple[RiverProgram, Sequence[Any]]] = []
    refusals = [Refusal("the model has no graph that Dynamo traces")]

    def look(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        program = obstacle(config, model, example_inputs) or recognise(normalized(graph_module))
        if isinstance(program, Refusal):
            refusals.append(program)
        else:
            found.append((program, example_inputs))
        return graph_module.forward

    ids = torch.ones(1, _PROMPT, dtype=torch.long, device=model.device)
    given = {cache_argument(model): full_static_cache(model, _SLOTS), "attention_mask": torch.ones_like(ids)}
    inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=_PROMPT, use_cache=True, **given)
    with stage_shown("tracing"):
        OwnCall(look, {})(model, **inputs)
    return found[-1] if found else refusals[-1]


def _check(twins: Sequence[TwinWeight], folder: Path) -> None:
    """Raise a TwinsError for twins that the format cannot hold."""
    why = ""
    for twin in twins:
        if twin.matmul.experts or twin.matmul.transposed:
            kind = "a stack of experts" if twin.matmul.experts else "transposed"
            why = f"{twin.name} is {kind}, and the format holds linear layers only. Use river_compile.save_twins"
        elif twin.group_size != twins[0].group_size:
            sizes = sorted({twin.group_size for twin in twins})
            why = f"groups of {sizes[0]} and {sizes[-1]} weights in one model. Use group_size={sizes[0]}"
        if why:
            raise TwinsError(f"Cannot export to {folder}: {why}", id="RC046")


def _linears(twin: TwinWeight) -> Iterator[tuple[str, QuantizedWeight]]:
    """Yield the module path and the quantized weight of each linear of a matmul."""
    assert twin.weight is not None
    grid = twin.weight.unpack()
    parts = (tensor.split(list(twin.matmul.out_features)) for tensor in (grid.q, grid.scale, grid.zero))
    for name, q, scale, zero in zip(twin.name.split("|"), *parts, strict=True):
        yield name, QuantizedWeight(q, scale, zero, grid.group_size)


def _tensors(name: str, grid: QuantizedWeight, dtype: torch.dtype, folder: Path) -> dict[str, Tensor]:
    """Return the tensors of one linear; `dtype` is that of its weight in the model."""
    scale = grid.scale.to(dtype)
    if not torch.equal(scale.float(), grid.scale):
        raise TwinsError(
            f"Cannot export to {folder}: {dtype} does not hold the scales of {name}. Load the model in bfloat16",
            id="RC046",
        )
    return {
        f"{name}.weight_packed": (grid.q[:, 0::2] | grid.q[:, 1::2] << 4).contiguous().view(torch.int32),
        f"{name}.weight_scale": scale,
        f"{name}.weight_shape": torch.tensor(grid.shape),
    }


def _quantization(group_size: int, left: Sequence[str]) -> dict[str, Any]:
    """Return the quantization config for transformers and vLLM: which layers have 4 bits, and how."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group_size}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": list(left),
    }
