"""Stored programs and twins that are edited and have the right hash, as a file from elsewhere may.

A program is refused, or none of its text has become code. Twins are refused, or the C++ kernels run on them: what they
touch outside of the file's tensors ends the process, at the latest with AddressSanitizer (`make test-sanitizers`).
Not handled: files that take long to read, such as numbers of a million digits; wrong weights of the right form.
"""

from __future__ import annotations

import ast
import copy
import functools
import itertools
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from river_compile.backend import executors_of, river
from river_compile.compile_cache import codec
from river_compile.compile_cache.tensor_file import write_tensors
from river_compile.errors import TwinsError
from river_compile.kernels.native import load
from river_compile.kernels.quant import layouts, lossless
from river_compile.kernels.quant.data_free import quantize
from river_compile.twins.file import FILE, FORMAT, VERSION, TwinFile
from tests.support.decoding import decode, new_cache
from tests.support.families import make
from tests.support.lowerings import OPERATORS

_MARK = "river_forged"
_VALUES = (
    *(None, True, 0, 1, -1, 7, 2**31, 2**63, 2**70, 0.5, 1e400, "", "x", "class", "1x", "é", "s0", [], {}, [[]]),
    *(f"x); {_MARK}(); (x", f"x = {_MARK}, y", f"x\n    {_MARK}()", _MARK + " ", "self", "torch", "_operator.add"),
    *({"tuple": []}, {"list": [1]}, {"dict": [["a", 1]]}, {"node": 0}, {"node": -1}, {"code": 0}, {"graph": []}),
    *({"size": f"{_MARK}()"}, {"size": ["Mod", 1, 0]}, {"slice": [1, 2]}, {"torch": "nn"}, {"device": "meta"}),
)
_HOW = ("replace", "replace", "move", "delete", "repeat", "flip")


@functools.cache
def program() -> bytes:
    """Returns a program as the compile cache has it."""
    torch._dynamo.reset()
    model = make("llama", layers=2)
    options = {"kernels": OPERATORS, "quantizer": "rtn", "group_size": 32, "exit_depth": 1}
    model.compile(backend=river, options=options)
    decode(model, new_cache(model, "static"), [1])
    return codec.dumps(executors_of(model)[-1].program)


def try_program(rng: random.Random) -> str:
    """Reads an edited program of the compile cache; returns "refused" or "passed"."""
    content = json.loads(program())
    for edit in _edits(rng):
        content = edited(content, **edit)
    return read_program(content)


def read_program(content: Any) -> str:
    """Reads a program from JSON; returns "refused" or "passed"."""
    try:
        read = codec.loads(json.dumps(content).encode())
    except codec.NotCacheable:
        return "refused"
    for segment in read.segments:
        check_code(segment.code.module.code)
    return "passed"


def try_twins(rng: random.Random, folder: Path) -> str:
    """Reads an edited file of twins, 4-bit and 12-bit weights, and runs them; returns "refused" or "passed"."""
    matrices, tensors = copy.deepcopy(_twins())
    part = None if rng.random() < 0.3 else rng.choice([*tensors])
    for edit in _edits(rng) if part is None else _edits(rng, ("number", "number", "swap", "equal", "cut", "dtype")):
        if part is None:
            matrices = edited(matrices, **edit)
        else:
            tensors[part] = _edited_tensor(tensors[part], **edit)
    (folder / FILE).unlink(missing_ok=True)
    write_tensors(folder / FILE, tensors, {"format": FORMAT, "version": str(VERSION), "matrices": json.dumps(matrices)})
    try:
        saved = TwinFile(folder)
    except TwinsError:
        return "refused"
    for matrix in saved._matrices:
        q, scale_zero = (saved._tensors[f"{matrix.key}.{name}"] for name in ("qweight", "scale_zero"))
        for rows in (1, 12) if matrix.layout in ("native", lossless.LAYOUT_12BIT) and not matrix.experts else ():
            x = torch.ones(rows, matrix.shape[1], dtype=torch.bfloat16)
            load.load().linear(x, q, scale_zero, None, matrix.rows, matrix.group_size)
    return "passed"


def main(seconds: float) -> None:
    """Tries edited files for some seconds."""
    end, numbers = time.monotonic() + seconds, itertools.count()
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < end:
            rng = random.Random(next(numbers))
            try_program(rng)
            try_twins(rng, Path(folder))


def check_code(code: str) -> None:
    """Fails where text of a file is a part of code; quoted it may be."""
    for node in ast.walk(ast.parse(code)):
        names = (getattr(node, field, None) for field in ("id", "attr", "arg", "name"))
        assert not any(isinstance(name, str) and _MARK in name for name in names), f"text became code:\n{code}"


def edited(content: Any, how: str, at: float, seed: int) -> Any:
    """Return JSON with one change at a place, as a share of all places."""
    rng, places = random.Random(seed), [*_places(content)]
    if not places:
        return content
    holder, key = places[int(at * len(places))]
    if how == "replace":
        holder[key] = rng.choice(_VALUES)
    elif how == "move":
        other, name = rng.choice(places)
        holder[key] = copy.deepcopy(other[name])
    elif how == "delete":
        del holder[key]
    elif how == "repeat" and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    elif isinstance(holder[key], str) and holder[key]:
        text = [*holder[key]]
        text[rng.randrange(len(text))] = chr(rng.randrange(32, 127))
        holder[key] = "".join(text)
    return content


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each container in JSON with each of its keys."""
    for key in [*value] if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def _edited_tensor(tensor: torch.Tensor, how: str, at: float, seed: int) -> torch.Tensor:
    """Return a tensor with one change; 12-bit weights' numbers of patches and places begin behind the palette."""
    rng, flat = random.Random(seed), tensor.clone().view(-1)
    if len(flat) < 3:
        return tensor
    place = int(at * (len(flat) - 2))
    change: dict[str, Callable[[], object]] = {
        "number": lambda: flat.view(torch.uint8).__setitem__(place * flat.itemsize, rng.randrange(256)),
        "swap": lambda: flat.__setitem__(slice(place, place + 3), flat[place : place + 3].flip(0)),
        "equal": lambda: flat.__setitem__(place, flat[place + 2].clone()),
    }
    if how == "cut":
        return flat[:place].clone()
    if how == "dtype":
        return flat.view(torch.uint8).clone()
    change[how]()
    return flat.view(tensor.shape)


def _edits(rng: random.Random, how: tuple[str, ...] = _HOW) -> list[dict[str, Any]]:
    return [
        {"how": rng.choice(how), "at": rng.random() ** rng.choice((1, 3)), "seed": rng.randrange(10**6)}
        for _ in range(rng.choice((1, 1, 2, 3)))
    ]


@functools.cache
def _twins() -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Return the list and the tensors of a file with a 4-bit and a 12-bit weight, which has as many patches as fit."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 320, generator=generator)
    packed = layouts.pack(quantize(weight, 32, "rtn"), "native")
    rare = torch.randperm(weight.numel(), generator=generator)[: int(lossless.MAX_PATCHED_SHARE * weight.numel()) // 2]
    wide = weight * 0.02
    wide.view(-1)[rare] = (weight.view(-1)[rare] * 20).exp()
    twelve = lossless.pack_12bit(wide.bfloat16())
    found = {"4": ("native", 32, packed.qweight, packed.scale_zero), "12": (lossless.LAYOUT_12BIT, 0, *twelve)}
    matrices, tensors = [], {}
    for name, (layout, group_size, *parts) in found.items():
        fields = {"name": name, "shape": [*weight.shape], "group_size": group_size, "experts": 0, "quantizer": "rtn"}
        fields |= {"asked": "rtn", "statistics": "", "layout": layout, "weights_hash": "", "sqnr": "20.0"}
        matrices.append({**fields, "output_sqnr": None})
        key = f"{name}/rtn/{group_size}"
        tensors |= dict(zip((f"{key}.qweight", f"{key}.scale_zero"), parts, strict=True))
    return matrices, tensors
