"""``river pack MODEL -o DIR``: 4-bit twins made once, for starts that pack nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from river_compile.cli.output import AsJson, Dtype, Model, Threads, megabytes, show

if TYPE_CHECKING:
    from rich.console import Console


def pack(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="A new or empty folder, or one that this wrote.")],
    quantizer: Annotated[
        str | None,
        typer.Option(help="gptq, awq, hqq or rtn; symmetric for --format compressed-tensors. Default: gptq."),
    ] = None,
    format: Annotated[
        str, typer.Option(help="river, or compressed-tensors: a 4-bit model for transformers and vLLM.")
    ] = "river",
    dtype: Dtype = "bfloat16",
    threads: Threads = 0,
    as_json: AsJson = False,
) -> None:
    """Packs a model's twins into a folder, for `accelerate(model, artifact=DIR)` and `river chat --artifact DIR`."""
    import time

    from river_compile.api.accelerate import accelerate
    from river_compile.api.export import FORMATS, export
    from river_compile.api.twins import save
    from river_compile.cli.models import start
    from river_compile.reporting.report import report as report_of

    if format not in ("river", *FORMATS):
        raise typer.BadParameter(f"format {format!r} is none of {', '.join(('river', *FORMATS))}")
    quantizer = quantizer or ("gptq" if format == "river" else "symmetric")
    network, tokenizer = start(model, dtype, threads)
    began = time.perf_counter()
    accelerate(network, quantizer=quantizer)
    network.generate(tokenizer("A", return_tensors="pt")["input_ids"], max_new_tokens=2, do_sample=False)
    if format == "river":
        save(network, output)
    else:
        export(network, output, format)
        tokenizer.save_pretrained(output)
    packed = report_of(network).packed
    result: dict[str, Any] = {
        "model": model,
        "folder": str(output),
        "format": format,
        "quantizer": quantizer,
        "matrices": len(packed),
        "bytes": sum(site.nbytes for site in packed),
        "seconds": time.perf_counter() - began,
    }
    show("pack", result, as_json, lambda console: _page(console, result))


def _page(console: Console, result: dict[str, Any]) -> None:
    console.print(
        f"{result['matrices']} matrices ({result['quantizer']}), {megabytes(result['bytes'])}, in "
        f"{result['seconds']:.1f} s: [bold]{result['folder']}[/]"
    )
