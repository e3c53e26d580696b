"""``river explain MODEL``: an HTML page of a model's graphs, its twins and a sample text by exit depth."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from river_compile.cli.shared import AsJson, Dtype, Model, Threads, check_output, show
from river_compile.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPT = "Explain in a few sentences why the sky is blue."
_ARTIFACT = re.compile(r"river_(decode|prefill)_(plan|segments|\d+_\w+)")
_PACKAGES = re.compile(r"(?<=# File: ).*?/site-packages/")  # the reader's machine has others


def explain(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.")] = Path("river.html"),
    prompt: Annotated[str, typer.Option(help="Prompt of the sample text.")] = PROMPT,
    new_tokens: Annotated[int, typer.Option(help="Number of tokens of the sample text.")] = 64,
    threshold: Annotated[float, typer.Option(help="Similarity above which tokens exit.")] = 0.7,
    dtype: Dtype = "bfloat16",
    threads: Threads = 0,
    as_json: AsJson = False,
) -> None:
    """Write one self-contained HTML page: graphs, twins, the changes of each pass, and the exit depth of each token."""
    import jinja2

    from river_compile.cli.shared import start

    if new_tokens < 2:
        raise ValueError(f"--new-tokens {new_tokens} is too few; give 2 or more")
    check_output(output)
    network, tokenizer = start(model, dtype, threads, as_it_comes=True)
    with _traced() as artifacts:
        found = _run(network, tokenizer, prompt, new_tokens, threshold)
    found |= {"model": Path(model).name, "graphs": list(_graphs(artifacts)), "version": __version__}
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    output.write_text(page.from_string(PAGE).render(**found), encoding="utf-8")
    result = {"model": model, "file": str(output), "tokens": len(found["tokens"]), "blocks": found["blocks"]}
    show("explain", result, as_json, lambda console: console.print(f"written to [bold]{output}[/]"))


def _run(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int, threshold: float
) -> dict[str, Any]:
    """Generate the sample text; return its facts for the page."""
    import torch

    from river_compile.api.accelerate import accelerate
    from river_compile.cli.painter import Painter
    from river_compile.cli.shared import encode
    from river_compile.reporting.report import report as report_of

    accelerate(model, "fast", threshold=threshold, compile_cache=False)  # a cached program has no passes to run
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
    }


@contextlib.contextmanager
def _traced() -> Iterator[list[tuple[str, str]]]:
    """Inside, a list receives (name, text) of what River adds to torch's structured trace."""
    from torch._logging._internal import trace_log

    found: list[tuple[str, str]] = []

    class Keep(logging.Handler):
        def emit(self, record: Any) -> None:
            if "artifact" in record.metadata:
                found.append((record.metadata["artifact"]["name"], record.payload))

    keep = Keep()
    trace_log.addHandler(keep)
    try:
        yield found
    finally:
        trace_log.removeHandler(keep)


def _graphs(artifacts: list[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Yield each rewritten graph's plan, its blocks and twins, and the changes by pass."""
    passes, segments, counts = [], {}, {"decode": 0, "prefill": 0}
    for kind, name, text in ((*match.groups(), text) for n, text in artifacts if (match := _ARTIFACT.fullmatch(n))):
        if name == "segments":
            segments = _by_segment(text)
        elif name != "plan":
            changes = [(segment, *map(texts.get, ("before", "after"))) for segment, texts in _by_segment(text).items()]
            passes.append({"name": name, "changes": changes[:3]})  # the others are alike
        else:
            counts[kind] += 1
            twins = sorted(int(segment[5:]) for segment in segments if re.fullmatch(r"twin_\d+", segment))
            pairs = [(n, segments[f"block_{n}"]["compiled"], segments[f"twin_{n}"]["compiled"]) for n in twins]
            yield {"name": f"{kind}_{counts[kind]}", "plan": text, "pairs": pairs, "passes": passes}
            passes = []


def _by_segment(text: str) -> dict[str, dict[str, str]]:
    """Split an artifact by segment, and by "before", "after" or "compiled"."""
    _, *parts = re.split(r"^# (\w+) (before|after|compiled)\n", text, flags=re.MULTILINE)
    found: dict[str, dict[str, str]] = {}
    for name, when, code in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        found.setdefault(name, {})[when] = _PACKAGES.sub("", code)
    return found


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{{ model }} in River Compile</title>
<style>
  :root { color-scheme: light dark; }
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
  pre { font: 12px/1.45 ui-monospace, monospace; overflow: auto; max-height: 32rem; background: #8881; padding: .7rem; }
  .pair { display: grid; grid-template-columns: 1fr 1fr; gap: .8rem; }
  .pair > div { min-width: 0; }
  @media (max-width: 45rem) { .pair { grid-template-columns: 1fr; } }
  .text { font-size: 1.05rem; line-height: 2.1; white-space: pre-wrap; }
  .text span { border-bottom: .28rem solid hsl(calc(34 + 172 * var(--d)) 75% 50%); }
  .bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: .15rem .7rem; max-width: 44rem; }
  .bars i { background: hsl(calc(34 + 172 * var(--d)) 75% 50%); width: calc(100% * var(--w)); min-width: 2px; }
</style></head><body>
<h1>{{ model }}</h1>
<p>{{ blocks }} layers; a token exits when the similarity of a layer's output to its input exceeds {{ threshold }}.
Orange tokens ran mostly twins, blue ones all layers in 16 bits. Made by river_compile {{ version }}.</p>
<h2 id="text">An answer, each token underlined by its exit depth</h2>
<p>{{ prompt }}</p>
<p class="text">{% for piece, depth in tokens -%}
<span style="--d:{{ depth / blocks }}" title="{{ depth }} of {{ blocks }} layers">{{ piece }}</span>
{%- endfor %}</p>
<h2 id="exits">Where tokens exited</h2>
{% set most = depths | map(attribute=1) | max if depths else 1 %}
<div class="bars">{% for depth, count in depths %}
<span>layer {{ depth }}{{ " (full depth)" if depth == blocks }}</span>
<i style="--d:{{ depth / blocks }};--w:{{ count / most }}"></i><span>{{ count }}</span>
{% endfor %}</div>
{% macro pair(left, one, right, other) %}
<div class="pair"><div>{{ left }}<pre>{{ one }}</pre></div><div>{{ right }}<pre>{{ other }}</pre></div></div>
{% endmacro %}
{% for graph in graphs %}
<h2 id="{{ graph.name }}">Graph {{ graph.name }}</h2>
<details open><summary>the plan</summary><pre>{{ graph.plan }}</pre></details>
{% for number, block, twin in graph.pairs %}
<details><summary>layer {{ number }} and its twin</summary>
{{ pair("the layer, 16 bits", block, "its twin, 4 bits", twin) }}</details>
{% endfor %}
{% for pass in graph.passes %}
<details><summary>pass {{ pass.name }}</summary>
{% for name, before, after in pass.changes %}
{{ pair(name + " before", before or "(new)", name + " after", after) }}
{% endfor %}</details>
{% endfor %}
{% endfor %}
<h2 id="report">The report</h2>
<pre>{{ report }}</pre>
</body></html>
"""
