"""One call of `generate`, made of the plain model and of the same one accelerated, and compared field by field.

Compared are the result's class and fields, the cache's entries, the streamer's tokens, the error, and the numbers that
PyTorch's generator gives next. Neither the model's configurations nor the arguments may change.

Not handled: what a call prints or logs; times.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

import river_compile
from river_compile.errors import RiverError
from river_compile.reporting.trace import Trace

Arguments = dict[str, Any]

NEW_TOKENS = 10
TOLERANCE = 1e-4  # of float32 logits whose spread is about one
FIELDS = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}

# What an accelerated model does with a call.
DRAFTS = "drafts"  # and verifies them
STEPS = "no drafts"  # one token a pass, in River
FALLBACK = "transformers"  # runs it
RAISES = "error"  # of transformers, that both give
ANY = "any of them"


@dataclass(frozen=True)
class Case:
    """Arguments of a call, made for each one: processors and streamers have memories.

    Attributes:
        name: the argument that it is about.
        make: returns `generate`'s arguments for a model, the prompt included.
        does: what the accelerated model does with them, for a family whose every part River supports.
        plain: arguments that the plain model is given in place of some.
    """

    name: str
    make: Callable[[PreTrainedModel], Arguments]
    does: str = DRAFTS
    plain: Mapping[str, Any] = field(default_factory=dict)


class Streamed(BaseStreamer):
    """Keeps what it was given."""

    def __init__(self) -> None:
        self.seen: list[list] = []

    def put(self, value: Tensor) -> None:
        self.seen.append(value.tolist())

    def end(self) -> None:
        self.seen.append(["end"])


@dataclass
class Outcome:
    """What one call left behind."""

    result: Any = None
    error: str = ""
    raised: Exception | None = None
    streamed: list[list] = field(default_factory=list)
    next_numbers: list[float] = field(default_factory=list)


def outcome_of(model: PreTrainedModel, arguments: Arguments, config: bool = False, seed: int = 0) -> Outcome:
    """Calls `generate`, with its settings as keywords or in a config."""
    arguments = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "disable_compile": True, **arguments}
    found, streamer = Outcome(), arguments.get("streamer")
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # (of transformers about odd arguments, and of River about fallbacks)
        try:
            found.result = model.generate(**(by_config(arguments) if config else arguments))
        except Exception as error:
            found.raised = error
            found.error = f"{type(error).__name__}: {error}".rstrip(")")  # (one that torch's meta tensors add)
    found.next_numbers = torch.rand(2).tolist()
    found.streamed = [] if streamer is None else streamer.seen
    return found


def tensors_of(arguments: Arguments) -> Arguments:
    return {name: value for name, value in arguments.items() if isinstance(value, Tensor)}


def by_config(arguments: Arguments) -> Arguments:
    """Returns the same call with a GenerationConfig that holds all that it can hold."""
    known = vars(GenerationConfig()).keys() - {"transformers_version"}
    settings = {name: value for name, value in arguments.items() if name in known}
    rest = {name: value for name, value in arguments.items() if name not in known}
    return {**rest, "generation_config": GenerationConfig(**settings)}


class Peers:
    """The plain model and the same one accelerated, which are given the same calls."""

    def __init__(self, plain: PreTrainedModel, ours: PreTrainedModel) -> None:
        self.plain, self.ours = plain, ours
        self.compiles = True  # whether River has this family's layers
        self.breaks: Collection[str] = ()  # names of calls that may run in any way
        self.drafts = True  # whether the accelerated one does
        self.tolerance = TOLERANCE
        self.broken = False  # whether a comparison failed, after which nothing is known about later ones
        self.drafted = self.accepted = 0

    def compare(self, case: Case, fields: bool = True, config: bool = False) -> Trace:
        """Makes a call of both models and compares what it leaves; returns what the accelerated one did.

        Args:
            case: the call.
            fields: whether it returns a dict with scores and logits; else the ids alone.
            config: whether settings are given in a `GenerationConfig`.
        """
        self.broken = True
        wanted, ours = [{**(FIELDS if fields else {}), **case.make(model)} for model in (self.plain, self.ours)]
        plains_own = {**vars(self.plain.config)}
        expected = outcome_of(self.plain, {**wanted, **case.plain}, config)
        vars(self.plain.config).update(plains_own)  # (transformers' early exit leaves it changed after an error)
        before, configs = copy.deepcopy(tensors_of(ours)), self._configs()
        with river_compile.trace() as trace:
            found = outcome_of(self.ours, ours, config)
        label = f"{case.name}, {'fields' if fields else 'ids'}, by {'config' if config else 'keywords'}"
        # River's own error has another text, and is of the same kind.
        named = isinstance(found.raised, RiverError) and isinstance(found.raised, type(expected.raised))
        assert named or found.error == expected.error, (
            f"{label}: {found.error or 'no error'}, not {expected.error or 'none'}"
        )
        mask = wanted.get("attention_mask")
        assert_alike(*(fields_of(out.result, mask) for out in (found, expected)), self.tolerance, label)
        assert found.streamed == expected.streamed, f"{label}: the streamer was given other tokens"
        if not case.plain:
            assert found.next_numbers == expected.next_numbers, f"{label}: the generator ends elsewhere"
        assert self._configs() == configs, f"{label}: the call changed a config"
        assert_alike(tensors_of(ours), before, 0.0, f"{label}, arguments")
        self._check_kind(case, trace, expected, label)
        self.drafted += sum(len(cycle.drafted) for cycle in trace.cycles)
        self.accepted += sum(cycle.accepted for cycle in trace.cycles)
        self.broken = False
        return trace

    def _configs(self) -> tuple[dict, dict]:
        return self.ours.config.to_dict(), self.ours.generation_config.to_dict()

    def _check_kind(self, case: Case, trace: Trace, expected: Outcome, label: str) -> None:
        """Asserts that a call ran as it should, so that no comparison is one of transformers with itself."""
        if case.does == RAISES or case.does == DRAFTS:
            assert bool(expected.error) == (case.does == RAISES), f"{label}: plain gives {expected.error or 'no error'}"
        did = DRAFTS if any(cycle.drafted for cycle in trace.cycles) else STEPS if trace.steps else FALLBACK
        if self.compiles and case.does in (DRAFTS, STEPS, FALLBACK) and case.name not in self.breaks:
            wanted = STEPS if case.does == DRAFTS and not self.drafts else case.does
            assert did == wanted, f"{label}: {did} instead of {wanted}"


def assert_alike(found: Any, expected: Any, tolerance: float, label: str) -> None:
    """Asserts that two results have the same classes and fields, equal ids, and numbers within the tolerance."""
    assert type(found) is type(expected), f"{label}: {type(found).__name__} instead of {type(expected).__name__}"
    if isinstance(expected, Tensor):
        torch.testing.assert_close(
            found,
            expected,
            **dict.fromkeys(("rtol", "atol"), tolerance if expected.is_floating_point() else 0),
            equal_nan=True,
            msg=lambda text: f"{label}: {text}",
        )
    elif isinstance(expected, dict):
        assert list(found) == list(expected), f"{label}: {list(found)} instead of {list(expected)}"
        for name, value in expected.items():
            assert_alike(found[name], value, tolerance, f"{label}, {name}")
    elif isinstance(expected, (tuple, list)):
        assert len(found) == len(expected), f"{label}: {len(found)} instead of {len(expected)}"
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_alike(one, other, tolerance, f"{label} {i}")
    else:
        assert found == expected, label


def fields_of(result: Any, mask: Tensor | None) -> Any:
    """Returns a result's class and fields, with caches as their entries."""
    if not isinstance(result, ModelOutput):
        return result
    fields = {name: entries(value, mask) if isinstance(value, Cache) else value for name, value in result.items()}
    return {"class": type(result).__name__, **fields}


def entries(cache: Cache, mask: Tensor | None) -> list[tuple]:
    """Returns the class, length, keys and values of each layer: the filled slots, zeros where the prompt is padding.

    No token sees padding's entries, and caches of two kinds have others there.
    """
    layers: list[tuple] = []
    for layer in cache.layers:
        if not layer.is_initialized:  # of a model that does not use it
            layers.append((type(layer).__name__,))
            continue
        length = int(layer.get_seq_length())
        held = [tensor[:, :, : min(length, tensor.shape[2])] for tensor in (layer.keys, layer.values)]
        if mask is not None:
            padding = pad(mask == 0, (0, length - mask.shape[1]))[:, length - held[0].shape[2] :]  # (a window's last)
            padding = padding.repeat_interleave(len(held[0]) // len(mask), 0)
            held = [tensor.masked_fill(padding[:, None, :, None], 0) for tensor in held]
        layers.append((type(layer).__name__, length, list(layer.keys.shape), *held))
    return layers


def shuffled(names: Sequence[str]) -> dict[str, str]:
    """Returns for each name another one, each once, in the same order in every run and for any table."""
    order = sorted(names, key=lambda name: (sum(map(ord, name)) * 7919 % 1009, name))
    return dict(zip(order, order[1:] + order[:1], strict=True))
