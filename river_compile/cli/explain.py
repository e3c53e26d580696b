"""``river explain MODEL``: an HTML page of a model's graphs and twins, and of a text that it wrote."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from river_compile import __version__
from river_compile.cli.output import AsJson, Dtype, Model, Threads, show

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPT = "Explain in a few sentences why the sky is blue."


def explain(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("river.html"),
    prompt: Annotated[str, typer.Option(help="What the sample text answers.")] = PROMPT,
    new_tokens: Annotated[int, typer.Option(help="Of the sample text.")] = 64,
    threshold: Annotated[float, typer.Option(help="Similarity above which tokens leave.")] = 0.7,
    dtype: Dtype = "bfloat16",
    threads: Threads = 0,
    as_json: AsJson = False,
) -> None:
    """Writes one HTML file: the plan, each block beside its twin, graphs before and after each pass, where tokens left.

    The page needs no server and no other file.
    """
    from river_compile.cli.models import start

    if new_tokens < 2:
        raise ValueError(f"--new-tokens {new_tokens} is too few; give 2 or more")
    network, tokenizer = start(model, dtype, threads)
    with tempfile.TemporaryDirectory() as dump:
        found = _run(network, tokenizer, prompt, new_tokens, threshold, dump)
        found |= {"model": Path(model).name, "graphs": graphs(Path(dump))}
    output.write_text(page(found), encoding="utf-8")
    result = {"model": model, "file": str(output), "tokens": len(found["tokens"]), "blocks": found["blocks"]}
    show("explain", result, as_json, lambda console: console.print(f"written to [bold]{output}[/]"))


def _run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    new_tokens: int,
    threshold: float,
    dump: str,
) -> dict[str, Any]:
    """Generates the sample text with every graph written to a folder; returns the page's facts of it."""
    import torch

    from river_compile.api.accelerate import accelerate
    from river_compile.cli.models import encode
    from river_compile.cli.timing import Painter
    from river_compile.reporting.report import report as report_of

    accelerate(model, "fast", threshold=threshold, dump_dir=dump)
    ids = encode(tokenizer, prompt)
    blocks = model.config.get_text_config().num_hidden_layers
    painter = Painter(
        lambda ids: tokenizer.decode(ids, skip_special_tokens=True), lambda *a: None, by_cycle=False, blocks=blocks
    )
    with painter.watching():
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, streamer=painter,
            cache_implementation="static", disable_compile=True,
        )  # fmt: skip
    report = report_of(model)
    return {
        "prompt": prompt,
        "blocks": blocks,
        "threshold": threshold,
        "tokens": [(text, blocks if source == "prompt" else int(source.split()[1])) for text, source in painter.tokens],
        "depths": sorted(report.decode_depths.items()),
        "report": str(report),
        "version": __version__,
    }


def graphs(dump: Path) -> list[dict[str, Any]]:
    """Returns each rewritten graph's plan, blocks beside twins, and changes by pass."""
    return [
        {
            "name": folder.name,
            "plan": (folder / "plan.txt").read_text(),
            "pairs": _pairs(folder),
            "passes": [
                {"name": entry.name, "changes": _changes(entry)} for entry in sorted((folder / "passes").glob("*"))
            ],
        }
        for folder in sorted(dump.iterdir())
    ]


def _pairs(folder: Path) -> list[tuple[int, str, str]]:
    """Returns (number, block, twin) for each block that has a twin."""
    numbers = sorted(int(file.stem.split("_")[1]) for file in folder.glob("twin_*.py"))
    return [(n, (folder / f"block_{n}.py").read_text(), (folder / f"twin_{n}.py").read_text()) for n in numbers]


def _changes(folder: Path) -> list[tuple[str, str, str]]:
    """Returns (segment, before, after) of the first few segments that a pass changed; the others are alike."""
    names = sorted({file.name.split(".")[0] for file in folder.iterdir()})

    def text(name: str, when: str) -> str:
        file = folder / f"{name}.{when}.py"
        return file.read_text() if file.exists() else ""

    return [(name, text(name, "before"), text(name, "after")) for name in names[:3]]


def page(found: dict[str, Any]) -> str:
    """Returns the page."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("explain.html.jinja").render(**found)
