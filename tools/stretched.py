"""Stretches a model by layers that add nothing: it writes the same text, and reads the weights of a larger model.

Each real layer is followed by copies of it, whose output projections are too small to change a hidden state. A copy's
rows are in another order, so that no program keeps one weight for several layers; bytes compress like those of real
layers. In GGUF files, whose scales are 16-bit floats, those projections are zero.
Not handled: models that call their projections otherwise than Llama and Qwen2 do, and settings by layer.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from river_compile.progress import stage_reached, stage_shown

if TYPE_CHECKING:
    from gguf import GGUFReader, GGUFWriter

SHARD_BYTES = 1 << 30
# Sums of such a projection are lost in the rounding of every hidden state that is not exactly 0, and a power of two
# keeps the mantissas. (River would recognize zeros as 8-bit numbers, and read fewer bytes than a real model's.)
FAINT = 2.0**-60
_LAYER, _OUTPUTS = re.compile(r"(.*\.layers\.)(\d+)(\..*)"), (".self_attn.o_proj.", ".mlp.down_proj.")
_BLOCK, _GGUF_OUTPUTS = re.compile(r"(blk\.)(\d+)(\..*)"), (".attn_output.", ".ffn_down.")


class Layer(NamedTuple):
    """A layer of a stretched model."""

    source: int  # the layer whose weights it has
    copy: int  # 0: that layer itself; its copies are numbered from 1


class Weight(NamedTuple):
    """A weight of a stretched model."""

    name: str
    source: str  # its name in the model that is stretched
    copy: int  # as its layer's; 0 outside of layers
    is_output: bool  # whether a layer adds its products to the hidden state


def spread(real: int, layers: int) -> list[Layer]:
    """Return the layers of a model that is stretched from `real` layers to `layers`, copies spread evenly.

    Raises:
        ValueError: there would be fewer than real ones.
    """
    if layers < real:
        raise ValueError(f"layers={layers}: the model has {real}; a stretched one has as many or more")
    sources = [i * real // layers for i in range(layers)]
    return [Layer(source, i - sources.index(source)) for i, source in enumerate(sources)]


def write_folder(source: Path, target: Path, layers: int) -> None:
    """Write the model of a folder with `layers` layers to another one, which exists; holds a shard in memory.

    Raises:
        ValueError: as `spread`, or its output projections were not found.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    order = spread(config["num_hidden_layers"], layers)
    with stage_shown("stretching"):
        _write_shards(target, _stretched(source, order))
    config["num_hidden_layers"] = layers
    if "layer_types" in config:
        config["layer_types"] = [config["layer_types"][layer.source] for layer in order]
    _write_json(target / "config.json", config)
    for file in source.iterdir():
        if file.name != "config.json" and ".safetensors" not in file.name:
            shutil.copyfile(file, target / file.name)


def write_gguf(source: Path, target: Path, layers: int) -> None:
    """Write the model of a GGUF file with `layers` layers to another file; raise as above."""
    import gguf

    reader = gguf.GGUFReader(source)
    family = reader.fields["general.architecture"].contents()
    count = reader.fields[f"{family}.block_count"]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    weights = _weights(tensors, _BLOCK, _GGUF_OUTPUTS, spread(count.contents(), layers))
    writer = gguf.GGUFWriter(target, family)
    _copy_fields(reader, writer, {count.name: layers})
    for weight in weights:
        tensor = tensors[weight.source]
        data = tensor.data
        writer.add_tensor_info(weight.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with stage_shown("stretching"):
        for number, weight in enumerate(weights):
            data = tensors[weight.source].data
            writer.write_tensor_data(data * 0 if weight.copy and weight.is_output else data)
            stage_reached((number + 1) / len(weights))
    writer.close()


def _weights(
    names: Iterable[str], layer_name: re.Pattern[str], outputs: tuple[str, ...], order: list[Layer]
) -> list[Weight]:
    """Return the weights of a stretched model, those outside of layers first, then layer by layer."""
    found, layers = [], dict[int, list[tuple[str, re.Match[str]]]]()
    for name in names:
        if match := layer_name.fullmatch(name):
            layers.setdefault(int(match[2]), []).append((name, match))
        else:
            found.append(Weight(name, name, 0, False))
    for number, layer in enumerate(order):
        for name, (before, _, inner) in ((name, match.groups()) for name, match in layers.get(layer.source, ())):
            is_output = inner.startswith(outputs)
            found.append(Weight(f"{before}{number}{inner}", name, layer.copy, is_output))
    if len({weight.source for weight in found if weight.is_output}) < len(outputs) * len(layers) or not layers:
        raise ValueError(f"no {' or '.join(outputs)} in some layer; only models that have both can be stretched")
    return found


def _stretched(source: Path, order: list[Layer]) -> Iterator[tuple[str, Tensor]]:
    """Yield names and weights of a stretched folder."""
    from safetensors import safe_open

    files = [safe_open(file, "pt") for file in sorted(source.glob("*.safetensors"))]
    held = {name: file for file in files for name in file.keys()}  # noqa: SIM118  (it is no mapping)
    weights = _weights(held, _LAYER, _OUTPUTS, order)
    for number, weight in enumerate(weights):
        tensor = held[weight.source].get_tensor(weight.source)
        if weight.copy:
            tensor = tensor.roll(weight.copy, 0) * (FAINT if weight.is_output else 1)
        yield weight.name, tensor
        stage_reached((number + 1) / len(weights))


def _write_shards(folder: Path, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Write safetensors files and their index."""
    from safetensors.torch import save_file

    shard: dict[str, Tensor] = {}
    files: dict[str, str] = {}  # by weight
    sizes: list[int] = []

    def write() -> None:
        sizes.append(_nbytes(shard))
        name = f"model-{len(sizes):05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        files.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, weight in weights:
        if shard and _nbytes(shard) + weight.nbytes > SHARD_BYTES:
            write()
        shard[name] = weight
    write()
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": files}
    _write_json(folder / "model.safetensors.index.json", index)


def _nbytes(weights: Mapping[str, Tensor]) -> int:
    return sum(weight.nbytes for weight in weights.values())


def _copy_fields(reader: GGUFReader, writer: GGUFWriter, changed: Mapping[str, object]) -> None:
    """Give a GGUF file the fields of another one, some with other values."""
    import gguf

    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":  # the writer's own
            kind, *inner = field.types
            of_array = inner[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, changed.get(name, field.contents()), kind, of_array)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
