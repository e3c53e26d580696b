"""``river doctor``: versions, compiler, processor, GPU, caches, and a self-test of a few seconds."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from river_compile.cli.output import NO, AsJson, megabytes, show

if TYPE_CHECKING:
    from rich.console import Console

OK, WARN, BAD = "ok", "warning", "bad"
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
_MARKS = {OK: "[green]ok     [/]", WARN: "[yellow]warning[/]", BAD: "[red]bad    [/]"}


@dataclass(frozen=True)
class Finding:
    """The result of one check: "ok", "warning" or "bad", with a text."""

    what: str
    state: str
    text: str


def doctor(
    self_test: Annotated[bool, typer.Option(help="Compile a tiny model and compare its text.")] = True,
    as_json: AsJson = False,
) -> None:
    """Looks whether this machine has what the backend needs.

    Exit code 3 where something is bad.
    """
    findings = [*versions(), compiler(), processor(), gpu(), cache()]
    if self_test:
        findings.append(try_out())
    result = {"healthy": all(f.state != BAD for f in findings), "findings": [asdict(f) for f in findings]}
    show("doctor", result, as_json, lambda console: _page(console, findings))
    if not result["healthy"]:
        raise typer.Exit(NO)


def _page(console: Console, findings: list[Finding]) -> None:
    for finding in findings:
        console.print(f"{_MARKS[finding.state]} {finding.what:<13} {finding.text}")


def versions() -> list[Finding]:
    """Compares installed versions with the tested ones."""
    from importlib import metadata

    from river_compile.upstream.tensors import TESTED, installed, untested

    outside = {text.split()[0] for text in untested()}
    found = []
    for name, (oldest, newest) in TESTED.items():
        try:
            version = installed(name)
        except metadata.PackageNotFoundError:
            found.append(Finding(name, WARN, f"not installed (tested: {oldest} to {newest})"))
            continue
        tested = f"tested: {oldest} to {newest}"
        found.append(Finding(name, WARN if name in outside else OK, f"{version} ({tested})"))
    return found


def compiler() -> Finding:
    """Compiles a few lines with the C++ compiler that Inductor calls."""
    from river_compile.kernels.native.build import CannotBuild, working_compiler
    from river_compile.kernels.native.libraries import all_ready_made

    try:
        command = working_compiler().command
    except CannotBuild as error:
        if all_ready_made():
            return Finding("compiler", WARN, f"the kernels came compiled, and models need no more than these: {error}")
        return Finding("compiler", BAD, str(error))
    return Finding("compiler", OK, shutil.which(command) or command)


def processor() -> Finding:
    """Names the processor, and its instructions that matter."""
    import torch

    from river_compile.kernels.native.isa import chosen

    info = Path("/proc/cpuinfo").read_text(errors="replace") if Path("/proc/cpuinfo").exists() else ""
    name = next((line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")), "")
    flags = set(next((line.split() for line in info.splitlines() if line.startswith("flags")), []))
    has = ", ".join(flag for flag in _FLAGS if flag in flags) or torch.backends.cpu.get_cpu_capability()
    text = f"{name or platform.machine()}, {os.cpu_count()} cores: {has}"
    if chosen().name == "portable":
        return Finding("processor", WARN, f"{text}; the C++ kernels have no vectors for it, so the river is slow")
    return Finding("processor", OK, text)


def gpu() -> Finding:
    """Names the GPU, if there is one."""
    import torch

    if not torch.cuda.is_available():
        return Finding("GPU", OK, "none that torch sees; models run on the CPU")
    memory = torch.cuda.get_device_properties(0).total_memory
    return Finding("GPU", OK, f"{torch.cuda.get_device_name(0)}, {megabytes(memory)}")


def cache() -> Finding:
    """Names the folder of converted models and generated kernels."""
    from river_compile.kernels.files import cache_folder

    folder = cache_folder()
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(parent, os.W_OK):
        return Finding("cache", BAD, f"{folder} cannot be written; set RIVER_COMPILE_HOME to a folder that can")
    held = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.exists() else 0
    free = shutil.disk_usage(parent).free
    return Finding("cache", OK, f"{folder}, {megabytes(held)}; {megabytes(free)} free (RIVER_COMPILE_HOME)")


def try_out() -> Finding:
    """Accelerates a tiny random model and compares its text with the plain one's."""
    import time
    import warnings

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from river_compile.api.accelerate import accelerate, restore
    from river_compile.errors import RiverWarning
    from river_compile.reporting.trace import trace

    start = time.perf_counter()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.arange(1, 9)[None]
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    plain = model.generate(ids, **arguments)
    try:
        with warnings.catch_warnings(record=True) as said, trace() as seen:
            warnings.simplefilter("always", RiverWarning)
            ours = accelerate(model, max_draft=1, adaptive=False).generate(ids, **arguments)
    except Exception as error:  # whatever it is, this is what a self-test is for
        return Finding("self-test", BAD, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    finally:
        restore(model)
    for warning in said:
        if issubclass(warning.category, RiverWarning):
            return Finding("self-test", BAD, str(warning.message))
    if not torch.equal(plain, ours) or not seen.cycles:
        return Finding("self-test", BAD, "a tiny model's text in exact mode is not its plain text")
    return Finding("self-test", OK, f"exact mode gives a tiny model's plain text ({time.perf_counter() - start:.0f} s)")
