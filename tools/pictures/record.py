"""Records what pictures and the site's slider show: ``python -m tools.pictures.record NAME ...``, minutes each.

`cycles`: speculative decoding of one answer. `rule`: an exit rule's candidates. `thresholds`: the same answer at exit
thresholds, with each token's depth and its KL from full depth.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable
from typing import Any

import torch

import river_compile
from river_compile.cli import shared
from river_compile.evaluation.meter import Meter, compiled
from river_compile.exits import CRITERIA
from river_compile.kernels.native.machine import processor_name
from tools import demo_models
from tools.pictures import DATA

MODEL = "smollm2"
QUESTION = "Explain in a few sentences why the sky is blue."
NEW_TOKENS = 64
_SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.97)


def cycles() -> dict[str, Any]:
    """Return the cycles of one answer in exact mode with drafts of four, and the texts of its tokens but the first."""
    model, tokenizer = demo_models.load_or_exit(MODEL)
    fixed = {"num_assistant_tokens": 4, "num_assistant_tokens_schedule": "constant"}  # drafts do not rest on time
    river_compile.accelerate(model, background_packing=False, **fixed)
    _, ids = _answer(model, tokenizer)  # (warm: quantized and traced)
    river_compile.empty_cache(model)
    with river_compile.trace() as trace:
        _, ids = _answer(model, tokenizer)
    found = [{"drafted": c.drafted, "emitted": c.emitted, "width": c.width} for c in trace.cycles]
    return {"cycles": found, "texts": [tokenizer.decode([token]) for token in ids[1:]]}


def rule() -> dict[str, Any]:
    """Return an exit rule with its candidates, as `ExitRule.save` writes it."""
    model, tokenizer = demo_models.load_or_exit(MODEL)
    texts = shared.topics()[:60]
    found = river_compile.tune_exit(model, tokenizer, texts, kl=0.05, criterion="confidence", tokens=8)
    path = found.save(DATA / "rule.json")
    return json.loads(path.read_text(encoding="utf-8"))


def thresholds() -> dict[str, Any]:
    """Return depth and KL of each token of one answer, for exit thresholds from "all exit" to "none exits"."""
    model, tokenizer = demo_models.load_or_exit(MODEL)
    prompt, answer = _answer(model, tokenizer)
    sample = torch.tensor([[*prompt, *answer]])
    criterion = CRITERIA["similarity"]
    options = {"criterion": criterion.name, "threshold": criterion.never, "first_exit": 1}
    with torch.inference_mode(), compiled(model, options):
        meter = Meter(model, criterion, [sample], len(prompt), progress=True)
        scores = sorted(max(step.scores[1:]) for step in meter.references[0].steps)
        levels = dict.fromkeys(scores[min(int(share * len(scores)), len(scores) - 1)] for share in _SHARES)
        rules = [(criterion.always, 2), *((round(level, 4), 2) for level in levels)]
        measured = [meter.measure(rule, [0], f"threshold {rule[0]:.4f}") for rule in rules]
        measured.append(meter.full_depth([0]))
        states = [
            {
                "threshold": None if abs(found.rule[0]) > 1 else found.rule[0],  # (all exit, or none)
                "kl": [round(value, 4) for value in found.kl[0]],
                "depths": found.depths,
            }
            for found in measured
        ]
    texts = [tokenizer.decode([token]) for token in answer]
    return {"question": QUESTION, "texts": texts, "layers": meter.num_blocks, "states": states}


def _answer(model: Any, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the ids of the chat prompt and those of the model's greedy answer."""
    ids = shared.encode(tokenizer, QUESTION)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW_TOKENS, "do_sample": False}
    output = model.generate(ids, **options)[0].tolist()
    return output[: ids.shape[1]], output[ids.shape[1] :]


KINDS: dict[str, Callable[[], dict[str, Any]]] = {"cycles": cycles, "rule": rule, "thresholds": thresholds}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description="Records the data of pictures with a small model.")
    parser.add_argument("names", nargs="+", choices=[*KINDS], metavar="NAME", help=f"of {', '.join(KINDS)}")
    options = parser.parse_args(arguments)
    shared.quiet()
    for name in options.names:
        found = KINDS[name]()
        if name != "rule":  # (which has its own format)
            source = {
                "command": f"python -m tools.pictures.record {name}",
                "date": datetime.date.today().isoformat(),
                "model": demo_models.MODELS[MODEL].title,
                "cpu": processor_name(),
                "threads": torch.get_num_threads(),
            }
            text = json.dumps({**source, **found}, ensure_ascii=False)
            (DATA / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        print(f"recorded {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
