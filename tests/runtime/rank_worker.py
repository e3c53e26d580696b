"""What the tests of tensor parallelism run on each of two ranks: ``python -m tests.runtime.rank_worker FOLDER``.

Every case writes what it found to ``FOLDER/RANK.pt`` under its name; the tests compare. All ranks run all cases in one
order. The first case that fails ends its rank, and with it the other one.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, StaticCache
from transformers.distributed import DistributedConfig

import river_compile
from river_compile.backend import river
from river_compile.building.graph_record import Graphs
from river_compile.decoding import mode
from river_compile.decoding.passes import Passes
from river_compile.errors import OptionError, RankError, TwinsError
from river_compile.exits import forced_depth, forced_threshold
from river_compile.kernels import portable
from river_compile.record import find_record
from river_compile.runtime.executor import through_dynamo
from river_compile.runtime.state import on_step
from river_compile.runtime.tensor_parallel import Ranks
from river_compile.twins.file import TwinFile
from river_compile.twins.pack import TwinWeights
from river_compile.upstream.transformers import cache_argument
from tests.support.families import CONFIGS, make, prompt
from tests.support.lowerings import OPERATORS, UNQUANTIZED
from tests.support.ranks import Wire

SECONDS = 120  # after which a rank that waits for another one gives up
LAYERS, CAPACITY, PROMPT = 2, 40, 7
DEPTHS = (0, 1, LAYERS, 0)
EAGER = {"kernels": OPERATORS, "group_size": 32, "first_exit": 1}

found: dict[str, Any] = {}
held: dict[str, PreTrainedModel] = {}  # the model of several cases


def load(folder: Path, name: str, **fields: object) -> PreTrainedModel:
    """Returns this rank's part of a tiny model of a family, with the fields of its config."""
    where = folder / "-".join([name, *map(str, fields.values())])
    if dist.get_rank() == 0:
        config = CONFIGS[name](LAYERS)
        config.update(fields)
        make(name, layers=LAYERS, config=config).save_pretrained(where)
    dist.barrier()
    config = AutoConfig.from_pretrained(where)
    return on_ranks(where, river_compile.tensor_parallel_plan(config, dist.get_world_size()))


def on_ranks(where: Path, plan: Any) -> PreTrainedModel:
    spread = DistributedConfig(tp_size=dist.get_world_size(), tp_plan=plan)
    return AutoModelForCausalLM.from_pretrained(where, distributed_config=spread).eval()


@torch.no_grad()
def decode(
    model: PreTrainedModel, depths: tuple[int | None, ...], length: int = PROMPT, plain_prompt: bool = False
) -> tuple[torch.Tensor, list[int], list[torch.Tensor]]:
    """Feeds a prompt and then fixed tokens; returns the logits of all steps, their depths, and keys and values.

    With `plain_prompt` the prompt runs as if the model was not compiled: one graph less to trace.
    """
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=CAPACITY)
    given = {"use_cache": True, cache_argument(model): cache}
    ids = prompt(length + len(depths))
    seen: list[int] = []
    run_prompt = model.forward if plain_prompt else model
    logits = [run_prompt(input_ids=ids[:, :length], **given).logits[:, -1]]
    with on_step(lambda state, step: seen.append(step.depth)):
        for place, depth in enumerate(depths, length):
            with forced_depth(depth):
                logits.append(model(input_ids=ids[:, place : place + 1], **given).logits[:, -1])
    return torch.cat(logits), seen, [kept for layer in cache.layers for kept in (layer.keys, layer.values)]


def unquantized(folder: Path) -> dict[str, Any]:
    """Llama with twins that keep 16 bits: as it is, at full depth, and at every depth."""
    model = load(folder, "llama")
    plain, _, plain_cache = decode(model, (None,) * len(DEPTHS))
    model.compile(backend=river, options={**EAGER, "kernels": UNQUANTIZED, "threshold": 2.0})
    never, depths, never_cache = decode(model, (None,) * len(DEPTHS))
    mixed, _, mixed_cache = decode(model, DEPTHS)
    same_cache = all(map(torch.equal, never_cache, mixed_cache))
    return {
        "plain": plain, "never": never, "mixed": mixed, "never depths": depths, "same cache": same_cache,
        "plain cache": plain_cache, "cache": mixed_cache,
    }  # fmt: skip


def traced(folder: Path) -> dict[str, Any]:
    """The same through Dynamo alone."""
    model = load(folder, "llama")
    model.compile(backend="eager")
    return {"logits": decode(model, (None,) * len(DEPTHS))[0]}


def replicated_attention(folder: Path) -> dict[str, Any]:
    """Qwen2 with one KV head, which two ranks do not divide: each holds all of attention and half of the MLP.

    That half is so narrow that a row of its last matrix has no group.
    """
    model = load(folder, "qwen2", num_key_value_heads=1, intermediate_size=32)
    model.compile(backend=river, options={**EAGER, "quantizer": "rtn"})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        _, _, cache = decode(model, (LAYERS, *DEPTHS))
    return {"cache": cache, "kept": kept(model), "told": [str(w.message) for w in told]}


def experts(folder: Path) -> dict[str, Any]:
    """Mixtral with the default quantizer: matrices and warnings."""
    model = load(folder, "mixtral")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model.compile(backend=river, options=EAGER)
        logits, _, _ = decode(model, (0,))
    return {"logits": logits, "kept": kept(model), "told": [str(w.message) for w in told]}


def kept(model: PreTrainedModel) -> dict[str, Any]:
    """Returns what of a model's twins has 4 bits, and why the rest has not."""
    graphs = [graph for graph in find_record(model).of(Graphs) if graph.twins]
    twins = {site.name: (site.shape, site.group_size, site.digest) for site in graphs[-1].twins}
    return {"packed": twins, "reasons": sorted({linear.reason for linear in graphs[-1].kept})}


def quantized(folder: Path) -> dict[str, Any]:
    """Llama with the default quantizer; the other cases use it too."""
    model = held["model"] = load(folder, "llama")
    plain = model.generate(prompt(PROMPT), max_new_tokens=12, do_sample=False)
    model.compile(backend=river, options=EAGER)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        logits, _, _ = decode(model, DEPTHS)
    report = river_compile.report(model)
    try:
        refusal = str(river_compile.collect_statistics(model))
    except OptionError as error:
        refusal = str(error)
    return {
        "statistics": refusal,
        "told": [str(w.message) for w in told],
        "logits": logits, "text": plain, "kept": kept(model), "report": str(report), "shown": report.to_dict(),
    }  # fmt: skip


def scores(folder: Path) -> dict[str, Any]:
    """Raises the second rank's scores above a threshold that the first one's do not reach: what both do then."""
    measured = portable.smallest_cosine

    def raised(*states: torch.Tensor) -> torch.Tensor:
        return measured(*states) + 5 * dist.get_rank()

    model = load(folder, "llama")
    with mock.patch.object(portable, "smallest_cosine", raised):  # (graphs are made with what stands there)
        model.compile(backend=river, options={**EAGER, "quantizer": "rtn"})
        with forced_threshold(2.0):
            logits, depths, _ = decode(model, (None,) * 3, plain_prompt=True)
    with forced_threshold(-2.0):
        _, leaving, _ = decode(model, (None,) * 2, plain_prompt=True)
    return {"logits": logits, "depths": depths, "leaving": leaving}


def exact(folder: Path) -> dict[str, Any]:
    """Exact mode: greedy text, and sampled text of ranks with their own seeds."""
    model = held["model"]
    texts = {}
    exactly = dataclasses.replace(mode.exact, num_assistant_tokens=1)
    for name, loop, sample in (
        ("greedy", exactly, False),
        ("sampled", exactly, True),
        ("own loop", mode.decode, True),
    ):
        torch.manual_seed(dist.get_rank())
        how = {"max_new_tokens": 12, "do_sample": sample, "cache_implementation": "static"}
        texts[name] = model.generate(prompt(PROMPT), custom_generate=loop, **how)
    with mock.patch.object(Passes, "runs_late", True):
        late = model.generate(
            prompt(PROMPT), custom_generate=exactly, max_new_tokens=12, do_sample=False, cache_implementation="static"
        )
    return {**texts, "late": late, "exact": river_compile.report(model).exact}


def accelerated(folder: Path) -> dict[str, Any]:
    """`accelerate` by default, and with a quantizer that needs statistics."""
    model = load(folder, "llama")
    how = {"max_new_tokens": 12, "do_sample": False}
    plain = model.generate(prompt(PROMPT), **how)
    try:
        refusal = str(river_compile.accelerate(model, quantizer="awq"))
    except OptionError as error:
        refusal = str(error)
    river_compile.accelerate(model, kernels=OPERATORS, group_size=32)
    with river_compile.trace() as seen:
        text = model.generate(prompt(PROMPT), **how)
    drafted = [len(cycle.drafted) for cycle in seen.cycles]
    return {"plain": plain, "text": text, "drafted": drafted, "refusal": refusal}


def wire(folder: Path) -> dict[str, Any]:
    """What a token sends at every depth, and where checks decide."""
    model = held["model"]
    calls: list[tuple] = []
    with through_dynamo(lambda *call: calls.append(call)):  # (None: the graph runs)
        decode(model, (0,))
    executor, args = calls[-1]
    counted = {}
    for depth in (*range(LAYERS + 1), None):
        with forced_depth(depth), forced_threshold(2.0), torch.no_grad(), Wire() as wire:
            executor(*args)
        counted[depth] = dict(wire.messages)
    return {"messages": counted}


def lengths(folder: Path) -> dict[str, Any]:
    """Prompts of many lengths, after the graphs of three of them."""
    model = held["model"]
    for length in (3, 5):
        decode(model, (0,), length)
    before = len(find_record(model).of(Graphs))
    for length in range(2, 30, 3):
        decode(model, (0,), length)
    return {"new graphs": len(find_record(model).of(Graphs)) - before}


def changed(folder: Path) -> dict[str, Any]:
    """A weight that changes on the second rank alone is packed again, while the first one waits."""
    model = held["model"]
    weight = model.model.layers[1].mlp.down_proj.weight._local_tensor
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight.mul_(1 + dist.get_rank())
        decode(model, (0,))
        weight.div_(1 + dist.get_rank())
        decode(model, (0,))
    return {"changes": find_record(model).of(TwinWeights).changes}


def saved_twins(folder: Path) -> dict[str, Any]:
    """Twins saved by both ranks and read again by a model of the same weights; and by another number of ranks."""
    model = held["model"]
    logits, _, _ = decode(model, DEPTHS)
    river_compile.save_twins(model, folder / "twins")
    dist.barrier()
    again = on_ranks(folder / "llama", river_compile.tensor_parallel_plan(model.config, dist.get_world_size()))
    again.compile(backend=river, options={**EAGER, "twins": folder / "twins"})
    read, _, _ = decode(again, DEPTHS)
    refusals = []
    for look in (TwinFile, Ranks(0, 4).part_of):
        try:
            look(folder / "twins")
        except TwinsError as error:
            refusals.append(str(error))
    names = sorted(path.name for path in (folder / "twins").glob("rank*"))
    return {"same": torch.equal(logits, read), "names": names, "refusals": refusals}


def whole_plan(folder: Path) -> dict[str, Any]:
    """transformers' own plan, which spreads the rows of the embedding."""
    spread = on_ranks(folder / "llama", "auto")
    spread.compile(backend=river, options=EAGER)
    try:
        decode(spread, (0,))
    except OptionError as error:
        return {"told": str(error)}
    return {"told": ""}


def gone(folder: Path) -> dict[str, Any]:
    """The second rank ends before a token of the first one."""
    model = held["model"]
    if dist.get_rank() == 1:
        torch.save(found | {"gone": {"told": "me"}}, folder / "1.pt")
        os._exit(0)
    try:
        decode(model, (0,))
    except RankError as error:
        return {"told": str(error)}
    return {"told": ""}


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "unquantized": unquantized,
    "traced": traced,
    "replicated attention": replicated_attention,
    "experts": experts,
    "quantized": quantized,
    "scores": scores,
    "exact": exact,
    "accelerated": accelerated,
    "wire": wire,
    "lengths": lengths,
    "changed": changed,
    "saved twins": saved_twins,
    "whole plan": whole_plan,
    "gone": gone,
}

SLOW = ("traced", "replicated attention", "experts", "saved twins")  # that tests ask for with --slow


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=SECONDS))
    for name in names or CASES:
        found[name] = CASES[name](folder)
        torch.save(found, folder / f"{dist.get_rank()}.pt")
    os._exit(0)  # (the group of a rank that is gone does not end in order)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
