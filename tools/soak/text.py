"""Cases of kind "text": a model goes through random calls, and every text is the plain model's.

Twins are unquantized, so wherever a token exits its logits are the plain model's up to rounding. Each step's logits are
compared up to the first token where two texts part, which must be a near-tie. A case that differs runs again in
float64: a difference that is gone there was rounding. Not handled: exact mode with sampling, equal in distribution.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation import StoppingCriteriaList
from transformers.generation.stopping_criteria import StopStringCriteria

import river_compile
from river_compile.backend import river
from river_compile.decoding.mode import exact
from river_compile.exits import forced_depth
from river_compile.upstream.transformers import cache_argument
from tests.support.decoding import new_cache
from tests.support.families import REWRITTEN, VOCABULARY, make, prompt
from tests.support.lowerings import UNQUANTIZED
from tests.support.recorder import recording
from tests.support.tokenizers import byte_tokenizer
from tools.soak.cases import Case, Failure, refused_by_us

TOLERANCE = {"float32": 1e-3, "float64": 1e-6}
ALWAYS = {"kernels": UNQUANTIZED}
HELD = ("static", "dynamic", "mine")  # caches: transformers' two, and a static one of the caller's
WAYS = ("in place", "data", "parameter", "load")


class Differs(Failure):
    """Logits or text are not the plain model's."""


def draw(rng: random.Random) -> Case:
    layers = rng.choice((2, 2, 3))
    steps = [{"do": "compile", "options": _options(rng, layers)}]
    steps += [_step(rng, layers) for _ in range(rng.randint(2, 5))]
    return {"family": rng.choice(REWRITTEN), "layers": layers, "weights": rng.randrange(1000), "steps": steps}


def _options(rng: random.Random, layers: int) -> dict[str, Any]:
    criterion = rng.choice(("similarity", "confidence"))
    is_cosine = criterion == "similarity"
    options: dict[str, Any] = {"criterion": criterion, "first_exit": rng.randint(1, layers)}
    options["threshold"] = round(rng.uniform(-1, 1) if is_cosine else rng.uniform(0, 5), 2)
    if criterion == "similarity" and rng.random() < 0.2:
        options["threshold"] = [round(rng.uniform(-1, 1), 2) for _ in range(layers)]
    if criterion == "similarity" and rng.random() < 0.2:
        options["exit_depth"] = rng.randint(0, layers)
    if rng.random() < 0.2 and criterion == "similarity":
        options["prefill"] = "exit"
    if rng.random() < 0.2:
        options["graphs"] = True
    return options


def _step(rng: random.Random, layers: int) -> Case:
    others = ("compile", "weights", "gradient", "no cache", "reset", "hooked sibling")
    do = rng.choice(("generate",) * 5 + ("exact",) * 3 + others)
    step: Case = {"do": do, "seed": rng.randrange(1000)}
    if do == "compile":
        step["options"] = _options(rng, layers)
    if do == "weights":
        step["how"] = rng.choice(WAYS)
    if do in ("generate", "exact", "gradient", "no cache"):
        step["lengths"] = [rng.choice((1, 2, 5, 9, 14)) for _ in range(rng.choice((1, 1, 2, 3)))]
    if do in ("generate", "exact"):
        step["cache"] = rng.choice(HELD)
        step["arguments"] = {"max_new_tokens": rng.choice((2, 6, 20))}
    if do == "generate" and rng.random() < 0.4:
        temperature, top_k = rng.choice((0.5, 1.0, 1.5)), rng.choice((3, 50))
        step["arguments"] |= {"do_sample": True, "temperature": temperature, "top_k": top_k}
    if do == "generate" and rng.random() < 0.2:
        step["depth"] = rng.randint(0, layers)
    if do in ("generate", "exact") and rng.random() < 0.2:
        step["arguments"]["repetition_penalty"] = 1.3
    if do in ("generate", "exact"):
        step |= _oddities(rng)
    if do == "exact":
        step["arguments"] |= {"num_assistant_tokens": rng.choice((1, 3, 5))}
        step["arguments"]["prompt_lookup"] = rng.random() < 0.5
    return step


def _oddities(rng: random.Random) -> Case:
    """Return what few calls have. (Dead ends are sampled in exact mode too: there is no text to compare.)"""
    odd: Case = {}
    if rng.random() < 0.15:
        odd["ids"] = "int32"
    if rng.random() < 0.15:
        odd["stop"] = [chr(rng.randrange(33, 127)) for _ in range(8)]
    if rng.random() < 0.1:
        odd["dead_end"] = rng.choice(("greedy", "sampled"))
    return odd


def run(case: Case, folder: Path) -> str:
    """Run the steps in float32, and in float64 where that differs from the plain model."""
    try:
        return _run(case, "float32")
    except Differs:
        _run(case, "float64")
        return "rounding"


def smaller(case: Case) -> Iterator[Case]:
    steps = case["steps"]
    for i in range(1, len(steps)):
        yield {**case, "steps": [*steps[:i], *steps[i + 1 :]]}
    for i, step in enumerate(steps):
        for name in ("ids", "stop", "dead_end"):
            if name in step:
                less = {key: value for key, value in step.items() if key != name}
                yield {**case, "steps": [*steps[:i], less, *steps[i + 1 :]]}
        for part in ("options", "arguments"):
            for name in step.get(part, {}):
                if name != "max_new_tokens":
                    less = {key: value for key, value in step[part].items() if key != name}
                    yield {**case, "steps": [*steps[:i], {**step, part: less}, *steps[i + 1 :]]}
        if len(step.get("lengths", [])) > 1:
            for j in range(len(step["lengths"])):
                less = [*step["lengths"][:j], *step["lengths"][j + 1 :]]
                yield {**case, "steps": [*steps[:i], {**step, "lengths": less}, *steps[i + 1 :]]}


def _run(case: Case, dtype: str) -> str:
    torch._dynamo.reset()
    models = [make(case["family"], getattr(torch, dtype), case["weights"], case["layers"]) for _ in range(2)]
    walk = Walk(case["family"], *models, tolerance=TOLERANCE[dtype])
    with recording():
        outcomes = [walk.step(step) for step in case["steps"]]
    return next((outcome for outcome in outcomes if outcome != "passed"), "passed")


class Walk:
    """The plain model and the same one compiled, which take the same steps."""

    def __init__(self, family: str, plain: PreTrainedModel, ours: PreTrainedModel, tolerance: float) -> None:
        self.family, self.plain, self.ours, self.tolerance = family, plain, ours, tolerance

    def step(self, step: Case) -> str:
        """Take one step and return its outcome; raise a Failure, or what the product raised and must not."""
        do = step["do"]
        if do == "compile":
            self.ours.compile(backend=river, options={**ALWAYS, **step["options"]})
        elif do == "reset":
            torch._dynamo.reset()
        elif do == "weights":
            for model in (self.plain, self.ours):
                change_weights(model, step["how"], step["seed"])
        elif do in ("gradient", "no cache"):
            self._forward(step)
        elif do == "hooked sibling":
            self._hooked_sibling(step)
        else:
            return self._generate(step)
        return "passed"

    def _forward(self, step: Case) -> None:
        ids, mask = padded(step["lengths"], step["seed"])
        with torch.set_grad_enabled(step["do"] == "gradient"), warnings.catch_warnings():
            warnings.simplefilter("ignore", river_compile.RiverWarning)  # (such a graph is left to Inductor)
            expected, ours = (
                model(input_ids=ids, attention_mask=mask, use_cache=False).logits for model in (self.plain, self.ours)
            )
        counts = mask.bool()
        check_close(ours.detach()[counts], expected.detach()[counts], self.tolerance, step["do"])

    def _hooked_sibling(self, step: Case) -> None:
        """A model of the same class breaks its graph at hooks, and the next one runs through River all the same."""
        dtype, call = self.plain.dtype, {**step, "lengths": [5], "cache": "dynamic", "arguments": {"max_new_tokens": 4}}
        hooked, whole = (make(self.family, dtype, step["seed"] + i, layers=2) for i in range(2))
        expected = [generate(model, call, {}) for model in (hooked, whole)]
        for block in (block for blocks in hooked.modules() if isinstance(blocks, nn.ModuleList) for block in blocks):
            block.register_forward_hook(torch.compiler.disable(lambda module, args, output: output))
        for model, wanted in zip((hooked, whole), expected, strict=True):
            river_compile.accelerate(model, **ALWAYS)
            with warnings.catch_warnings(), river_compile.trace() as trace:
                warnings.simplefilter("ignore", river_compile.RiverWarning)
                compare(generate(model, call, {}), wanted, 1, self.tolerance)
        if not trace.steps:
            raise Failure(f"River of a {type(whole).__name__} is off after one with hooks")

    def _generate(self, step: Case) -> str:
        expected = outcome_of(self.plain, step, {})
        more = {"custom_generate": exact} if step["do"] == "exact" else {}
        with (
            warnings.catch_warnings(record=True) as said,
            river_compile.trace() as trace,
            forced_depth(step.get("depth")),
        ):
            warnings.simplefilter("always")
            try:
                ours = outcome_of(self.ours, step, more)
            except ValueError as error:
                if refused_by_us(error):
                    return f"refused ({type(error).__name__})"
                raise
        if isinstance(ours, str) or isinstance(expected, str):
            if ours == expected:
                return "plain's error"
            raise Failure(f"{ours if isinstance(ours, str) else 'a text'} instead of {expected}")
        passes = len(expected.logits) if step["do"] == "generate" else 1
        if len(trace.steps) < passes and not any(issubclass(w.category, river_compile.RiverWarning) for w in said):
            raise Failure(f"{len(trace.steps)} of {passes} passes reached River in step {step}, without a word")
        return compare(ours, expected, len(step["lengths"]), self.tolerance)


def outcome_of(model: PreTrainedModel, step: Case, more: dict[str, Any]) -> Any:
    """Return what `generate` returns, or what its error says where scores that leave no token are sampled from."""
    if step.get("dead_end") != "sampled":
        return generate(model, step, more)
    try:
        return generate(model, step, more)
    except RuntimeError as error:
        return str(error)


def generate(model: PreTrainedModel, step: Case, more: dict[str, Any]) -> Any:
    """Generate as a step says; drafts' options go to exact mode alone."""
    ids, mask = padded(step["lengths"], step["seed"])
    drafting = ("num_assistant_tokens", "prompt_lookup", "adaptive")
    arguments = {name: value for name, value in step["arguments"].items() if more or name not in drafting}
    arguments = {"do_sample": False, **arguments, **more}
    if step.get("ids") == "int32":
        ids = ids.int()
    if "stop" in step:
        stops = StopStringCriteria(byte_tokenizer(), step["stop"])
        arguments["stopping_criteria"] = StoppingCriteriaList([stops])  # (a bare mode is not given the tokenizer)
    if "dead_end" in step:
        arguments |= {"suppress_tokens": [*range(VOCABULARY)], "do_sample": step["dead_end"] == "sampled"}
    if step["cache"] == "static":
        arguments["cache_implementation"] = "static"
    elif step["cache"] == "mine":
        room = ids.shape[1] + arguments["max_new_tokens"] + step["seed"] % 9
        arguments[cache_argument(model)] = new_cache(model, "static", room)
    torch.manual_seed(step["seed"])
    return model.generate(
        ids, attention_mask=mask, disable_compile=True, return_dict_in_generate=True, output_logits=True, **arguments
    )


def padded(lengths: list[int], seed: int) -> tuple[Tensor, Tensor]:
    """Return ids and mask ``[batch, longest]``, padded on the left."""
    longest = max(lengths)
    ids = prompt(longest, len(lengths), seed)
    mask = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


def compare(ours: Any, expected: Any, batch: int, tolerance: float) -> str:
    """Compare two generations: logits up to where their texts part, and that only a near-tie parts them."""
    new = len(expected.logits)
    outcome = "passed"
    if ours.sequences.shape != expected.sequences.shape:
        raise Differs(f"{tuple(ours.sequences.shape)} tokens instead of {tuple(expected.sequences.shape)}")
    for row in range(batch):
        texts = [out.sequences[row, -new:] for out in (ours, expected)]
        same = (texts[0] == texts[1]).long().cumprod(0).sum().item()
        for token in range(min(same + 1, new)):
            actual, wanted = (out.logits[token][row] for out in (ours, expected))
            check_close(actual, wanted, tolerance, f"row {row}, token {token}")
        outcome = outcome if same == new else "near-tie"
    return outcome


def check_close(actual: Tensor, expected: Tensor, tolerance: float, where: str) -> None:
    worst = (actual - expected).abs().max().item()
    if not worst <= tolerance * max(1.0, expected.abs().max().item()):
        raise Differs(f"{where}: logits are off by {worst:.2g}")


@torch.no_grad()
def change_weights(model: PreTrainedModel, how: str, seed: int) -> None:
    """Change one matrix of a block, the same one in any copy of a model."""
    matrices = [(name, p) for name, p in model.named_parameters() if p.dim() == 2 and ".0." in name]
    name, parameter = matrices[seed % len(matrices)]
    changed = parameter.detach().flip(0) * 0.9
    if how == "in place":
        parameter.copy_(changed)
    elif how == "data":
        parameter.data = changed
    elif how == "load":
        model.load_state_dict({name: changed}, strict=False)
    else:
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, torch.nn.Parameter(changed))
