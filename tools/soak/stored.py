"""Cases of kind "stored": a file that this package keeps on disk is damaged between two uses.

The next use gives what an undamaged file gives, or raises a ValueError of this package. Files are small and made once
in a process. Not handled: damage while a file is read, and edited files with the right hash (tests/support/edited.py).
"""

from __future__ import annotations

import dataclasses
import functools
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

import river_compile
from river_compile.backend import executors_of, river
from river_compile.compile_cache import codec
from river_compile.compile_cache.folder import Entry
from river_compile.exit_rule import Candidate, ExitRule
from river_compile.kernels.triton import loader
from river_compile.kernels.triton.cache import ExitScoreSpec
from river_compile.kernels.triton.linear import LinearTile, untiled
from river_compile.kernels.triton.tiles import form_key, read_table, tuning_key
from river_compile.passes.program import Program
from river_compile.twins.file import FILE, TwinFile
from tests.support.decoding import decode, new_cache
from tests.support.families import make
from tools.kernels import tune
from tools.soak.cases import Case, Failure, refused_by_us

DAMAGES = ("flip", "cut", "insert", "overwrite", "empty", "delete", "digit", "nest", "text")
SPEC = ExitScoreSpec(2, 48, "float32")
LINEAR = dataclasses.replace(untiled(1, 256, 64, weights="w4"), tile=LinearTile(16, 256, 8))
DEVICE = "device"


@dataclasses.dataclass(frozen=True)
class Stored:
    """One kind of file.

    Attributes:
        write: writes it into a folder that is empty or has an older one.
        read: reads it as the next start does. Raises a Failure where it is wrong, and what the product raises.
        files: a pattern of what may be damaged, relative to the folder.
    """

    write: Callable[[Path], object]
    read: Callable[[Path], None]
    files: str


def draw(rng: random.Random) -> Case:
    what = rng.choice([*STORED])
    damages = [
        {"how": rng.choice(DAMAGES), "at": rng.random() ** rng.choice((1, 4)), "seed": rng.randrange(1000)}
        for _ in range(rng.choice((1, 1, 1, 3)))
    ]
    return {"what": what, "damages": damages}


def run(case: Case, folder: Path) -> str:
    """Write, damage and read."""
    stored = STORED[case["what"]]
    stored.write(folder)
    for damage in case["damages"]:
        for file in [*folder.glob(stored.files)]:
            _damage(file, **damage)
    try:
        stored.read(folder)
    except ValueError as error:
        if not refused_by_us(error):
            raise
        return f"refused ({type(error).__name__})"
    return "passed"


def smaller(case: Case) -> Iterator[Case]:
    for i in range(len(case["damages"]) if len(case["damages"]) > 1 else 0):
        yield {**case, "damages": [*case["damages"][:i], *case["damages"][i + 1 :]]}


def _damage(file: Path, how: str, at: float, seed: int) -> None:
    """Damage a file or what is left of it; `at` is the place, as a share of its length."""
    rng, content = random.Random(seed), bytearray(file.read_bytes()) or bytearray(1)
    place = int(at * len(content))
    if how == "delete":
        file.unlink()
        return
    if how == "flip":
        content[place] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del content[place:]
    elif how == "insert":
        content[place:place] = rng.randbytes(rng.randint(1, 20))
    elif how == "overwrite":
        content[place : place + 50] = rng.randbytes(50)
    elif how == "digit":
        for i in [i for i, byte in enumerate(content) if chr(byte).isdigit()][rng.randrange(9) :][:1]:
            content[i] = ord(str(rng.randrange(10)))
    else:
        others = {"empty": [b""], "nest": [b"[" * 100_000], "text": [b"{}", b"[]", b"null", b"NaN", b"\xff\xfe"]}
        content = bytearray(rng.choice(others[how]))
    file.write_bytes(content)


@functools.cache
def _built() -> tuple[torch.nn.Module, Program]:
    """Return a model whose twins are packed, and a program, which lasts longer than what Dynamo keeps."""
    torch._dynamo.reset()
    model = make("llama", layers=2)
    options = {"kernels": "eager", "quantizer": "rtn", "group_size": 32, "exit_depth": 1}
    model.compile(backend=river, options=options)
    decode(model, new_cache(model, "static"), [1])
    return model, executors_of(model)[-1].program


@functools.cache
def _twins_contents() -> tuple[list, dict[str, torch.Tensor]]:
    with tempfile.TemporaryDirectory() as folder:
        saved = TwinFile(river_compile.save_twins(_built()[0], Path(folder) / "twins"))
    return saved._matrices, saved._tensors


def _read_twins(folder: Path) -> None:
    """Open it; nothing that opens may hold other matrices than those that were saved."""
    saved = TwinFile(folder / "twins")
    matrices, tensors = _twins_contents()
    same = saved._matrices == matrices and saved._tensors.keys() == tensors.keys()
    if not same or not all(torch.equal(saved._tensors[name], tensors[name]) for name in tensors):
        raise Failure("damaged twins were taken for whole")


@contextmanager
def _cache(folder: Path) -> Iterator[None]:
    """Put river_compile's cache into a folder, and what is known of kernels out of mind."""
    loader.load_for.cache_clear()
    with (
        mock.patch.dict(os.environ, RIVER_COMPILE_HOME=str(folder)),
        mock.patch.object(sys, "dont_write_bytecode", False),
    ):
        try:
            yield
        finally:
            loader.load_for.cache_clear()


def _use_kernel(folder: Path) -> None:
    """Load a generated kernel and run it: hidden = residual + update, and the least cosine to `previous`."""
    generator = torch.Generator().manual_seed(0)
    update, residual, previous = (torch.randn(2, 48, generator=generator) for _ in range(3))
    hidden, score = torch.empty(2, 48), torch.empty(1)
    with _cache(folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*was damaged and is rebuilt")
        kernel = loader.load(SPEC, interpret=True)
        kernel(update=update, residual=residual, previous=previous, hidden=hidden, score=score)
    expected = torch.cosine_similarity(residual + update, previous).min()
    if not torch.equal(hidden, residual + update) or not torch.allclose(score, expected, atol=1e-5):
        raise Failure("a damaged kernel computes something else")


def _read_tiles(folder: Path) -> None:
    """A tile changes speed alone, so any that a kernel can have will do."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Cannot read the tuning file")
        tiles = read_table(folder / "tuning.json").get(tuning_key(DEVICE), {}).get(form_key(LINEAR), {})
    found = tiles.get((LINEAR.out_features, LINEAR.in_features))
    if found is not None:
        dataclasses.replace(LINEAR, tile=LinearTile(*found))


def _calibration() -> ExitRule:
    rule = Candidate(0.5, 2, kl=0.1, agreement=0.9, loss=0.1, mean_depth=3.0, cost=0.5, texts=4, passed=True)
    return ExitRule("kl", 0.1, 0.9, 5.0, 4, 0.01, rule, (rule,), {"criterion": "similarity"})


def _read_calibration(folder: Path) -> None:
    """What loads is what was saved."""
    if ExitRule.load(folder / "calibration.json") != _calibration():
        raise Failure("a damaged exit rule was taken for whole")


@functools.cache
def program() -> tuple[bytes, list[str]]:
    """Return a program as the compile cache has it, and what its segments are."""
    built = _built()[1]
    return codec.dumps(built), [segment.code.fingerprint.digest for segment in built.segments]


@contextmanager
def _entry(folder: Path) -> Iterator[Entry]:
    """An entry of a compile cache in a folder."""
    with mock.patch.dict(os.environ, RIVER_COMPILE_CACHE_DIR=str(folder)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is damaged and is rebuilt")
        yield Entry("entry")


def _write_program(folder: Path) -> None:
    with _entry(folder) as entry:
        entry.write("a.pass", program()[0])


def _read_program(folder: Path) -> None:
    """What is read is what was written, or there is nothing."""
    with _entry(folder) as entry:
        content = entry.read("a.pass")
    if content is None:
        return
    if [segment.code.fingerprint.digest for segment in codec.loads(content).segments] != program()[1]:
        raise Failure("a damaged program was taken for whole")


STORED = {
    "program": Stored(_write_program, _read_program, "entry/a.pass"),
    "twins": Stored(
        lambda folder: river_compile.save_twins(_built()[0], folder / "twins"), _read_twins, f"twins/{FILE}"
    ),
    "kernel": Stored(_use_kernel, _use_kernel, "kernels/**/*.py*"),
    "tiles": Stored(lambda folder: tune.save(folder / "tuning.json", DEVICE, [LINEAR]), _read_tiles, "tuning.json"),
    "calibration": Stored(
        lambda folder: _calibration().save(folder / "calibration.json"), _read_calibration, "calibration.json"
    ),
}
