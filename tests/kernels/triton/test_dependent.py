"""Launches that start before the kernel in front of them has ended: what may stand before the wait, and what does.

Compiled for sm_90 (no GPU): the text and the machine code touch no memory before they wait, on every path. Interpreted:
what is asked for meanwhile lies in the parameters and is what the first steps read; nothing else changes.
"""

from __future__ import annotations

import dataclasses
import json
import re

import numpy
import pytest
import torch

from river_compile.kernels import ops  # noqa: F401  (registers torch.ops.river)
from river_compile.kernels.triton import launch
from river_compile.kernels.triton.decode_attention import DecodeAttentionSpec
from river_compile.kernels.triton.devices import starts_early
from river_compile.kernels.triton.exit_score import ExitScoreSpec
from river_compile.kernels.triton.heuristic import best_tile, tuned_for, tuning_key, untiled
from river_compile.kernels.triton.kv_fill import KvFillSpec
from river_compile.kernels.triton.linear import ASKED_BYTES, LinearSpec, LinearTile
from river_compile.kernels.triton.loader import compile_for, load_for
from river_compile.kernels.triton.shift import ShiftSpec
from river_compile.kernels.triton.spec import every_sector, render
from tests.kernels import checks
from tests.kernels.packing import pack_linear
from tests.support.examples import slow_but
from tools.kernels.machine_code import cuobjdump

DENSE = {"weights": "dense", "group_size": 0}
FILL = KvFillSpec(2, 6, 2, 96, 500, rotary_dim=48, rotary_rows=2, head_norm="rms")
MEMORY = re.compile(r"\b(ld|st|atom|red|cp)\.(?!param)|\bcp\.async")
ACCESS = re.compile(r"\b(LD|ST|LDG|STG|LDGSTS|ATOM|ATOMG|RED)\b")

#: Every family, and of the products every form.
SPECS = {
    "groups": best_tile(untiled(1, 2048, 3072, norm="rms", dependent=True)),
    "groups, rows": best_tile(untiled(5, 1000, 300, norm="layer", norm_bias=True, gated=True, dependent=True)),
    "groups, split": LinearSpec(1, 1000, 300, LinearTile(16, 256, 8, split_k=3), group_size=128, dependent=True),
    "row": best_tile(untiled(1, 1000, 300, group_size=32, norm="rms", dependent=True)),
    "dot": best_tile(untiled(4, 1000, 300, group_size=32, residual=True, dependent=True)),
    "row, 16 bits": best_tile(untiled(1, 1000, 300, norm="rms", **DENSE, dependent=True)),
    "merged": best_tile(untiled(1, 1024, 512, matrices=(256, 128, 128), bias=True, **DENSE, dependent=True)),
    "merged, rows": best_tile(untiled(4, 1024, 512, matrices=(512, 512), gated=True, **DENSE, dependent=True)),
    "experts": best_tile(untiled(8, 768, 2048, experts=16, dependent=True)),
    "experts, sorted": best_tile(untiled(64, 768, 2048, experts=16, dependent=True)),
    "kv_fill": dataclasses.replace(FILL, dependent=True),
    "attention": DecodeAttentionSpec(2, 6, 2, 96, 500, 0.1, mask=True, splits=3, dependent=True),
    "attend": DecodeAttentionSpec(
        *(2, 6, 2, 96, 500, 0.1),
        **{"mask": True, "splits": 3, "advance": True, "dependent": True},
        fill=dataclasses.replace(FILL, dependent=True),
    ),
    "exit score": ExitScoreSpec(2, 576, dependent=True),
    "verdict": ExitScoreSpec(2, 576, dependent=True, decides=True),
    "shift": ShiftSpec(2, 6, 2, 96, 500, dependent=True),
}


def ordinary(spec):
    """The same kernel without the early start."""
    inner = {"fill": ordinary(spec.fill)} if getattr(spec, "fill", None) else {}
    return dataclasses.replace(spec, dependent=False, **inner)


@pytest.mark.parametrize("name", slow_but(("groups", "attend", "verdict"), SPECS))
def test_nothing_is_read_or_written_before_the_wait(name):
    """In the text, and in the machine code, where the assembler may have moved something; no path leaves before."""
    for compiled in compile_for(SPECS[name], "cuda", 90):
        assert compiled.metadata.launch_pdl
        before, waits, after = compiled.asm["ptx"].partition("griddepcontrol.wait")
        assert waits
        assert "griddepcontrol" not in after
        assert before.count("griddepcontrol.launch_dependents") == 1
        assert not MEMORY.search(before)
        assert MEMORY.search(after)
        assert not re.search(r"^\s*(@\S+\s+)?(ret|exit|bra)\b", before, re.MULTILINE)
        assert not before.rpartition("\n")[2].strip()  # no predicate
        code = cuobjdump(compiled.asm["cubin"], "-sass")
        before, waits, after = code.partition("ACQBULK")
        assert waits
        assert not ACCESS.search(before)
        assert ACCESS.search(after)
        assert not re.search(r"\b(EXIT|BRA)\b", before)
        assert "CCTL.E.PF2" not in after


@pytest.mark.parametrize("name", SPECS)
def test_an_ordinary_launch_has_nothing_of_it(name):
    """What follows the wait is the ordinary kernel, word for word."""
    early, plain = render(SPECS[name]), render(ordinary(SPECS[name]))
    assert not re.search(r"\bfollow\(|fetch|gdc", plain)
    bodies = [text.partition("\n\n\n")[0].rstrip() for text in early.split("    follow()\n")[1:]]
    assert len(bodies) == len(SPECS[name].stages())
    assert all(body in plain for body in bodies)


def test_ordinary_kernels_compile_as_they_did():
    (compiled,) = compile_for(ordinary(SPECS["groups"]), "cuda", 90)
    assert not compiled.metadata.launch_pdl
    assert "griddepcontrol" not in compiled.asm["ptx"]
    assert "prefetch" not in compiled.asm["ptx"]


class Watched:
    """`triton.language` as an interpreted kernel sees it; notes the sectors of 32 bytes that each load reads."""

    def __init__(self, language, events):
        self._language, self._events = language, events

    def __getattr__(self, name):
        return getattr(self._language, name)

    def load(self, pointer, mask=None, **options):
        addresses = pointer.handle.data.reshape(-1)
        if mask is not None:
            addresses = numpy.broadcast_to(
                pointer.handle.data, numpy.broadcast(pointer.handle.data, mask.handle.data).shape
            )
            addresses = addresses[numpy.broadcast_to(mask.handle.data, addresses.shape)]
        self._events.append(("load", set((addresses // 32).reshape(-1).tolist())))
        return self._language.load(pointer, mask=mask, **options)


def events_of(spec, monkeypatch, **tensors):
    """Runs a kernel in the interpreter; returns what it called in order, with the sectors that this touches."""
    kernel, events = load_for(spec, "interpreter"), []
    for function in kernel.functions.values():
        names = function.fn.__globals__
        monkeypatch.setitem(
            names, "fetch", lambda p: events.append(("fetch", set((p.handle.data // 32).reshape(-1).tolist())))
        )
        monkeypatch.setitem(names, "follow", lambda: events.append(("follow", set())))
        monkeypatch.setitem(names, "tl", Watched(names["tl"], events))
    kernel(**tensors)
    return events


def sectors(tensor):
    start = tensor.data_ptr()
    return set(range(start // 32, (start + tensor.numel() * tensor.element_size() - 1) // 32 + 1))


@pytest.mark.parametrize(
    "spec",
    [
        LinearSpec(1, 1024, 100, LinearTile(16, 128, 8, num_stages=3), norm="rms", dependent=True),
        LinearSpec(2, 1000, 40, LinearTile(16, 256, 8), norm="layer", norm_bias=True, gated=True, dependent=True),
        LinearSpec(1, 1000, 40, LinearTile(16, 128, 8, split_k=3), dependent=True),
        LinearSpec(1, 1000, 40, LinearTile(2, 512), group_size=32, norm="rms", dependent=True),
        LinearSpec(3, 1000, 40, LinearTile(16, 128, 16), group_size=32, dtype="float32", dependent=True),
        LinearSpec(1, 1001, 40, LinearTile(4, 512), **DENSE, norm="rms", dependent=True),
        LinearSpec(1, 4096, 40, LinearTile(8, 4096), **DENSE, dependent=True),
    ],
)
def test_what_is_asked_for_are_the_first_weights(spec, monkeypatch):
    """Each program waits once, before it loads anything; it asks for what its first step reads, and for no more memory
    than it may; all together ask for all of a norm's parameters, and for nothing but parameters."""
    tensors = {name: torch.zeros(b.shape, dtype=getattr(torch, b.dtype)) for name, b in spec.buffers().items()}
    events = events_of(spec, monkeypatch, **tensors)
    weight = sectors(tensors["qweight" if spec.weights == "w4" else "weight"])
    stage, programs = spec.stages()[0], []
    for kind, touched in events:
        if kind == "fetch" and (not programs or "follow" in programs[-1]):
            programs.append({"asked": set(), "first": []})
        if kind == "fetch":
            programs[-1]["asked"] |= touched
        elif kind == "follow" and len(programs) < numpy.prod(stage.grid(1)) + 1:
            programs[-1]["follow"] = True
        elif kind == "load" and touched & weight and len(programs[-1]["first"]) < len(spec.streams):
            programs[-1]["first"].append(touched)
    assert len(programs) == numpy.prod(stage.grid(1))
    read = set().union(*(touched for kind, touched in events if kind == "load"))
    parameters = set().union(*(sectors(t) for name, t in tensors.items() if name not in ("x", "y", "partial")))
    for program in programs:
        assert program["follow"]
        assert program["asked"] <= parameters & read
        assert len(program["asked"] & weight) <= ASKED_BYTES // 32 + spec.tile.block_n
        needed = set().union(*program["first"])
        assert needed <= program["asked"] or len(needed) * 32 > ASKED_BYTES
    asked = set().union(*(program["asked"] for program in programs))
    for name in ("norm_weight", "norm_bias"):
        assert name not in tensors or sectors(tensors[name]) <= asked


def test_offsets_meet_every_sector_and_stay_inside():
    language = type("Language", (), {"arange": staticmethod(numpy.arange), "minimum": staticmethod(numpy.minimum)})
    for length in (1, 3, 8, 9, 16, 64, 100):
        for start in range(8):
            offsets = eval(every_sector(length, "int32", aligned=start == 0), {"tl": language})
            assert {(start + o) // 8 for o in offsets} == set(range(start // 8, (start + length - 1) // 8 + 1))
            assert max(offsets) < length


@pytest.mark.parametrize("slot", [3, 40])
def test_the_interpreter_s_results_are_those_of_the_ordinary_kernels(slot):
    for spec in (
        LinearSpec(1, 200, 50, LinearTile(16, 128, 8), norm="rms", gated=True, dependent=True),
        LinearSpec(1, 200, 50, LinearTile(16, 64, 8, split_k=2), bias=True, dependent=True),
        LinearSpec(3, 200, 48, LinearTile(16, 128, 16), **DENSE, matrices=(32, 16), dependent=True),
    ):
        checks.check_linear(spec, spec.rows)
    checks.check_experts(LinearSpec(3, 200, 50, LinearTile(16, 64, 8), experts=4, dependent=True), [1, 3, 9])
    fill = KvFillSpec(1, 4, 2, 24, 40, rotary_dim=24, head_norm="rms", dependent=True)
    checks.check_kv_fill(fill, slot)
    attend = DecodeAttentionSpec(1, 4, 2, 24, 40, 0.2, splits=2, mask=True, dependent=True)
    checks.check_attention(attend, padding=5)
    checks.check_attend(dataclasses.replace(attend, fill=fill, advance=True), slot)
    checks.check_exit_score(ExitScoreSpec(2, 48, "float32", dependent=True), 1.0)


def test_other_gpus_have_no_early_start():
    assert [starts_early(name) for name in ("sm_90", "sm_100", "sm_120", "sm_89", "gfx942")] == [True] * 3 + [False] * 2
    for backend, arch, words in (("cuda", 80, "not cuda 80"), ("hip", "gfx942", "not hip gfx942")):
        with pytest.raises(ValueError, match=f"dependent=True needs an NVIDIA GPU from sm_90 on, {words}"):
            compile_for(SPECS["groups"], backend, arch)
    with pytest.raises(ValueError, match="for NVIDIA's GPUs"):
        load_for(SPECS["groups"], "hip")


def test_operators_refuse_where_there_is_no_early_start(monkeypatch):
    """On the CPU, and on an older card; what was called without before does not change that."""
    packed, x = pack_linear(torch.randn(32, 64), 32, "triton", "rtn"), torch.randn(1, 64)
    call = (x, packed.qweight, packed.scale_zero, None, 32, 32, "triton")
    torch.ops.river.linear(*call)
    stack = pack_linear(torch.randn(64, 64), 32, "triton", "rtn")
    cache, states = torch.zeros(1, 1, 8, 16), torch.randn(1, 16)
    for run in (
        lambda: torch.ops.river.linear(*call, dependent=True),
        lambda: torch.ops.river.merged(x, [torch.randn(16, 64), torch.randn(16, 64)], [], dependent=True),
        lambda: torch.ops.river.experts(
            x, stack.qweight[None], stack.scale_zero[None], torch.tensor([0]), 64, 32, "triton", dependent=True
        ),
        lambda: torch.ops.river.kv_fill(
            *(torch.randn(1, 48), None, None, None, None, torch.tensor([0]), cache, cache.clone(), "none", 1e-6, False),
            dependent=True,
        ),
        lambda: torch.ops.river.decode_attention(
            torch.randn(1, 1, 16), cache, cache.clone(), None, 1.0, 0.0, dependent=True
        ),
        lambda: torch.ops.river.residual_score(states, states, states, dependent=True),
        lambda: torch.ops.river.residual_verdict(
            *(states, states, states, torch.zeros(1, dtype=torch.float64), torch.zeros(4)), dependent=True
        ),
        lambda: torch.ops.river.shift(cache, cache.clone(), dependent=True),
    ):
        with pytest.raises(ValueError, match="dependent=True needs an NVIDIA GPU from sm_90 on, not tensors on cpu"):
            run()
    monkeypatch.setattr(launch, "device_of", lambda tensor: "sm_89")
    with pytest.raises(ValueError, match="not sm_89"):
        launch.may_start_early(True, type("OnCard", (), {"is_cuda": True})())


def test_a_tile_measured_for_early_starts_goes_before_one_for_any(tmp_path, monkeypatch):
    early, tiles = (
        untiled(1, 256, 256, dependent=True),
        [LinearTile(16, 64, 8, 2, 1, 1), LinearTile(16, 64, 8, 1, 2, 1)],
    )
    plain = dataclasses.replace(early, dependent=False)
    path = tmp_path / "tuning.json"
    monkeypatch.setenv("RIVER_COMPILE_TUNING", str(path))
    saved = {tuning_key(spec): dataclasses.asdict(tile) for spec, tile in zip((early, plain), tiles, strict=True)}
    assert len(saved) == 2
    path.write_text(json.dumps({tuned_for("sm_90"): saved}))
    assert [best_tile(spec).tile for spec in (early, plain)] == tiles
    path = tmp_path / "other.json"
    monkeypatch.setenv("RIVER_COMPILE_TUNING", str(path))
    path.write_text(json.dumps({tuned_for("sm_90"): {tuning_key(plain): dataclasses.asdict(tiles[1])}}))
    assert [best_tile(spec).tile for spec in (early, plain)] == tiles[1:] * 2
