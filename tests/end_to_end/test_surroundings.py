"""A separate process in the surroundings that users have: caches, compilers, locales, folders, terminals."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.support.layout import ROOT
from tests.support.tokenizers import save_tiny_llama

GENERATES = """
import json, sys, warnings
import torch
import river_compile
from torch._dynamo.utils import counters
from tests.support.families import make, prompt

ids = prompt(9)
options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
expected = make("llama", layers=2).generate(ids, **options)
model = river_compile.accelerate(make("llama", layers=2), quantizer="rtn", group_size=32)
with warnings.catch_warnings(record=True) as said, river_compile.trace() as trace:
    warnings.simplefilter("always")
    text = model.generate(ids, **options)
json.dump({
    "same": torch.equal(text, expected),
    "cycles": len(trace.cycles),
    "traced": counters["stats"]["unique_graphs"],
    "said": [str(w.message) for w in said if issubclass(w.category, river_compile.RiverWarning)],
}, sys.stdout)
"""


def run(*arguments: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Runs Python with these variables, None for one that is not set."""
    known = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    given = {name: value for name, value in known.items() if value is not None}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=given, capture_output=True, text=True)


def generates(**environment: str | None) -> dict:
    done = run("-c", GENERATES, **environment)
    assert done.returncode == 0, done.stderr
    found: dict = json.loads(done.stdout)
    assert found["same"]
    return found


@pytest.mark.slow
def test_a_second_process_traces_nothing(tmp_path):
    """It reads programs before anything else has loaded the kernels that they call."""
    first, second = (generates(RIVER_COMPILE_CACHE_DIR=str(tmp_path)) for _ in range(2))
    assert first["traced"] > 0
    assert second["traced"] == 0
    for found in (first, second):
        assert found["cycles"] > 0
        assert found["said"] == []


@pytest.mark.slow
def test_without_a_compiler_generation_is_plain(tmp_path):
    found = generates(CXX="/no/such", RIVER_COMPILE_HOME=str(tmp_path))
    assert found["cycles"] == 0
    (said,) = found["said"]
    assert "No C++ compiler works here (tried /no/such)" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "surroundings",
    [
        {"HOME": None, "RIVER_COMPILE_HOME": None},
        {"HOME": "{folder}/not/there", "RIVER_COMPILE_HOME": None},
        {"RIVER_COMPILE_HOME": "{folder}/w\u00e4rm und k\u00fchl"},
        {"RIVER_COMPILE_HOME": "{folder}/w\u00e4rm und k\u00fchl", "LC_ALL": "C", "LANG": "C"},
        {"TMPDIR": "{folder}/t\u00e4mp dir", "RIVER_COMPILE_HOME": "{folder}/home"},
    ],
    ids=["no home", "a home that is not there", "umlauts and spaces", "the C locale", "a temporary folder"],
)
def test_folders_and_locales(surroundings, tmp_path):
    """Kernels, twins and programs are built and found again there."""
    environment = {name: value and value.format(folder=tmp_path) for name, value in surroundings.items()}
    if "TMPDIR" in environment:
        Path(str(environment["TMPDIR"])).mkdir()
    for _ in range(2):
        found = generates(RIVER_COMPILE_CACHE_DIR=None, **environment)
        assert found["cycles"] > 0
        assert found["said"] == []
    assert found["traced"] == 0


@pytest.mark.slow
def test_a_narrow_terminal_without_colors(tmp_path):
    """Tables wrap and lose nothing; with NO_COLOR no escape code is written, even to a terminal."""
    folder = save_tiny_llama(tmp_path / "tiny")
    wide, narrow = (
        run("-m", "river_compile", "check", folder, COLUMNS=columns, FORCE_COLOR="1", NO_COLOR="1").stdout
        for columns in ("200", "40")
    )
    assert "\x1b[3" not in wide + narrow
    wide, narrow = (re.sub(r"\x1b\[\d*m", "", text) for text in (wide, narrow))
    assert max(map(len, narrow.splitlines())) <= 40
    # (Measured numbers differ, and cells that wrap leave their line.)
    assert Counter(re.sub(r"[\s\d.]", "", narrow)) == Counter(re.sub(r"[\s\d.]", "", wide))


NOTEBOOK = """
import gc
import torch
import transformers
import river_compile
from tests.support.families import COMMON, prompt

CELL = '''
class Mine(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)
'''
config = transformers.LlamaConfig(**COMMON, num_hidden_layers=2)
ids, held, TENSORS = prompt(9), [], (torch.Tensor, torch.nn.Parameter)
options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
for _ in range(10):
    exec(CELL)
    model = Mine(config).eval()
    expected = model.generate(ids, **options)
    river_compile.accelerate(model, quantizer="rtn", group_size=32)
    assert torch.equal(model.generate(ids, **options), expected)
    assert river_compile.report(model).decode_depths
    del model
    gc.collect()
    # (Dynamo keeps metadata of what it traced, as for any compiled class.)
    held.append(sum(x.nbytes for x in gc.get_objects() if type(x) in TENSORS and x.device.type == "cpu"))
assert held[-1] <= held[2], held
"""


@pytest.mark.slow
def test_a_notebook_that_defines_a_model_ten_times_holds_one(tmp_path):
    done = run("-c", NOTEBOOK, RIVER_COMPILE_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
