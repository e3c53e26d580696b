"""The short commands: ``river doctor``, ``check``, ``quantize``, ``tune`` and ``cache``.

No import at the top loads torch, so `river --help` answers immediately.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from river_compile.cli.shared import (
    NO,
    AsJson,
    Assistant,
    Dtype,
    Model,
    Texts,
    Threads,
    check_output,
    config_of,
    loading,
    megabytes,
    passages,
    resolve,
    show,
    start,
    table,
)

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel

_FREE = 100e6  # bytes, of kernels and of a small model's twins
OK, WARN, BAD = "ok", "warning", "bad"
_MARKS = {OK: "[green]ok     [/]", WARN: "[yellow]warning[/]", BAD: "[red]bad    [/]"}


@dataclass(frozen=True)
class Finding:
    """The result of one check: "ok", "warning" or "bad", with a text."""

    what: str
    state: str
    text: str


def doctor(
    self_test: Annotated[bool, typer.Option(help="Accelerate a tiny random model and compare its output.")] = True,
    as_json: AsJson = False,
) -> None:
    """Check versions, compiler, processor, GPU and caches, and run a self-test.

    Exit code 3 if something is broken.
    """
    findings = [*versions(), compiler(), processor(), threads(), gpu(), _cache_folder()]
    if self_test:
        findings.append(try_out())
    result = {"healthy": all(f.state != BAD for f in findings), "findings": [asdict(f) for f in findings]}
    show("doctor", result, as_json, lambda console: _doctor_page(console, findings))
    if not result["healthy"]:
        raise typer.Exit(NO)


def _doctor_page(console: Console, findings: list[Finding]) -> None:
    for finding in findings:
        console.print(f"{_MARKS[finding.state]} {finding.what:<13} {finding.text}")


def versions() -> list[Finding]:
    """Compare installed versions with the tested ones."""
    from importlib import metadata

    import torch

    from river_compile.upstream.versions import TESTED, installed, untested

    outside = {text.split()[0] for text in untested()}
    found = []
    for name, (oldest, newest) in TESTED.items():
        tested = f"tested: {oldest} to {newest}"
        try:
            version = installed(name)
        except metadata.PackageNotFoundError:
            for_gpus = name == "triton"
            state = OK if for_gpus and not torch.cuda.is_available() else WARN
            where = ", needed on a GPU" if for_gpus else ""
            found.append(Finding(name, state, f"not installed{where} ({tested})"))
            continue
        found.append(Finding(name, WARN if name in outside else OK, f"{version} ({tested})"))
    return found


def compiler() -> Finding:
    """Compile a few lines with the C++ compiler that Inductor calls."""
    from river_compile.kernels.native.build import CannotBuild, has_prebuilt, working_compiler

    try:
        command = working_compiler().command
    except CannotBuild as error:
        if has_prebuilt():
            return Finding(
                "compiler", WARN, f"River's kernels are precompiled. Operators outside of them run one by one: {error}"
            )
        return Finding("compiler", BAD, str(error))
    return Finding("compiler", OK, shutil.which(command) or command)


def processor() -> Finding:
    """Name the processor, the instruction set of the C++ kernels, and the sets that can be forced."""
    from river_compile.kernels.native.build import choose_isa, supported_isas
    from river_compile.kernels.native.machine import processor_name

    chosen, others = choose_isa(), ", ".join(isa.name for isa in supported_isas())
    text = f"{processor_name()}, {os.cpu_count()} cores: kernels for {chosen.name} (RIVER_COMPILE_ISA: {others})"
    if chosen.name == "portable":
        return Finding("processor", WARN, f"{text}; they use no vector instructions of this processor and are slow")
    return Finding("processor", OK, text)


def threads() -> Finding:
    """Say how many threads the C++ kernels run on."""
    from river_compile.kernels.native.cores import limit_text
    from river_compile.kernels.native.cores import threads as used

    return Finding("threads", OK, f"{used()}{limit_text()}")


def gpu() -> Finding:
    """Names the GPU, if there is one."""
    import torch

    if not torch.cuda.is_available():
        return Finding("GPU", OK, "none that torch sees; models run on the CPU")
    memory = torch.cuda.get_device_properties(0).total_memory
    return Finding("GPU", OK, f"{torch.cuda.get_device_name(0)}, {megabytes(memory)}")


def _cache_folder() -> Finding:
    """Names the folder of converted models and generated kernels."""
    from river_compile.kernels.files import cache_folder

    folder = cache_folder()
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        return Finding("cache", BAD, f"{folder} cannot be written; set RIVER_COMPILE_HOME to a folder that can")
    held = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.exists() else 0
    free = shutil.disk_usage(parent).free
    text = f"{folder}, {megabytes(held)}; {megabytes(free)} free (RIVER_COMPILE_HOME)"
    return Finding("cache", OK if free > _FREE else WARN, text)


def try_out() -> Finding:
    """Accelerate a tiny random model and compare its text with the plain one's."""
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
            ours = accelerate(model, num_assistant_tokens=1, num_assistant_tokens_schedule="constant").generate(
                ids, **arguments
            )
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


BASIS = "an estimate: the bytes that a token reads at the memory's bandwidth, times a measured efficiency"
_PREDICTED = {
    "plain": "transformers",
    "exact": "River, default (exact)",
    "assistant": "River, exact with the assistant",
    "fast": "River, fast with threshold=0.7",
    "all_4bit": "River, all layers in 4 bits",
}


def check(
    model: Model,
    dtype: Dtype = "bfloat16",
    bandwidth: Annotated[float, typer.Option(help="Memory bandwidth in GB/s (0: measure it here).")] = 0.0,
    assistant: Assistant = None,
    as_json: AsJson = False,
) -> None:
    """Predict support, speed and memory from a model's **config**; no weight is read, nothing is compiled.

    Exit code 3 if `accelerate` would not make the model faster.
    """
    from river_compile.decoding.sources import why_no_source
    from river_compile.reporting import predict
    from river_compile.system import bandwidth as measure

    if not 0 <= bandwidth < math.inf:
        raise ValueError(f"--bandwidth {bandwidth} is not allowed; give GB/s, or 0 to measure it here")
    network, found, sizes = _dry(model, dtype)
    rate = bandwidth * 1e9 or measure()
    reads = sizes and predict.bytes_per_token(sizes)
    if assistant is not None and reads:
        small, _, its_sizes = _dry(assistant, dtype)
        why_not = why_no_source(network, small, use_mtp=False)
        if why_not or its_sizes is None:
            raise ValueError(f"--assistant {assistant}: {why_not or 'its graphs are unsupported, so it cannot draft'}")
        reads["assistant"] = predict.bytes_with_assistant(sizes, its_sizes)
    if reads and found["drafts_refusal"]:
        reads = {**reads, predict.EXACT: sizes.full_depth}
    result: dict[str, Any] = {
        "model": model,
        "dtype": dtype,
        **found,
        "bandwidth_bytes_per_s": rate,
        "bytes_per_token": reads,
        "predicted_tokens_per_s": reads and predict.tokens_per_s(reads, rate),
        "memory_bytes": sizes and predict.memory_bytes(sizes),
        "resident_originals_bytes": sizes and predict.resident_originals(sizes),
        "disk_bytes": sizes and predict.disk_bytes(sizes),
    }
    show("check", result, as_json, lambda console: _check_page(console, result))
    if found["refusal"] or found["exact_refusal"]:
        raise typer.Exit(NO)


def _dry(model: str, dtype: str) -> tuple[PreTrainedModel, dict[str, Any], Any]:
    """Return a model without weights, what its dry run found, and its sizes (None: its graphs are unsupported)."""
    from river_compile.api.mxfp4 import is_mxfp4, why_not_mxfp4
    from river_compile.reporting.dry_run import dry_run, empty_model, with_mxfp4_experts
    from river_compile.reporting.predict import sizes_of

    folder = resolve(model)
    config = config_of(folder)
    with loading(folder):
        network = empty_model(config, dtype)
    why_not = why_not_mxfp4({"dtype": dtype}) if is_mxfp4(config) else None
    if why_not == "":
        network = with_mxfp4_experts(network)
    found = dry_run(network)
    sizes = sizes_of(found, dtype)
    del found["merged"]
    found["experts"] = found["experts"] or why_not or None
    return network, found, sizes


def _check_page(console: Console, result: dict[str, Any]) -> None:
    console.print(f"[bold]{result['model']}[/], {result['parameters'] / 1e6:.1f} million parameters, {result['dtype']}")
    for kind, found in result["graphs"].items():
        fine = isinstance(found, int)
        verdict = f"[green]supported[/], {found} layers" if fine else f"[red]unsupported[/]: {found}"
        console.print(f"  {kind:<9} {verdict}")
    if result["refusal"]:
        return
    console.print(f"  twins     {result['twin_matmuls']} matmuls in 4 bits")
    experts, why_not = result["experts"], result["exact_refusal"]
    if isinstance(experts, str):
        console.print(f"  experts   dequantized: {experts}")
    elif experts:
        console.print(
            f"  experts   MXFP4, as in the checkpoint: {megabytes(experts['all'])}, of which a token reads "
            f"{megabytes(experts['chosen'])}"
        )
        if not why_not:
            console.print("  exact     runs; twins share these experts, so it drafts only while that pays")
    if why_not:
        console.print(f"  exact     [red]runs at transformers' speed[/]: {why_not}. quality='fast' works")
    if result["drafts_refusal"]:
        console.print(f"  exact     [yellow]runs without drafts[/], on River's kernels: {result['drafts_refusal']}")
    reads, speed = result["bytes_per_token"], result["predicted_tokens_per_s"]
    names = {name: title for name, title in _PREDICTED.items() if name in reads}
    if why_not:
        names = {name: title for name, title in names.items() if name not in ("exact", "assistant")}
    console.print()
    rows = [[title, megabytes(reads[name]), speed[name]] for name, title in names.items()]
    console.print(table(["a token of", "reads", "tokens/s, about"], rows))
    originals = result["resident_originals_bytes"]
    of_these = f" (of these, {megabytes(originals)} of experts in 16 bits, which no file backs)" if originals else ""
    memory, disk = megabytes(result["memory_bytes"]), megabytes(result["disk_bytes"])
    console.print(f"memory {memory} of weights{of_these}, compile cache {disk}")
    console.print(f"[dim]{BASIS} ({result['bandwidth_bytes_per_s'] / 1e9:.1f} GB/s)[/]")


def quantize(
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write: new, empty, or written by `river quantize`.")
    ],
    quantizer: Annotated[
        str, typer.Option(help="Method: gptq, awq, hqq or rtn (not for compressed-tensors).")
    ] = "gptq",
    format: Annotated[
        str, typer.Option(help="Format: river, or compressed-tensors (a 4-bit model for transformers and vLLM).")
    ] = "river",
    dtype: Dtype = "bfloat16",
    threads: Threads = 0,
    as_json: AsJson = False,
) -> None:
    """Quantize a model to 4 bits and save the twins, for `accelerate(model, twins=DIR)` and `--twins DIR`."""
    from river_compile.api.accelerate import accelerate
    from river_compile.api.export import FORMATS, export
    from river_compile.api.twins import save_twins

    if format not in ("river", *FORMATS):
        raise typer.BadParameter(f"format {format!r} is none of {', '.join(('river', *FORMATS))}")
    network, tokenizer = start(model, dtype, threads)
    began = time.perf_counter()
    if format == "river":
        save_twins(accelerate(network, quantizer=quantizer, background_packing=False), output)
    else:
        quantizer = "symmetric"
        export(network, output, format)
        tokenizer.save_pretrained(output)
    result: dict[str, Any] = {
        "model": model,
        "folder": str(output),
        "format": format,
        "quantizer": quantizer,
        "bytes": sum(file.stat().st_size for file in output.rglob("*") if file.is_file()),
        "seconds": time.perf_counter() - began,
    }
    show("quantize", result, as_json, lambda console: _quantize_page(console, result))


def _quantize_page(console: Console, result: dict[str, Any]) -> None:
    console.print(
        f"{result['quantizer']}, {megabytes(result['bytes'])}, {result['seconds']:.1f} s: [bold]{result['folder']}[/]"
    )


def tune(
    model: Model,
    kl: Annotated[
        float | None, typer.Option(help="Budget: largest mean KL from full depth, in nats per token.")
    ] = None,
    agreement: Annotated[
        float | None, typer.Option(help="Budget: smallest share of tokens equal to full depth's.")
    ] = None,
    texts: Texts = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file to write the exit rule to.")] = None,
    criterion: Annotated[str, typer.Option(help="Exit criterion: similarity or confidence.")] = "confidence",
    tokens: Annotated[int, typer.Option(help="Tokens to measure per text.")] = 16,
    context: Annotated[int, typer.Option(help="Prompt tokens per text.")] = 16,
    dtype: Dtype = "bfloat16",
    threads: Threads = 0,
    as_json: AsJson = False,
) -> None:
    """Find the fastest exit rule within a quality budget on texts like yours, for `calibration=FILE`."""
    from river_compile.evaluation.tune import tune_exit

    if output is not None:
        check_output(output)  # now, not after minutes
    network, tokenizer = start(model, dtype, threads)
    how: dict[str, Any] = {"criterion": criterion, "tokens": tokens, "context": context, "progress": not as_json}
    found = tune_exit(network, tokenizer, passages(texts), kl=kl, agreement=agreement, **how)
    if output is not None:
        found.save(output)
    result = {
        "model": model,
        "options": found.options,
        "budget": {found.metric: found.budget},
        "confidence": found.confidence,
        "measured": asdict(found.chosen),
        "file": None if output is None else str(output),
    }
    show("tune", result, as_json, lambda console: console.print(str(found), markup=False))


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete all entries.")] = False,
    clear_prompts: Annotated[bool, typer.Option("--clear-prompts", help="Delete the prefix cache only.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the compile cache: twins, compiled programs and prompts of earlier runs, by model.

    Running processes keep the files that they have mapped.
    """
    from river_compile.compile_cache import folder

    found = [
        {"about": e.about, "folder": str(e.folder), "bytes": e.bytes, "used": e.used} for e in folder.list_entries()
    ]
    freed = folder.clear("" if clear else folder.PROMPTS) if clear or clear_prompts else 0
    result = {"folder": str(folder.compile_cache_folder()), "entries": found, "freed_bytes": freed}
    show("cache", result, as_json, lambda console: _cache_page(console, result))


def _cache_page(console: Console, result: dict[str, Any]) -> None:
    if result["freed_bytes"]:
        console.print(f"{megabytes(result['freed_bytes'])} freed in {result['folder']}")
        return
    total, now = sum(entry["bytes"] for entry in result["entries"]), time.time()
    rows = [[e["about"], megabytes(e["bytes"]), f"{(now - e['used']) / 86400:.0f}"] for e in result["entries"]]
    console.print(table(["", "size", "days unused"], rows))
    console.print(f"{megabytes(total)} in {result['folder']}")
