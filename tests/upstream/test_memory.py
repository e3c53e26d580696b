"""Memory that lies in a file: given back to the system, and read again as if nothing had happened."""

from __future__ import annotations

import ctypes
import mmap
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

import river_compile
from river_compile.system import advise_pageout
from tests.support.lowerings import OPERATORS
from tests.support.tokenizers import save_tiny_llama

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="for Linux")


def resident(path) -> int:
    """Bytes of a mapped file that this process holds."""
    held, of_file = 0, False
    with open("/proc/self/smaps", encoding="utf-8") as lines:
        for line in lines:
            if "-" in line.split(" ", 1)[0] and ":" not in line.split(" ", 1)[0]:
                of_file = str(path) in line
            elif of_file and line.startswith("Rss:"):
                held += 1024 * int(line.split()[1])
    return held


@pytest.fixture
def mapped(tmp_path):
    """A file, and a tensor of 4 MB that is mapped from it."""
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.randn(1024, 1024)}, path)
    with safe_open(path, framework="pt") as file:
        return path, file.get_tensor("weight")


def test_what_a_file_holds_leaves_the_process_and_comes_back(mapped):
    path, weight = mapped
    before = weight.clone()
    assert resident(path) >= weight.nbytes
    assert advise_pageout([weight]) == weight.nbytes
    assert resident(path) < weight.nbytes / 2
    assert torch.equal(weight, before)


@pytest.mark.parametrize("changed", [slice(None), (5, 7)], ids=["all pages", "one page"])
def test_what_was_changed_stays_changed(mapped, changed):
    """Dropping a private mapping's pages would undo it."""
    _, weight = mapped
    weight[changed] = 42.0
    expected = weight.clone()
    advise_pageout([weight])
    assert torch.equal(weight, expected)


def test_pages_stay_in_the_systems_cache(mapped):
    """The next process, which hashes the weights, need not wait for the disk."""
    path, weight = mapped
    advise_pageout([weight])
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        pages = -(-len(content) // mmap.PAGESIZE)
        resident_pages = (ctypes.c_ubyte * pages)()
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        at = libc.mmap(None, len(content), mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
        assert libc.mincore(ctypes.c_void_p(at), ctypes.c_size_t(len(content)), resident_pages) == 0
        libc.munmap(ctypes.c_void_p(at), ctypes.c_size_t(len(content)))
    assert sum(flag & 1 for flag in resident_pages) > 0.9 * pages


def test_what_no_file_holds_stays():
    weight = torch.randn(1024, 1024)
    expected = weight.clone()
    assert advise_pageout([weight]) == 0
    assert torch.equal(weight, expected)


def generated(folder, **options):
    model = LlamaForCausalLM.from_pretrained(folder)
    river_compile.accelerate(model, "fast", exit_depth=0, kernels=OPERATORS, compile_cache=False, **options)
    ids = torch.tensor([[5, 6, 7]])
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    report = river_compile.report(model)
    return str(report), sum(graph["given_back_bytes"] for graph in report.to_dict()["graphs"])


def test_layers_that_no_token_runs_leave_the_process(tmp_path):
    """With prompts through the twins too, nothing reads the blocks' own weights any more."""
    folder = save_tiny_llama(tmp_path)
    _, none = generated(folder)
    text, some = generated(folder, prefill="exit")
    blocks = LlamaForCausalLM.from_pretrained(folder).model.layers
    linears = sum(p.nbytes for p in blocks.parameters() if p.dim() == 2)
    assert none == 0
    assert some >= linears
    assert "MB of parameters, which lie in their file alone" in text
