"""The exit score by depth: how alike a layer's input and output are, where else it could be read, and residual norms.

    python -m benchmarks.scores --model smollm2 qwen-coder-0.5b qwen-coder-1.5b --picture docs/images/scores.png

Texts are greedy chat answers of the model itself and passages of documentation, in one pass of the uncompiled model.
A text's first token is left out, since its norm is hundreds of times that of others. Not handled: exits themselves.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import common
from benchmarks.texts import collect
from river_compile.twins.own_text import NativeLinear
from tools import demo_models

FIRST_EXIT = 2
THRESHOLDS = (0.5, 0.7, 0.9)
_LARGEST = 8  # features that one place leaves out
_SHARES = (0.1, 0.5, 0.9)
PLACES = {
    "block": "residual stream before and after a layer",
    "rest": f"the same without the {_LARGEST} features that are largest in the mean",
    "normed": "the same after the norm that reads it",
    "update": "a layer's input and what it adds",
    "updates": "what two layers add, one after the other",
}
NORMS = {"norm": "norm of a layer's output", "added": "norm that it adds, as a share of its input's"}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    kinds: dict[str, dict[str, Any]] = {}
    drawn = {}
    for name in options.models:
        model, tokenizer = demo_models.load_or_exit(name)
        with torch.inference_mode(), NativeLinear():
            texts = collect(model, tokenizer, options.texts, options.tokens)
            found = {kind: measure(model, ids) for kind, ids in (("own", texts.own), ("documentation", texts.held_out))}
        show(name, found)
        kinds[name] = {kind: summary(measured) for kind, measured in found.items()}
        drawn[name] = found["own"]
    if options.picture:
        draw(drawn, options.picture)
    outcome = {
        **common.setting("scores", argparse.Namespace(**{**vars(options), "model": " ".join(options.models)})),
        "kinds": kinds,
    }
    common.write_outcome(outcome, options.json)
    places = {name: {kind: {"place": told["place"]} for kind, told in found.items()} for name, found in kinds.items()}
    common.record({**outcome, "kinds": places}, options)
    return 0


def measure(model: PreTrainedModel, samples: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return each place's scores and the norms, each ``[layers, tokens]`` in float32.

    "norm" is that of a layer's output, "added" that of its update as a share of its input's. Layers without a score,
    such as the first for "updates", have NaN.
    """
    parts = [_of_text(model, ids) for ids in samples]
    return {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}


def _of_text(model: PreTrainedModel, ids_1T: Tensor) -> dict[str, Tensor]:
    states = residuals(model, ids_1T)[:, 1:].float()  # [layers + 1, T - 1, D]
    before, after = states[:-1], states[1:]
    added = after - before
    largest = states.abs().mean(dim=(0, 1)).topk(_LARGEST).indices
    rest = torch.ones(states.shape[-1], dtype=torch.bool)
    rest[largest] = False
    norms = [layer.input_layernorm for layer in _layers(model)]
    dtype = model.dtype
    normed_in = [norm(x.to(dtype)).float() for norm, x in zip(norms, before, strict=True)]
    normed = _cosine(torch.stack(normed_in[:-1]), torch.stack(normed_in[1:]))
    nothing = torch.full_like(normed[:1], torch.nan)
    return {
        "block": _cosine(before, after),
        "rest": _cosine(before[..., rest], after[..., rest]),
        "normed": torch.cat([normed, nothing]),
        "update": _cosine(before, added),
        "updates": torch.cat([nothing, _cosine(added[:-1], added[1:])]),
        "norm": after.norm(dim=-1),
        "added": added.norm(dim=-1) / before.norm(dim=-1),
    }


def residuals(model: PreTrainedModel, ids_1T: Tensor) -> Tensor:
    """Return what enters the first layer and what each layer returns, ``[layers + 1, T, D]``."""
    seen: list[Tensor] = []
    layers = _layers(model)
    hooks = [layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0][0].clone()))]
    hooks += [
        layer.register_forward_hook(lambda *passed: seen.append(_first(passed[-1])[0].clone())) for layer in layers
    ]
    try:
        model(input_ids=ids_1T, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(seen)


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _layers(model: PreTrainedModel) -> Sequence[Any]:
    network: Any = model
    layers: Sequence[Any] = network.get_decoder().layers
    return layers


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(a, b, dim=-1)


def mean_depth(scores: Tensor, threshold: float) -> float:
    """Return after how many layers tokens exit in the mean, by scores ``[layers, tokens]``."""
    layers, tokens = scores.shape
    depths = torch.full((tokens,), layers)
    for depth in reversed(range(FIRST_EXIT, layers)):
        depths[scores[depth - 1] > threshold] = depth
    return depths.float().mean().item()


def summary(measured: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return quantiles of the score and medians of the norms by depth, and each place's mean exit depths."""
    by_depth = {
        f"{depth}": {
            **{f"score_{share:g}": _quantile(measured["block"][depth - 1], share) for share in _SHARES},
            **{name: _quantile(measured[name][depth - 1], 0.5) for name in ("norm", "added")},
        }
        for depth in range(1, len(measured["block"]) + 1)
    }
    places = {place: {f"depth_at_{t:g}": mean_depth(measured[place], t) for t in THRESHOLDS} for place in PLACES}
    return {"depth": by_depth, "place": places}


def _quantile(values: Tensor, share: float) -> float:
    return values.quantile(share).item()


def show(name: str, found: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Print both tables of a model."""
    for kind, measured in found.items():
        layers, tokens = measured["block"].shape
        told = summary(measured)
        print(f"\n{name}, {kind}: {tokens} tokens\n")
        rows = [(int(depth), *line.values()) for depth, line in told["depth"].items()]
        common.print_table(("depth", "score, 10 %", "median", "90 %", "norm", "added/input"), rows)
        print(f"\nMean exit depth of {layers} layers, by where the score is read and the threshold\n")
        rows = [(PLACES[place], *depths.values()) for place, depths in told["place"].items()]
        common.print_table(("score", *(f"{threshold:g}" for threshold in THRESHOLDS)), rows)


def draw(found: Mapping[str, Mapping[str, Tensor]], path: Path) -> None:
    """Draw the score's distribution by depth, and below it what a layer adds, two models next to each other."""
    from examples.plots import PAGE_WIDTH, new_figure, save_figure

    pairs = -(-len(found) // 2)
    figure = new_figure(PAGE_WIDTH, 5 * pairs)
    axes = figure.subplots(2 * pairs, 2, squeeze=False)
    for unused in axes[-2:, len(found) % 2 or 2 :].flat:
        unused.set_axis_off()
    places = [(axes[2 * (i // 2)][i % 2], axes[2 * (i // 2) + 1][i % 2]) for i in range(len(found))]
    for (name, measured), (above, below) in zip(found.items(), places, strict=True):
        above.set_ylim(-0.8, 1.1)
        below.set_ylim(0.1, 1e5)
        depths = range(1, len(measured["block"]) + 1)
        title = demo_models.MODELS[name].title if name in demo_models.MODELS else name
        for place, color in (("block", "tab:blue"), ("updates", "tab:gray")):
            low, mid, high = (
                [_quantile(row[row == row], share) if (row == row).any() else torch.nan for row in measured[place]]
                for share in _SHARES
            )
            above.fill_between(depths, low, high, color=color, alpha=0.25, linewidth=0)
            above.plot(depths, mid, color=color, label=PLACES[place])
        for threshold in THRESHOLDS[:2]:
            above.axhline(threshold, color="tab:red", linewidth=0.8, linestyle="dashed")
        above.set_title(title)
        for part, color in (("norm", "tab:green"), ("added", "tab:orange")):
            below.semilogy(depths, [_quantile(row, 0.5) for row in measured[part]], color=color, label=NORMS[part])
        below.set_xlabel("layer")
    for above, below in places[::2]:
        above.set_ylabel("cosine: median,\n10 to 90 % of tokens")
        below.set_ylabel("norm, or\na share of it")
    places[0][0].legend(frameon=False, fontsize="small", loc="lower right")
    places[0][1].legend(frameon=False, fontsize="small")
    print(f"\nDrawn to {save_figure(figure, path)}")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = common.command_line(__doc__, "threads", "json", "record")
    parser.add_argument(
        "--model",
        dest="models",
        nargs="+",
        default=["smollm2"],
        help="known models' names or model folders (%(default)s)",
    )
    parser.add_argument("--texts", type=int, default=8, help="texts of each kind (%(default)s)")
    parser.add_argument("--tokens", type=int, default=24, help="tokens after each text's prompt (%(default)s)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the distribution by depth")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
