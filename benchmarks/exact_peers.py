"""Exact mode and other ways to a model's own text, faster, without training: ``benchmarks.exact --peers``.

Each row is one program with the same weights, prompts and threads, batch 1, greedy, in one process; they alternate.
What is not installed is left out. Rows:

    eager                transformers' generate: the text to keep
    river_exact          river_compile.accelerate(model)
    lookup_compiled      transformers' prompt_lookup_num_tokens=10 on a static cache, through Inductor
    early_exit           transformers' assistant_early_exit: the first third of the blocks drafts
    economize_lookup     PyPI's economize, its prompt lookup
    economize_skip       the same, drafts that leave out every third block
    flashspec_lookup     PyPI's flashspec, its prompt lookup

Tokens/s count the whole call, prompt included. A first turn compiles; before each timed turn a row generates a few
tokens, so that what the system put aside while others ran is back in memory. A text counts as kept if it is eager's
to the last token. In bfloat16, programs that sum in another order may differ if two tokens nearly tie. Float32 tells
programs that keep the text from those that do not.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.prompts import prompts
from river_compile.cli import shared
from tools import demo_models

Generate = Callable[[Tensor, int], list[int]]  # (ids [1, S], new tokens) -> the new ones
LOOKUP = 10
_WARM_UP = 8  # tokens


def _transformers(model: Any, **options: object) -> Generate:
    def generate(ids: Tensor, count: int) -> list[int]:
        settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, **options}
        made = model.generate(ids, min_new_tokens=count, max_new_tokens=count, **settings)
        return made[0, ids.shape[1] :].tolist()

    return generate


def _eager(model: Any) -> Generate:
    return _transformers(model)


def _river_exact(model: Any, twins: str | None) -> Generate:
    import river_compile

    return _transformers(
        river_compile.accelerate(model, twins=twins, background_packing=False), cache_implementation="static"
    )


def _lookup_compiled(model: Any) -> Generate:
    model.compile()
    options = {"prompt_lookup_num_tokens": LOOKUP, "cache_implementation": "static", "disable_compile": True}
    return _transformers(model, **options)


def _early_exit(model: Any) -> Generate:
    return _transformers(model, assistant_early_exit=model.config.num_hidden_layers // 3)


def _economize(model: Any, technique: Any) -> Generate:
    import economize

    ready = economize.apply(model, technique)

    def generate(ids: Tensor, count: int) -> list[int]:
        decoding = economize.DecodeConfig(cycle_length=LOOKUP + 1)
        return ready.decode(ids[0], count, decoding=decoding).tokens.tolist()

    return generate


def _economize_lookup(model: Any) -> Generate:
    from economize.techniques.lookup import LookupConfig

    return _economize(model, LookupConfig())


def _economize_skip(model: Any) -> Generate:
    from economize.techniques.layer_skip import LayerSkipConfig

    return _economize(model, LayerSkipConfig(skip_layers=tuple(range(3, model.config.num_hidden_layers, 3))))


def _flashspec_lookup(model: Any) -> Generate:
    import flashspec
    from flashspec.engine import NgramDrafter, TargetModel

    config = flashspec.FlashSpecConfig(
        device="cpu",
        drafter_strategy="bandit",
        bandit=flashspec.BanditConfig(n_arms=1),
        sampling=flashspec.SamplingConfig(temperature=0.0),
    )
    target = TargetModel(model.config.name_or_path, torch.device("cpu"), model.dtype, model=model)
    engine = flashspec.SpeculativeEngine(config, [NgramDrafter()], target)

    def generate(ids: Tensor, count: int) -> list[int]:
        return engine.generate(ids, max_new_tokens=count, eos_token_ids=()).output_ids[0].tolist()

    return generate


# By row, the package that it needs and what makes it ready with its own model.
PEERS: dict[str, tuple[str, Callable[..., Generate]]] = {
    "eager": ("transformers", _eager),
    "river_exact": ("river_compile", _river_exact),
    "lookup_compiled": ("transformers", _lookup_compiled),
    "early_exit": ("transformers", _early_exit),
    "economize_lookup": ("economize", _economize_lookup),
    "economize_skip": ("economize", _economize_skip),
    "flashspec_lookup": ("flashspec", _flashspec_lookup),
}


def run(options: argparse.Namespace) -> int:
    """Measure every peer that is installed and return the exit status."""
    torch.set_num_threads(options.threads)
    shared.quiet()
    generators: dict[str, Generate] = {}
    missing = sorted({package for package, _ in PEERS.values() if importlib.util.find_spec(package) is None})
    if missing:
        print(f"not installed: {', '.join(missing)}", file=sys.stderr)
    loaded = {
        name: demo_models.load(options.model, dtype=options.dtype) for name in PEERS if PEERS[name][0] not in missing
    }
    _, tokenizer = next(iter(loaded.values()))
    kinds = {group: [shared.encode(tokenizer, p) for p in prompts(group, options.prompts)] for group in options.groups}
    longest = max(ids.shape[1] for of_group in kinds.values() for ids in of_group)
    for name, (model, _) in loaded.items():
        # One cache size, so one decode graph; transformers' prompt lookup drafts beyond the end of the text.
        model._previous_max_cache_length = longest + options.new_tokens + LOOKUP + 1
        given = {"twins": options.twins} if name == "river_exact" else {}
        generators[name] = PEERS[name][1](model, **given)
    outcome = {**common.setting("exact_peers", options), "kinds": _measure(generators, kinds, options)}
    _show(outcome)
    common.write_outcome(outcome, options.json)
    common.record(outcome, options)
    return 0


def _measure(
    generators: dict[str, Generate], kinds: dict[str, list[Tensor]], options: argparse.Namespace
) -> dict[str, dict]:
    """Return, by group and row, tokens/s and how many texts are eager's."""
    seconds: dict[tuple[str, str], list[float]] = {}
    texts: dict[tuple[str, str], list[list[int]]] = {}
    for turn in range(options.repeats + 1):
        for kind, ids in kinds.items():
            for name, generate in generators.items():
                if turn:
                    generate(ids[0], _WARM_UP)
                start = time.perf_counter()
                texts[kind, name] = [generate(prompt, options.new_tokens) for prompt in ids]
                took = time.perf_counter() - start
                print(f"{'warm-up' if not turn else f'turn {turn}'}, {kind}, {name}: {took:.1f} s", file=sys.stderr)
                if turn:
                    seconds.setdefault((kind, name), []).append(took)
    return {
        kind: {
            name: {
                "tokens_per_s": len(ids) * options.new_tokens / statistics.median(seconds[kind, name]),
                "same_texts": sum(map(list.__eq__, texts[kind, name], texts[kind, "eager"])),
                "texts": len(ids),
            }
            for name in generators
        }
        for kind, ids in kinds.items()
    }


def _show(outcome: dict) -> None:
    common.print_setting(outcome)
    names = next(iter(outcome["kinds"].values()))
    print("\ntokens/s (texts that are eager's, of all)")
    common.print_table(
        ["", *outcome["kinds"]],
        [
            [
                name,
                *(
                    f"{rows[name]['tokens_per_s']:.1f} ({rows[name]['same_texts']}/{rows[name]['texts']})"
                    for rows in outcome["kinds"].values()
                ),
            ]
            for name in names
        ],
    )
