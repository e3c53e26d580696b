"""``river check MODEL``: predicts blocks, refusals and tokens per second from the config alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from river_compile.cli.output import NO, AsJson, Dtype, Model, megabytes, show, table

if TYPE_CHECKING:
    from rich.console import Console

BASIS = "an estimate: the bytes of weights that a token reads, at the memory's bandwidth"


def check(
    model: Model,
    dtype: Dtype = "bfloat16",
    bandwidth: Annotated[float, typer.Option(help="GB/s of the memory; 0: measured here.")] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Says what the backend would do to a model. Only its **config** is read; nothing is compiled.

    Exit code 3 where decode steps would not be rewritten.
    """
    from river_compile.cli.dry_run import bandwidth as measure
    from river_compile.cli.dry_run import dry_run
    from river_compile.cli.models import resolve
    from river_compile.config import RiverConfig

    found = dry_run(resolve(model), dtype, RiverConfig())
    rate, size = bandwidth * 1e9 or measure(), found["bytes"]
    reads = size and {"plain": size["blocks"] + size["head"], "river": size["twins"] + size["head"]}
    result: dict[str, Any] = {
        "model": model,
        "dtype": dtype,
        **found,
        "bandwidth_bytes_per_s": rate,
        "predicted_tokens_per_s": reads and {name: rate / count for name, count in reads.items()},
    }
    show("check", result, as_json, lambda console: _page(console, result))
    if found["refusal"]:
        raise typer.Exit(NO)


def _page(console: Console, result: dict[str, Any]) -> None:
    console.print(f"[bold]{result['model']}[/], {result['parameters'] / 1e6:.1f} million parameters, {result['dtype']}")
    for kind, found in result["graphs"].items():
        fine = isinstance(found, int)
        verdict = f"[green]rewritten[/], {found} blocks" if fine else f"[red]left to Inductor[/]: {found}"
        console.print(f"  {kind:<9} {verdict}")
    if result["refusal"]:
        return
    size, speed = result["bytes"], result["predicted_tokens_per_s"]
    console.print(f"  twins     {result['twin_products']} products in 4 bits")
    rows = [
        ["plain", megabytes(size["blocks"] + size["head"]), speed["plain"]],
        ["whole river (drafts)", megabytes(size["twins"] + size["head"]), speed["river"]],
    ]
    console.print()
    console.print(table(["a token", "reads", "tokens/s, about"], rows))
    console.print(f"[dim]{BASIS} ({result['bandwidth_bytes_per_s'] / 1e9:.1f} GB/s)[/]")
