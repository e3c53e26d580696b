"""Tensor parallelism on this machine's processor: whether two ranks give one model's answers, and how fast.

    python -m benchmarks.tensor_parallel
    python -m benchmarks.tensor_parallel --families llama mixtral --lengths 20 --skip-smollm2

Prints PASS or FAIL for each claim. The first claims are about tiny models of each family, in float32 and operator by
operator, against the model as Dynamo traces it (the same operators) and as it is. The others are about
SmolLM2-135M-Instruct, with half of each MLP and all of attention on each rank: its 9 heads cannot be divided by two.
They come with its tokens per second without River, at full depth and at exit depth 0, in one run. The exit status is 1
where a claim fails.
"""

from __future__ import annotations

import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import common
from river_compile.building.graph_record import Graphs
from river_compile.cli import shared
from tools import demo_models
from tools.ranks import run_ranks

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3", "phi3", "mixtral")
NEAR = 1e-4  # of logits around 1, for what rounds otherwise
_CHATTER = ("Loading weights", "Writing model", "Failed to load", "river: ", "[rank")  # of libraries, and progress
_FAILED = 3  # exit status of a rank

failed: list[str] = []


def claim(name: str, holds: bool, detail: str = "") -> None:
    """Print a claim and whether it holds on all ranks; all of them call this."""
    from river_compile.runtime.tensor_parallel import Ranks

    holds = Ranks(dist.get_rank(), dist.get_world_size(), dist.group.WORLD).every(holds)
    if not holds:
        failed.append(name)
    if dist.get_rank() == 0:
        print(f"{'PASS' if holds else 'FAIL'}  {name}{f' ({detail})' if detail else ''}", flush=True)


def alike(value: object) -> bool:
    """Tell whether all ranks have this value."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return all(other == values[0] for other in values)


def check_family(name: str, folder: Path, lengths: int) -> None:
    """State what holds of a tiny model of a family."""
    from river_compile.backend import river
    from river_compile.exits import CRITERIA, forced_threshold
    from river_compile.passes.experts import ROUTER
    from river_compile.record import find_record
    from tests.runtime.rank_worker import DEPTHS, EAGER, LAYERS, decode, kept, load

    depths = (*DEPTHS, *range(LAYERS + 1))
    none = (None,) * len(depths)
    model = load(folder, name)
    plain, _, plain_cache = decode(model, none)
    model.compile(backend="eager")
    traced, _, _ = decode(model, none)
    model.compile(backend=river, options={**EAGER, "quantizer": "none", "threshold": 2.0})
    never, _, never_cache = decode(model, none)
    mixed, _, mixed_cache = decode(model, depths)
    claim(f"{name}: never exit has the bits of the traced model", torch.equal(never, traced))
    claim(f"{name}: near the plain model", torch.allclose(never, plain, rtol=0, atol=NEAR))
    claim(f"{name}: unquantized twins at every depth have the same bits", torch.equal(mixed, never))
    claim(f"{name}: and the same KV slots", all(map(torch.equal, mixed_cache, never_cache)))
    near = (torch.allclose(a, b, rtol=0, atol=NEAR) for a, b in zip(mixed_cache, plain_cache, strict=True))
    claim(f"{name}: near the plain model's", all(near))
    claim(f"{name}: all ranks have the same logits", alike(mixed.tolist()))
    torch._dynamo.reset()
    model.compile(backend=river, options=EAGER)
    logits, _, _ = decode(model, depths)
    found = kept(model)
    detail = f"{len(found['packed'])} products"
    claim(f"{name}: all matrices of the twins in 4 bits, but routers", set(found["reasons"]) <= {ROUTER}, detail)
    claim(f"{name}: all ranks have the same logits in 4 bits", alike(logits.tolist()))
    for length in (
        *range(2, 14),
        25,
    ):  # (a sliding window of 8 has its own graphs before, when and after it is full)
        decode(model, (0,), length)
    before = len(find_record(model).of(Graphs))
    for length in range(1, lengths + 1):
        decode(model, (0,), length % 30 + 2)
    claim(f"{name}: {lengths} prompts, no new graph", len(find_record(model).of(Graphs)) == before)
    for criterion in sorted(CRITERIA.keys() - {"similarity"}) if name == "llama" else ():
        torch._dynamo.reset()
        model.compile(backend=river, options={**EAGER, "quantizer": "rtn", "criterion": criterion})
        decode(model, none)
        with forced_threshold(0.3 if CRITERIA[criterion].reads == "block" else 4.5):  # (some tokens leave)
            logits, seen, _ = decode(model, none)
        claim(f"{name}: criterion {criterion}, one decision", alike((seen, logits.tolist())), f"depths {seen}")
    torch._dynamo.reset()


def check_tools(folder: Path) -> None:
    """State what holds of what looks at a tiny model: collect_statistics, tune_exit, trace, exact mode."""
    import river_compile
    from river_compile.backend import river
    from river_compile.decoding.mode import exact
    from river_compile.errors import RankError
    from tests.runtime.rank_worker import EAGER, load
    from tests.support.families import prompt

    model = load(folder, "llama")
    ids, how = prompt(9), {"max_new_tokens": 12, "do_sample": False, "cache_implementation": "static"}
    plain = model.generate(ids, **how)
    try:
        river_compile.collect_statistics(model, [prompt(40, seed=dist.get_rank())])
        told = ""
    except RankError as error:
        told = str(error)
    claim("tools: collect_statistics refuses other texts on each rank", "the calibration data" in told)
    observation = river_compile.collect_statistics(model, [prompt(40, batch=4)])
    model.compile(backend=river, options=EAGER)
    with river_compile.trace() as trace:
        model.generate(ids, **how)
    claim("tools: trace", alike([step[:3] for step in trace.steps]) and len(trace.tokens) == 11)
    claim("tools: twins know what was observed", "160 observed tokens" in str(river_compile.report(model)))
    observation.clear()
    texts = [str(seed) for seed in range(40)]
    found = river_compile.tune_exit(
        model,
        lambda text: {"input_ids": prompt(12, seed=int(text))[0].tolist()},
        texts,
        kl=2.0,
        criterion="similarity",
        options={name: value for name, value in EAGER.items() if name != "first_exit"},
        context=6,
        tokens=6,
        progress=False,
    )
    claim("tools: tune_exit", alike(found.options), f"chose {found.options}")
    text = model.generate(ids, custom_generate=exact, **how)
    claim("tools: exact text is plain TP's", torch.equal(text, plain))
    torch._dynamo.reset()


def check_smollm2(new_tokens: int) -> None:
    """State what holds of SmolLM2's texts, and print its tokens per second."""
    from transformers import AutoTokenizer

    import river_compile
    from examples.tensor_parallel import load
    from river_compile.decoding.mode import exact
    from river_compile.exits import WHOLE, forced_depth
    from river_compile.reporting.timing import generate

    folder = demo_models.resolve("smollm2")
    ids = shared.encode(AutoTokenizer.from_pretrained(folder), "Explain in a few sentences why the sky is blue.")

    def rate(model: Any, depth: int | None) -> tuple[float, list[int]]:
        with forced_depth(depth):
            generate(model, ids, new_tokens, stop_after=3)
            made = generate(model, ids, new_tokens)
        return made.decode_tokens_per_s, list(made.tokens)

    model = load(folder, "bfloat16")
    rates = {"plain TP": rate(model, None)[0]}
    model.compile(backend="river")
    texts = {}
    for name, depth in (("never exit", WHOLE), ("depth 0", 0)):
        rates[name], texts[name] = rate(model, depth)
        claim(f"SmolLM2, bfloat16: one text on all ranks, {name}", alike(texts[name]))
    if dist.get_rank() == 0:
        print(river_compile.report(model))
        common.print_table(["way", "tokens/s"], [[name, f"{value:.2f}"] for name, value in rates.items()])
    del model
    torch._dynamo.reset()
    model = load(folder, "float32")
    _, plain = rate(model, None)
    model.compile(backend="river", options={"kernels": "eager", "quantizer": "rtn"})
    text = model.generate(
        ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, custom_generate=exact
    )
    claim("SmolLM2, float32: exact text is plain TP's", text[0, ids.shape[1] :].tolist() == plain)


def run_rank(options: Any) -> int:
    """Run on each rank; return its exit status."""
    shared.quiet()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    for name in options.families:
        check_family(name, Path(options.rank_folder), options.lengths)
    check_tools(Path(options.rank_folder))
    if not options.skip_smollm2:
        check_smollm2(options.new_tokens)
    dist.barrier()
    dist.destroy_process_group()
    return _FAILED if failed else 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = common.command_line(__doc__, "new-tokens", new_tokens=24)
    parser.add_argument("--families", nargs="*", default=FAMILIES, choices=FAMILIES, help="tiny models (default: all)")
    parser.add_argument("--lengths", type=int, default=100, help="prompts of each family (default: %(default)s)")
    parser.add_argument("--skip-smollm2", action="store_true", help="tiny models alone")
    parser.add_argument("--rank-folder", help="(for the ranks)")
    options = parser.parse_args(arguments)
    if options.rank_folder is not None:
        return run_rank(options)
    if not options.skip_smollm2:
        demo_models.resolve("smollm2")
    given = sys.argv[1:] if arguments is None else arguments
    with tempfile.TemporaryDirectory(prefix="river_ranks_") as folder:
        command = ["-m", "benchmarks.tensor_parallel", *given, "--rank-folder", folder]
        states, printed = run_ranks(command, timeout=3600)
    print("\n".join(line for line in printed.splitlines() if line.strip() and not line.startswith(_CHATTER)))
    return int(any(states))


if __name__ == "__main__":
    sys.exit(main())
