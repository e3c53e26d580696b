"""What a user does with a model's twins: collect statistics for them, save, export and requantize them.

Not handled: formats other than River's own and compressed-tensors.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from river_compile.api.accelerate import accelerate, restore
from river_compile.api.generation import restore_generate
from river_compile.building.graph_record import Graphs
from river_compile.decoding.prefix_cache import PrefixPool
from river_compile.errors import OptionError, TwinsError
from river_compile.kernels.checks import PATH
from river_compile.kernels.files import atomic_write
from river_compile.kernels.quant.grid import QuantizedWeight
from river_compile.ranks import ranks_of
from river_compile.record import ModelRecord, find_record, unwrap
from river_compile.runtime.executor import RiverExecutor
from river_compile.tracing.programs import ProgramCache
from river_compile.twins.file import write
from river_compile.twins.pack import TwinWeights
from river_compile.twins.weights import TwinWeight, is_in
from river_compile.upstream.dynamo import OwnCall

FORMATS = ("compressed-tensors",)


def save_twins(model: nn.Module, folder: str | Path) -> Path:
    """Save the 4-bit twins of a model; ``accelerate(model, twins=folder)`` reads them.

    An accelerated model that has no twins yet is quantized first. With tensor parallelism each rank calls this and
    writes its own part, ``rank-0-of-2`` and so on.

    Args:
        model: an accelerated model, or one compiled with ``backend="river"`` that has generated.
        folder: new or empty. It appears complete or not at all.

    Returns:
        The folder.

    Raises:
        TwinsError: (a ``ValueError``) the model has no twins, its weights changed since, or the folder cannot be
            written.
    """
    folder = Path(PATH("folder", folder, TwinsError))
    plain, record = unwrap(model), find_record(model)
    if record is not None and record.find(OwnCall) is not None and not record.of(Graphs).packed:
        _pack(plain, record)
    mine = ranks_of(plain.parameters()).folder(folder)
    write(mine, _current_twins(plain, mine))
    return folder


def _pack(model: Any, record: ModelRecord) -> None:
    """Have a model trace its passes and quantize its twins, and wait for them."""
    _generate_a_token(model)
    packing = record.of(TwinWeights).background.packing
    if packing is not None and not record.of(Graphs).packed:
        packing.wait()
        _generate_a_token(model)


def _generate_a_token(model: Any) -> None:
    """Generate two tokens, the second one by a decode step."""
    token = model.generation_config.bos_token_id or 0
    ids = torch.full((1, 2), token if isinstance(token, int) else token[0], device=model.device)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, min_new_tokens=2, do_sample=False)


def _current_twins(model: nn.Module, folder: Path) -> list[TwinWeight]:
    """Return a model's twins; raise a TwinsError if there are none, or if their weights changed."""
    record = find_record(model)
    made = record.of(Graphs).packed if record else []
    if not made:
        raise TwinsError(
            f"Cannot save to {folder}: this model has no twins. Call river_compile.accelerate(model) first, or "
            'generate a token with model.compile(backend="river")',
            id="RC045",
        )
    made = [twin for twin in made if is_in(model, twin)] or made  # without those of removed adapters
    stale = next((twin.name for twin in made if not twin.is_current), None)
    if stale is not None:
        raise TwinsError(
            f"Cannot save to {folder}: the weights of {stale} changed after they were quantized. Call "
            "river_compile.requantize(model) and generate a token first",
            id="RC045",
        )
    return made


def requantize(model: nn.Module) -> int:
    """Have the next call quantize the twins of all weights that changed, however they were changed.

    The next prompt notices ``load_state_dict``, an optimizer's step, ``parameter.data = ...`` and a merged adapter by
    itself. Single elements that were changed under ``torch.inference_mode()`` or through ``parameter.data`` are not
    counted by PyTorch: call this then. It reads all weights, and empties the prefix cache.

    Args:
        model: an accelerated or compiled model, or the wrapper that ``torch.compile`` returned.

    Returns:
        The number of matmuls that will be quantized again.
    """
    record = find_record(model)
    if record is None:
        return 0
    record.of(PrefixPool).forget_state()
    for graph in record.of(Graphs):
        if isinstance(executor := graph.executor(), RiverExecutor):
            executor.model_state = None
    return record.of(TwinWeights).compare_digests()


def export(model: PreTrainedModel, folder: str | Path, format: str = "compressed-tensors") -> Path:
    """Write the twins as a 4-bit checkpoint that transformers loads like any other model; the format is vLLM's, too.

    Each linear of a twin becomes ``weight_packed`` (int32 ``[N, K / 8]``, eight 4-bit values in a word) and
    ``weight_scale`` ``[N, K / group]``; all other weights stay as they are. The format has no zero-points, so the model
    is quantized with ``quantizer="symmetric"``, unless its twins are that already. It is left as it was.

    Args:
        model: a transformers model, accelerated or not.
        folder: new or empty. It appears complete or not at all.
        format: "compressed-tensors", the only one.

    Returns:
        The folder.

    Raises:
        OptionError: (a ``ValueError``) an unknown format.
        TwinsError: (a ``ValueError``) the format cannot hold the twins (stacked experts, GPT-2's transposed weights,
            several group sizes), or the folder cannot be written.
    """
    folder = Path(PATH("folder", folder, TwinsError))
    if format not in FORMATS:
        raise OptionError(f"format={format!r} is not allowed; use {FORMATS[0]!r}")
    if ranks_of(unwrap(model).parameters()).several:
        raise TwinsError(
            f"Cannot export to {folder}: each rank holds a part of the twins. Load the model without "
            "distributed_config= to export it",
            id="RC046",
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise TwinsError(f"Cannot export to {folder}: it exists and is not an empty folder. Name another", id="RC044")
    plain: Any = unwrap(model)
    with _symmetric_twins(plain, folder) as twins:
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


class _State(NamedTuple):
    """What `accelerate` changes in a record."""

    graphs: Graphs
    call: OwnCall | None
    programs: ProgramCache | None
    stores: bool
    background: bool

    @classmethod
    def of(cls, record: ModelRecord) -> _State:
        twins = record.of(TwinWeights)
        graphs = Graphs(record.of(Graphs))
        return cls(graphs, record.find(OwnCall), record.find(ProgramCache), twins.stores, twins.background.enabled)

    def put_back(self, record: ModelRecord) -> None:
        record.drop(OwnCall, ProgramCache)
        record.put(*(held for held in (self.graphs, self.call, self.programs) if held is not None))
        twins = record.of(TwinWeights)
        twins.stores, twins.background.enabled = self.stores, self.background


@contextlib.contextmanager
def _symmetric_twins(model: Any, folder: Path) -> Iterator[list[TwinWeight]]:
    """Give a model's symmetric twins: its own, or ones that are made for the time of the block."""
    record = find_record(model)
    head = next((path for path, module in model.named_modules() if module is model.get_output_embeddings()), "")

    def blocks() -> list[TwinWeight]:
        return [twin for twin in _current_twins(model, folder) if twin.name != head]

    packed = record.of(Graphs).packed if record is not None else []
    if packed and all(twin.quantizer == "symmetric" for twin in packed):
        yield blocks()
        return
    generate = vars(model).get("generate")
    before = None if record is None else _State.of(record)
    accelerate(model, quantizer="symmetric", lm_head="keep", compile_cache=False, background_packing=False)
    try:
        _generate_a_token(model)
        yield blocks()
    finally:
        if record is None or before is None:
            restore(model)
        else:
            before.put_back(record)
            if generate is None:
                restore_generate(model)
            else:
                vars(model)["generate"] = generate


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
