"""A model that is accelerated and restored again and again writes the same text and leaves nothing behind."""

from __future__ import annotations

import gc
import os
import threading
import time
from pathlib import Path

import pytest
import torch

import river_compile
from river_compile.system import trim_heap
from river_compile.twins import pack
from tests.support.families import make, prompt

OPTIONS = {"group_size": 32, "quantizer": "rtn"}
BATCHED = {"max_num_seqs": 2}


def held() -> dict[str, int]:
    """Returns what a process holds: threads, open files, live tensors, and resident bytes."""
    gc.collect()
    trim_heap()
    process = Path("/proc/self")
    return {
        "threads": threading.active_count(),
        "tasks": len(os.listdir(process / "task")),
        "files": len(os.listdir(process / "fd")),
        "tensors": sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()),
        "bytes": int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
    }


def growth_since(before: dict[str, int]) -> dict[str, int]:
    after = held()
    return {name: after[name] - before[name] for name in after}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("way", "count"),
    [("exact", 5), *(pytest.param(way, 30, marks=pytest.mark.slow) for way in ("exact", "background", "batch"))],
)
def test_cycles_of_accelerate_and_restore(way, count, tmp_path, monkeypatch):
    """From the third cycle on; before it, modules are imported and the compile cache is filled."""
    monkeypatch.setenv("RIVER_COMPILE_CACHE_DIR", str(tmp_path / "cache"))
    if way == "background":
        monkeypatch.setattr(pack, "_SMALL", 0)
    model, ids = make("llama", layers=2), prompt(9)
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 16, "do_sample": False}
    expected = model.generate(ids, **arguments)
    for cycle in range(count):
        river_compile.accelerate(model, **OPTIONS)
        assert torch.equal(model.generate(ids, **arguments), expected)
        if way == "batch":
            with river_compile.ContinuousBatch(model, **BATCHED) as batch:
                assert torch.equal(batch.submit(lambda: model.generate(ids, **arguments)).result(), expected)
        river_compile.restore(model)
        assert torch.equal(model.generate(ids, **arguments), expected)
        if cycle == 2:
            before = held()
    grown = growth_since(before)
    for _ in range(50):  # (threads end a moment after what they worked for)
        if all(grown[name] <= 0 for name in grown if name != "bytes"):
            break
        time.sleep(0.1)
        grown = growth_since(before)
    growth_of_bytes = grown.pop("bytes")
    # Torch keeps the source of every graph that it compiles. Two cycles say nothing: the allocator moves by megabytes.
    assert count < 30 or growth_of_bytes < 16_000_000, grown
    # A batch's last state may be let go a cycle later; one state has dozens of tensors.
    assert grown.pop("tensors") < 3 * (count - 3)
    assert all(growth < count - 3 for growth in grown.values()), grown
