"""Facts and smoke of a GPU, without one: what is asked of torch and nvidia-smi, which warnings follow, what is kept."""

import json
import os
import subprocess
import types
from importlib import metadata

import pytest
import torch

from benchmarks import gpu_facts
from tools import check_gpu

GPU = {
    "device": "sm_90",
    "triton": "3.6.0",
    "triton_wanted": "3.6.0",
    "memory_free": 70 * 10**9,
    "mig": "Disabled",
    "others": [],
}


@pytest.fixture
def card(monkeypatch):
    """torch.cuda and nvidia-smi of an H100; what nvidia-smi says may be changed by a test."""
    said = {
        "driver_version": "580.65.06, Disabled, Enabled, 1980, 700.00",
        "clocks.sm": "1755, 2619, 41, 120.5, 0x0000000000000000",
        "--query-compute-apps": f"{os.getpid()}, 500\n4711, 1024",
    }

    def run(command, **_):
        assert command[0] == "nvidia-smi"
        assert command[-1] == "--id=0"
        key = next(key for key in said if key in command[1])
        if isinstance(said[key], Exception):
            raise said[key]
        return types.SimpleNamespace(stdout=said[key] + "\n")

    properties = types.SimpleNamespace(multi_processor_count=132, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (70 * 10**9, 80 * 10**9))
    monkeypatch.setattr(gpu_facts, "device_name", lambda index: "sm_90")
    monkeypatch.setattr(gpu_facts.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(gpu_facts.subprocess, "run", run)
    return said


def test_facts_name_card_driver_versions_and_neighbours(card):
    found = gpu_facts.facts()
    wanted = {"gpu": "NVIDIA H100 80GB HBM3", "device": "sm_90", "processors": 132, "driver": "580.65.06"}
    assert wanted.items() <= found.items()
    assert (found["mig"], found["max_sm_mhz"], found["power_limit_watts"]) == ("Disabled", "1980", "700.00")
    assert found["torch"] == metadata.version("torch")
    assert found["transformers"] == metadata.version("transformers")
    assert found["others"] == ["4711 (1024 MiB)"]  # and not this process
    assert gpu_facts.clocks() == {
        "sm_mhz": "1755",
        "memory_mhz": "2619",
        "celsius": "41",
        "watts": "120.5",
        "throttled": "0x0000000000000000",
    }


@pytest.mark.parametrize("trouble", [subprocess.CalledProcessError(6, "nvidia-smi"), "No devices were found"])
def test_an_nvidia_smi_that_refuses_leaves_gaps(card, trouble):
    card["clocks.sm"] = trouble
    assert set(gpu_facts.clocks().values()) == {None}


def test_without_nvidia_smi_there_are_gaps(card, monkeypatch):
    monkeypatch.setattr(gpu_facts.shutil, "which", lambda name: None)
    found = gpu_facts.facts()
    assert found["driver"] is None
    assert found["others"] == []


@pytest.mark.parametrize(
    ("fact", "doubt"),
    [
        ({}, None),
        ({"device": "sm_75"}, "sm_75 is not in the table of devices"),
        ({"triton": "3.9.0"}, "torch asks for triton 3.6.0, installed is 3.9.0"),
        ({"triton_wanted": None, "triton": "3.9.0"}, None),
        ({"memory_free": 10**9}, "1.0 GB of memory are free, 20.0 are needed"),
        ({"mig": "Enabled"}, "MIG is Enabled"),
        ({"mig": "[N/A]"}, None),
        ({"others": ["4711 (1024 MiB)"]}, "other processes use the card: 4711"),
    ],
)
def test_doubts(fact, doubt):
    found = gpu_facts.doubts(GPU | fact, need=20 * 10**9)
    assert len(found) == (doubt is not None)
    assert doubt is None or doubt in found[0]


def test_what_torch_pins_is_read_from_its_own_requirements(monkeypatch):
    wanted = ["filelock", 'triton==3.7.1; platform_system == "Linux"', "triton-windows==1"]
    monkeypatch.setattr(metadata, "requires", lambda package: wanted)
    assert gpu_facts.pinned("torch", "triton") == "3.7.1"
    assert gpu_facts.pinned("torch", "filelock") is None
    monkeypatch.undo()
    assert gpu_facts.pinned("no-such-package", "triton") is None


def test_a_check_that_fails_is_named_and_the_next_begins(capsys):
    kept = []

    def fail():
        assert kept == [{**kept[0], "check": "first", "state": "ok"}]
        raise RuntimeError("no ptxas\nand more")

    named = {"first": lambda: "fine", "second": fail, "third": lambda: "fine too"}
    assert check_gpu.run(named, kept.append) == 1
    assert [(row["state"], row["text"]) for row in kept] == [
        ("ok", "fine"),
        ("FAILED", "RuntimeError: no ptxas"),
        ("ok", "fine too"),
    ]
    printed = capsys.readouterr()
    assert "FAILED  second" in printed.out
    assert "Traceback" in printed.err


def test_facts_and_outcomes_are_written_one_by_one(card, monkeypatch, tmp_path, capsys):
    file = tmp_path / "facts.json"

    def checks(model):
        assert model == "llama-3.2-1b"
        return {"a": lambda: "", "b": lambda: str(len(json.loads(file.read_text())["checks"]))}

    monkeypatch.setattr(check_gpu, "checks", checks)
    assert check_gpu.main(["--json", str(file), "--model", "llama-3.2-1b"]) == 0
    found = json.loads(file.read_text())
    assert [row["text"] for row in found["checks"]] == ["", "1"]
    assert found["facts"]["gpu"] == "NVIDIA H100 80GB HBM3"
    assert found["facts"]["clocks"]["sm_mhz"] == "1755"
    printed = capsys.readouterr().out
    assert "doubt: other processes use the card: 4711 (1024 MiB)" in printed
    assert "driver             580.65.06" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU to look at")
def test_without_a_gpu_it_names_what_can_be_said(capsys):
    assert check_gpu.main([]) == 1
    assert "--estimate" in capsys.readouterr().err


@pytest.fixture
def here(monkeypatch):
    """The checks run on the CPU: kernels in the interpreter, steps on tapes."""
    monkeypatch.setattr(check_gpu, "_DEVICE", "cpu")
    monkeypatch.setattr(check_gpu, "_SLOTS", 8)
    monkeypatch.setattr(check_gpu, "device_name", lambda index: "sm_90")


def test_the_checks_themselves(here, tmp_path, monkeypatch):
    """Those that need no driver, as they are run on a card."""
    monkeypatch.setenv("RIVER_COMPILE_HOME", str(tmp_path))
    assert check_gpu.cache_is_written() == str(tmp_path)
    assert not list(tmp_path.iterdir())
    assert check_gpu.backend_is_registered()
    assert check_gpu.triton_compiles()
    assert "captures, the plain text" in check_gpu.a_model_generates()


def test_a_missing_entry_point_says_what_to_install(monkeypatch):
    monkeypatch.setattr(torch._dynamo, "list_backends", lambda exclude_tags: ["inductor"])
    with pytest.raises(RuntimeError, match=r"install the package, or a wheel of it \(python -m tools.wheelhouse\)"):
        check_gpu.backend_is_registered()


def test_wrong_kernels_are_all_named(here, monkeypatch):
    seen = []

    def check(spec, rows, slots, device):
        seen.append(spec.family)
        if spec.family != "linear":
            raise AssertionError(f"relative error of {spec.family}")

    monkeypatch.setattr("tests.kernels.checks.check_kernel", check)
    with pytest.raises(
        RuntimeError, match=r"rope \+ kv write \+ attention: .*decode_attention.*; exit score: "
    ) as raised:
        check_gpu.kernels_are_right("smollm2-135m")
    assert "o + residual" not in str(raised.value)
    assert len(seen) == 7
