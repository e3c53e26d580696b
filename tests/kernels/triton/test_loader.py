"""Sources: one spec, one text, one file; damage, races, and interpreter or compiler per load."""

import dataclasses
import itertools
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from river_compile.kernels.checks import check_positive
from river_compile.kernels.triton import loader
from river_compile.kernels.triton.cache import ExitScoreSpec
from river_compile.kernels.triton.linear import NORMS, LinearSpec, LinearTile
from river_compile.kernels.triton.spec import render
from river_compile.kernels.triton.tiles import read_table, tuning_file
from tests.support.layout import ROOT, run_python

SPEC = ExitScoreSpec(2, 48, "float32")


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RIVER_COMPILE_HOME", str(tmp_path))
    loader.load_for.cache_clear()
    yield tmp_path / "kernels"
    loader.load_for.cache_clear()


def test_the_file_is_written_once_and_leaves_nothing_beside_it(empty_cache):
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(lambda _: loader.source_file(SPEC), range(32)))
    assert paths == set(empty_cache.iterdir())
    written = paths.pop().stat().st_mtime_ns
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loader.source_file(SPEC).stat().st_mtime_ns == written


@pytest.mark.parametrize("damage", [b"", b"import triton\n", b"\xff\xfe\x00"])
def test_a_damaged_file_is_rebuilt_with_a_warning(empty_cache, damage):
    path = loader.source_file(SPEC)
    path.write_bytes(damage)
    with pytest.warns(UserWarning, match="damaged and is rebuilt"):
        loader.source_file(SPEC)
    assert path.read_text() == render(SPEC)


def test_where_the_cache_cannot_be_written_a_kernel_is_written_for_the_process(monkeypatch):
    """Without tuned tiles."""
    monkeypatch.setenv("RIVER_COMPILE_HOME", f"{__file__}/cache")
    with pytest.warns(UserWarning, match="^RC104: Cannot write.*set RIVER_COMPILE_HOME"):
        assert loader.source_file(SPEC).read_text() == render(SPEC)
    assert read_table(tuning_file()) == {}


def test_interpreter_and_compiler_are_chosen_per_load():
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    interpreted, compiled = (loader.load(SPEC, interpret=mode) for mode in (True, False))
    assert isinstance(interpreted.functions["exit_score"], InterpretedFunction)
    assert isinstance(compiled.functions["exit_score"], JITFunction)
    assert loader.load(dataclasses.replace(SPEC), interpret=True) is interpreted


def test_compiling_works_after_interpreting():
    """Triton's interpreter patches the language while it runs."""
    buffers = {name: torch.ones(2, 48) for name in ("update", "residual", "previous", "hidden")}
    loader.load(SPEC, interpret=True)(**buffers, score=torch.zeros(1))
    (compiled,) = loader.compile_for(SPEC, "cuda", 90)
    assert "cubin" in compiled.asm


def test_buffers_are_checked_before_a_launch():
    kernel = loader.load(SPEC, interpret=True)
    with pytest.raises(ValueError, match=r"missing buffers .*'hidden'.* unknown buffers \['other'\]"):
        kernel(other=torch.zeros(1))
    buffers = {name: torch.zeros(2, 48) for name in SPEC.stages()[0].arguments}
    with pytest.raises(ValueError, match="score has dtype bfloat16, its spec says float32"):
        kernel(**{**buffers, "score": torch.zeros(1, dtype=torch.bfloat16)})
    compiled = loader.load(SPEC, interpret=False)
    with pytest.raises(ValueError, match="is on cpu, the kernel runs on a GPU"):
        compiled(**buffers)


def test_what_a_spec_does_not_need_is_not_in_the_text():
    """Mask, norm, bias, residual and second launch."""
    plain = render(LinearSpec(1, 576, 64, LinearTile(8, 64), dtype="float32"))
    parts = ("mask=", "norm_weight", "bias_ptr", "residual_ptr", "partial_ptr", "tl.exp", "int64")
    assert [part for part in parts if part in plain] == []
    full = {"norm": "rms", "bias": True, "residual": True, "activation": "silu"}
    one, split = (
        render(LinearSpec(1, 1000, 2**25 + 1, LinearTile(16, 64, 8), **full)),
        render(LinearSpec(1, 576, 64, LinearTile(16, 64, 8, split_k=3))),
    )
    assert [part for part in parts if part not in one + split] == []


def test_sources_are_programs_and_two_specs_are_two_texts():
    texts = set()
    for rows, tile in ((1, LinearTile(16, 64, 8)), (3, LinearTile(16, 128, 16)), (None, LinearTile(16, 128, 16))):
        for gated, norm in itertools.product((False, True), NORMS):
            text = render(LinearSpec(rows, 576, 64, tile, gated=gated, norm=norm))
            compile(text, "generated", "exec")
            texts.add(text.split('"""', 2)[2])
    assert len(texts) == 3 * 2 * len(NORMS)


def test_costs_of_open_rows_ask_for_the_rows():
    spec = LinearSpec(None, 256, 64, LinearTile(16, 128, 16))
    with pytest.raises(ValueError, match="any number of rows"):
        spec.cost()
    # 64 x 256 weights: half a byte each and 4 bytes per group of 64; x and y in 16 bits.
    assert spec.cost(20).bytes == 64 * 256 // 2 + 64 * 4 * 4 + 20 * (256 + 64) * 2
    assert spec.cost(20).flops == 2 * 20 * 64 * 256


def test_positive_means_a_positive_integer():
    for value in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="size="):
            check_positive(size=value)


def test_another_process_writes_the_same_text_and_operators_and_texts_need_no_triton(tmp_path):
    program = """
import sys
sys.modules["triton"] = None
import river_compile.kernels
assert "torch" not in sys.modules and "jinja2" not in sys.modules
from river_compile.kernels.triton.cache import ExitScoreSpec
from river_compile.kernels.triton.spec import render
print(render(ExitScoreSpec(2, 48, "float32")))
import river_compile.kernels.ops, torch
x = torch.empty(1, 64, device="meta")
w, s = torch.empty(8, 8, dtype=torch.int32, device="meta"), torch.empty(8, 1, 2, device="meta")
print(torch.ops.river.linear(x, w, s, None, 8, 64, "triton").shape, end="")
"""
    done = run_python(program, tmp_path, ROOT)
    assert done.stdout == f"{render(SPEC)}\ntorch.Size([1, 8])"
    assert done.stderr == ""


def test_no_bytecode_is_kept_that_a_later_start_would_trust(empty_cache, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    loader.load(SPEC, interpret=True)
    assert [path.suffix for path in empty_cache.rglob("*.py*")] == [".py"]


def test_a_file_that_goes_away_between_two_looks_is_written(empty_cache, monkeypatch):
    """The cache folder may be emptied at any time."""
    path = loader.source_file(SPEC)
    monkeypatch.setattr(Path, "exists", lambda _: True)
    path.unlink()
    assert loader.source_file(SPEC).read_text() == render(SPEC)
