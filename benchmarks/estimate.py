"""What stands in for a GPU: launches and bytes per token, roofline times, and the schedule that the recorder saw.

`benchmarks.decode --random MODEL ... --estimate` prints it. Nothing here has run on a GPU: the times are what the
bytes alone cost at a named bandwidth, and no kernel reaches that. The next column is what the targets leave room for:

    needs        the share of the bandwidth that meets the target, if launches cost nothing
    us/launch    the time that is left for each launch at the full bandwidth, if the target is met
    modelled     tokens/s by the kernels' cost model on an H100: instructions, waves and launches besides bytes

The schedule is that of a random Llama with the model's number of blocks and small matrices, captured by the recorder.
Per token it has graph launches, flags that the host waits for, and other calls (copies into buffers and of results).
"asked" reads the check of every block on the way, "forced" none.

Exact mode is on paper here (`benchmarks.cuda_decode` measures it). A cycle drafts n tokens with the twins at depth 0,
one captured pass each, and verifies them in one pass of the backbone over n + 1 positions; then the host reads what was
kept. A drafted token holds with the probability p of `--hold` where all before it did, so that a cycle keeps
1 + p + ... + p^n tokens; n is the length with the most tokens/s. By default there are two rates.
0.70 is that of SmolLM2's drafts of four tokens: 72, 50, 36 and 23 % were accepted up to each position. 0.88 is how
often its 4-bit twins name the backbone's next token on its own text. Passes start 5 us after one another; reading back
takes 30 us.
"""

from __future__ import annotations

import argparse

import torch
from transformers import PreTrainedModel, StaticCache

from benchmarks import common, schedule
from benchmarks.roofline import BLOCK_LAUNCHES, CHECK_TARGET, SPEEDUP_TARGET, TARGETS, Roofline, depth_name
from river_compile.backend import river
from river_compile.exits import forced_depth
from river_compile.kernels.quant.layouts import PLAIN_LAYOUT
from river_compile.passes.program import Lowering
from tools.kernels.shapes import MODELS
from tools.recorder import recording

_CAPACITY = 16
_MAX_DRAFT = 15
_PASS_SECONDS, _READ_SECONDS = 5e-6, 30e-6  # from one captured pass to the next; until the host has read a result


def main(options: argparse.Namespace) -> int:
    """Print the estimate for the models of the command line; return the exit status."""
    bandwidth = options.bandwidth * 1e9
    print(f"Nothing was run on a GPU. Bytes at {options.bandwidth:g} GB/s; batch 1, context {options.context},")
    print(f"groups of {options.group_size}, 16-bit head. A backbone block launches {BLOCK_LAUNCHES} kernels or more.")
    outcome = {"benchmark": "estimate", "bandwidth": bandwidth, "context": options.context, "models": {}}
    for name in options.random:
        roofline = Roofline(name, options.context, options.group_size)
        found = {
            "tokens": [token_row(roofline, depth, bandwidth) for depth in options.depths],
            "check": check_row(roofline, bandwidth),
            "exact": exact_rows(roofline, options.hold),
            "schedule": schedule_rows(options.blocks or MODELS[name].layers, options.depths),
        }
        show(name, found)
        outcome["models"][name] = found
    common.write_outcome(outcome, options.json)
    return 0


def token_row(roofline: Roofline, depth: int | None, bandwidth: float) -> dict:
    """Return what a token at an exit depth costs, and what its target asks for (None where there is none)."""
    cost = roofline.token(depth)
    seconds = cost.seconds(bandwidth)
    target = TARGETS.get((roofline.shape.name, depth))
    return {
        "exit": depth_name(depth),
        "launches": cost.launches,
        "bytes": cost.bytes,
        "seconds": seconds,
        "tokens_per_s": 1 / seconds,
        "target": target,
        "needs": target and target * seconds,
        "seconds_per_launch": target and (1 / target - seconds) / cost.launches,
        "over_never": roofline.token(None).bytes / cost.bytes,
        "modelled_tokens_per_s": 1 / roofline.seconds(depth),
    }


def exact_rows(roofline: Roofline, holds: list[float]) -> list[dict]:
    """Return what exact mode makes of a model, for each probability that a drafted token holds, backbone and head."""
    return [
        max(
            (exact_cycle(roofline, hold, weights, head, n) for n in range(_MAX_DRAFT + 1)),
            key=lambda row: row["tokens_per_s"],
        )
        for hold in holds
        for weights in ("dense", "bf12")
        for head in ("dense", "w4")
    ]


def exact_cycle(roofline: Roofline, hold: float, weights: str, head: str, drafted: int) -> dict:
    """Return one cycle of exact mode with so many drafted tokens; without any it is plain decoding.

    Args:
        roofline: the model's.
        hold: probability that a drafted token holds if the one before it did.
        weights: of the backbone, "dense" or "bf12".
        head: of the drafts, "dense" or "w4".
        drafted: tokens.
    """
    draft, verify = roofline.draft(head), roofline.verification(drafted + 1, weights)
    plain = roofline.verification(1, weights) + _PASS_SECONDS + _READ_SECONDS
    seconds = drafted * (draft + _PASS_SECONDS) + verify + _PASS_SECONDS + _READ_SECONDS
    kept = sum(hold**position for position in range(drafted + 1))
    sizes = {"hold": hold, "weights": weights, "head": head, "drafted": drafted, "tokens_per_cycle": kept}
    times = {"draft_seconds": draft, "verify_seconds": verify, "seconds": seconds}
    return {**sizes, **times, "tokens_per_s": kept / seconds, "over_plain": kept / seconds * plain}


def check_row(roofline: Roofline, bandwidth: float) -> dict:
    """Return what the checks of a token that never leaves cost in bytes, and what their target leaves for each."""
    checks, token = roofline.shape.layers - 1, roofline.token(None)
    return {
        "checks": checks,
        "share_of_bytes": checks * roofline.check.bytes / token.bytes,
        "seconds_per_check": CHECK_TARGET * token.seconds(bandwidth) / checks,
    }


def schedule_rows(blocks: int, depths: list[int | None]) -> list[dict]:
    """Return what the recorder saw of one captured token at every depth, of a random Llama with so many blocks."""
    model = schedule.small_llama(blocks)
    operators = Lowering("eager", PLAIN_LAYOUT, fuse=False)
    settings = {"graphs": True, "first_exit": 1, "kernels": operators, "quantizer": "rtn"}
    model.compile(backend=river, options=settings)
    cache = StaticCache(config=model.config, max_cache_len=_CAPACITY)
    depths = [depth for depth in depths if depth is None or depth < blocks]
    whole = [blocks if depth is None else depth for depth in depths]
    rows = []
    with recording(), torch.no_grad(), schedule.watching() as watch:
        schedule.generate(model, cache)  # (compiles)
        for depth, name in zip(whole, map(depth_name, depths), strict=True):
            with forced_depth(depth):
                rows.append({"exit": name, "how": "forced", **_counts(model, cache, watch, depth)})
            if depth:
                rows.append({"exit": name, "how": "asked", **_counts(model, cache, watch, depth)})
    return rows


def _counts(model: PreTrainedModel, cache: StaticCache, watch: schedule.Watch, depth: int) -> dict:
    """Count what a captured step does: the first one warms up, the second one captures."""
    *_, events = (schedule.step(model, cache, watch, depth) for _ in range(3))
    kinds = [event.what for event in events]
    return {"graphs": kinds.count("launch"), "flags": kinds.count("wait"), "calls": kinds.count("run")}


def show(name: str, found: dict) -> None:
    """Print one model's tables."""
    print(f"\n{name}\n")
    headers = ["", "launches", "MB", "us", "tokens/s", "x never", "target", "needs", "us/launch", "modelled"]
    rows = []
    for row in found["tokens"]:
        needs = row["needs"] and f"{row['needs']:.0%}"
        left = row["seconds_per_launch"] and row["seconds_per_launch"] * 1e6
        rows.append([row["exit"], row["launches"], row["bytes"] / 1e6, round(row["seconds"] * 1e6)])
        rows[-1] += [
            round(row["tokens_per_s"]),
            row["over_never"],
            row["target"],
            needs,
            left,
            round(row["modelled_tokens_per_s"]),
        ]
    common.print_table(headers, rows)
    check = found["check"]
    print(f"\nExit checks, {check['checks']} of them, are {check['share_of_bytes']:.3%} of the bytes of a token that")
    print(f"never leaves; {CHECK_TARGET:.0%} of its time leaves {check['seconds_per_check'] * 1e6:.1f} us for each.")
    depth_3 = next((row["over_never"] for row in found["tokens"] if row["exit"] == "depth 3"), None)
    if depth_3 is not None:
        print(f"Depth 3 over the 16-bit model: {depth_3:.2f} by bytes, {SPEEDUP_TARGET} to reach.")
    bits = {"dense": 16, "bf12": 12, "w4": 4}
    print("\nExact mode by the kernels' cost model; bits of the backbone's weights and of the drafts' head.\n")
    headers = ["holds", "backbone", "head", "drafted", "tokens/cycle", "draft us", "verify us", "tokens/s", "x plain"]
    lines = []
    for row in found["exact"]:
        times = [round(row[key] * 1e6) for key in ("draft_seconds", "verify_seconds")]
        lines.append([row["hold"], bits[row["weights"]], bits[row["head"]], row["drafted"], row["tokens_per_cycle"]])
        lines[-1] += [*times, round(row["tokens_per_s"]), row["over_plain"]]
    common.print_table(headers, lines)
    print()
    headers = ["schedule", "", "graph launches", "flags", "other calls"]
    common.print_table(
        headers, [[row[k] for k in ("exit", "how", "graphs", "flags", "calls")] for row in found["schedule"]]
    )
