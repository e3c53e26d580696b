"""The options of the backend: ``torch.compile(model, backend="river", options={...})``.

Each option is defined once: default, allowed values, one sentence and audience. ``python -m tools.options`` writes the
tables of docs/options.md from here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from river_compile.errors import OptionError
from river_compile.exits import CRITERIA, WHOLE, ExitPolicy, Threshold
from river_compile.kernels.checks import PATH, Check, did_you_mean, integer, number, one_of, optional, short_repr
from river_compile.kernels.quant.calibrated import OBSERVING
from river_compile.kernels.quant.data_free import QUANTIZERS
from river_compile.kernels.quant.grid import GROUP_SIZES
from river_compile.passes.program import DecoderPlan, Lowering, Program

USER, EXPERT = "user", "expert"
_A_SCORE = number("it must be a number, such as 0.7, a list with one for each depth from 1 on, or nats of entropy")
_A_BUDGET = number("it must be a number above 0, in nats per token, such as 0.05")
_KERNELS = one_of("auto", "triton", "native")
_MODE = optional(one_of("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"))


@dataclass(frozen=True)
class Option:
    """An option's properties beyond its name, type and default."""

    check: Check
    text: str  # its effect, in Markdown
    audience: str = USER


def _option(default: object, check: Check, text: str, audience: str = USER) -> Any:
    return dataclasses.field(default=default, metadata={"option": Option(check, text, audience)})


def _one_or_several(value: object) -> bool:
    return bool(value) and all(map(_A_SCORE.allows, value)) if isinstance(value, tuple) else _A_SCORE.allows(value)


@dataclass(frozen=True, kw_only=True)
class RiverConfig:
    """Options of the backend, checked; ``RiverConfig.options()`` describes them.

        river_compile.RiverConfig(threshold=0.9, first_exit=4)  # raises if a value is not allowed

    Raises:
        OptionError: (a ``ValueError``) a value that is not allowed, or does not go with another one.
    """

    criterion: str = _option(
        "similarity",
        one_of(*CRITERIA),
        'exits depend on `"similarity"` of a layer\'s output to its input, or `"confidence"` of the last prediction '
        "([modes](modes.md#exit-criteria))",
    )
    threshold: Threshold | None = _option(
        None,
        optional(Check(_A_SCORE.requirement, _one_or_several)),
        "similarity: a cosine to exceed, or a list, one for each depth (0.7); confidence: nats to stay below (0.5)",
    )
    first_exit: int = _option(2, integer(0), "smallest exit depth, in 16-bit layers; 0 is allowed with confidence")
    exit_depth: int | None = _option(
        None,
        optional(integer(0, "it must be an integer from 0 to the number of layers")),
        "one exit depth for every token: 0 (all layers in 4 bits) to L (full depth)",
    )
    budget: float | None = _option(
        None,
        optional(Check(_A_BUDGET.requirement, lambda value: _A_BUDGET.allows(value) and 0 < value < math.inf)),
        'largest mean KL from full depth, in nats per token, that `accelerate(model, "fast")` tunes threshold and exit '
        "depth to (0.05), unless options or `calibration` have a rule ([modes](modes.md#fast))",
    )
    quantizer: str = _option(
        "gptq",
        one_of(*OBSERVING, *QUANTIZERS),
        '4-bit method: `"gptq"`, `"awq"`, `"mse"`, `"hqq"`, `"rtn"`, or `"symmetric"` for `export` '
        "([quantizers](startup.md#quantizers))",
    )
    prefill: str = _option(
        "backbone",
        one_of("backbone", "exit"),
        '`"exit"`: the whole prompt exits at the first depth where its least similar token passes the threshold',
    )
    lm_head: str | None = _option(
        None,
        one_of(None, "keep", "w4"),
        'head after an exit: `"keep"` in 16 bits, or `"w4"` in 4 bits; `None`: w4 with C++ kernels '
        "([modes](modes.md#fast))",
    )
    twins: str | Path | None = _option(
        None,
        optional(PATH),
        "a folder of `save_twins` or `river quantize`, which is read instead of quantizing "
        "([startup](startup.md#saved-twins))",
    )
    on_missing_twins: str = _option(
        "raise",
        one_of("raise", "save"),
        '`"save"`: if `twins` does not exist, one process writes it, and others wait '
        "([startup](startup.md#many-processes))",
    )
    offload: int | None = _option(
        None,
        optional(integer(0, "it must be an integer from 0 to the number of layers - 1")),
        "16-bit layers that stay in device memory; later ones are offloaded ([hardware](hardware.md#offloading))",
    )
    offload_policy: str | None = _option(
        None,
        one_of(None, "exit", "fetch"),
        '`"exit"`: every token exits by that depth; `"fetch"`: later layers are streamed in when a token continues; '
        "`None`: fetch in exact mode, else exit",
    )
    on_unsupported: str = _option(
        "inductor",
        one_of("inductor", "raise"),
        '`"inductor"`: it compiles an unsupported graph, with a warning; `"raise"`: an unsupported graph is an error',
    )
    group_size: int = _option(
        64,
        one_of(*GROUP_SIZES),
        "weights that share a scale and zero-point: 32, 64 or 128; fewer, but at least 32, if a row is no multiple",
        EXPERT,
    )
    target_kernels: str | None = _option(
        None,
        one_of(None, "model", "river"),
        '16-bit matmuls: the `"model"`\'s operators, or row-invariant kernels of `"river"`; `None`: river on a CPU',
        EXPERT,
    )
    target_weights: str = _option(
        "auto",
        one_of("auto", "model", "12bit", "8bit"),
        '16-bit layers read the `"model"`\'s tensors, or lossless `"12bit"` or `"8bit"` copies; `"auto"`: the faster '
        "([hardware](hardware.md#12-bit-weights))",
    )
    exit_every: int = _option(1, integer(1), "distance between depths with an exit check", EXPERT)
    kernels: str | Lowering = _option(
        "auto",
        replace(_KERNELS, allows=lambda value: isinstance(value, Lowering) or _KERNELS.allows(value)),
        '`"native"`: C++; `"triton"`: generated; `"auto"`: native, on a GPU triton ([kernels](kernels.md))',
        EXPERT,
    )
    graphs: bool | None = _option(
        None,
        one_of(None, True, False),
        "whether passes of a few tokens are captured, as CUDA graphs or as tapes on a CPU; `None`: by device",
        EXPERT,
    )
    offload_dir: str | Path | None = _option(
        None,
        optional(PATH),
        "folder for the offloaded weights of a model on the CPU; `None`: `TMPDIR`, else `/var/tmp`",
        EXPERT,
    )

    def __post_init__(self) -> None:
        for name, option in self.options().items():
            self._set(name, option.check)
        criterion = CRITERIA[self.criterion]
        if self.threshold is None:
            none_yet = self.budget is not None
            object.__setattr__(self, "threshold", criterion.never if none_yet else criterion.threshold)
        if self.offload_policy is None:
            verified = self.moves_weights and self.first_exit == WHOLE  # drafts are, by all layers
            object.__setattr__(self, "offload_policy", "fetch" if verified else "exit")
        if criterion.reads == "block":
            self._set("first_exit", integer(1))
        else:
            wanted = f"an entropy in nats of 0 or more, such as {criterion.threshold}"
            self._set("threshold", number(f"it must be {wanted}, with criterion={criterion.name!r}", least=0))
        for contradiction in (*self._contradictions(), *self._unreachable()):
            raise OptionError(contradiction, id="RC003")

    def _set(self, name: str, check: Check) -> None:
        object.__setattr__(self, name, check(name, getattr(self, name), OptionError))

    def _contradictions(self) -> Iterator[str]:
        if self.prefill == "exit" and CRITERIA[self.criterion].reads != "block":
            yield (
                f"prefill='exit' is not available with criterion={self.criterion!r}, which needs the logits of the "
                "prompt first. Use prefill='backbone', or criterion='similarity'"
            )
        if self.offload is None and self.offload_policy == "fetch":
            yield "offload_policy='fetch' requires offload=. Set offload to the number of layers that stay in memory"
        if self.budget is not None:
            yield from self._untunable()
        if self.twins is None and self.on_missing_twins == "save":
            yield "on_missing_twins='save' requires twins=. Set twins to the folder to write"

    def _untunable(self) -> Iterator[str]:
        """Yield options that leave nothing to tune, or that tuning does not know."""
        criterion = CRITERIA[self.criterion]
        if criterion.reads == "block":
            yield (
                f"budget={self.budget} tunes an entropy, and criterion={self.criterion!r} reads none. Use "
                "criterion='confidence', or tune_exit"
            )
        for name in ("threshold", "exit_depth"):
            given = getattr(self, name)
            if given is not None and not (name == "threshold" and given == criterion.never):
                yield f"budget={self.budget} tunes the exit rule, which {name}={given} sets. Remove one of the two"
        if self.deepest is not None:
            yield (
                f"budget={self.budget} compares with full depth, and no token goes further than layer {self.deepest}. "
                "Use offload_policy='fetch', or give a rule"
            )

    def _unreachable(self) -> Iterator[str]:
        """Yield options that ask for layers which no token reaches."""
        k = self.deepest
        if k is None:
            return
        nowhere = f"offload={k}, after which offload_policy='exit' lets no token go"
        if self.exit_depth is not None:
            if self.exit_depth > k:
                yield (
                    f"exit_depth={self.exit_depth} lies beyond {nowhere}. "
                    f"Use exit_depth={k}, offload={self.exit_depth} or offload_policy='fetch'"
                )
        elif k < self.first_exit < WHOLE:
            yield (
                f"first_exit={self.first_exit} lies beyond {nowhere}. "
                f"Use offload={self.first_exit} or more, exit_depth={k} or offload_policy='fetch'"
            )

    @property
    def moves_weights(self) -> bool:
        """Whether weights of 16-bit layers may lie at another address in every run."""
        return self.offload is not None

    @property
    def packs_twins(self) -> bool:
        """False if twins read the 16-bit weights."""
        return not (isinstance(self.kernels, Lowering) and self.kernels.layout is None)

    @property
    def runs_by_operator(self) -> bool:
        """True if nothing is compiled."""
        return isinstance(self.kernels, Lowering) and self.kernels.compiler == "eager"

    @property
    def deepest(self) -> int | None:
        """Largest exit depth; None: full depth."""
        return self.offload if self.offload_policy == "exit" else None

    def exit_policy(self, plan: DecoderPlan | Program) -> ExitPolicy:
        """Return when the tokens of a graph exit."""
        assert self.threshold is not None, "checking an option without a value sets the criterion's own"
        leaves = plan.is_decode or self.prefill == "exit"
        return ExitPolicy(
            criterion=CRITERIA[self.criterion if self.exit_depth is None else "similarity"],
            threshold=self.threshold,
            first_exit=self.first_exit,
            exit_every=self.exit_every,
            fixed_depth=self.exit_depth if leaves else plan.num_blocks,
            deepest=self.deepest if leaves and self.exit_depth != plan.num_blocks else None,
        )

    @classmethod
    def options(cls) -> dict[str, Option]:
        """Return the options' properties by name."""
        return {field.name: field.metadata["option"] for field in dataclasses.fields(cls)}

    @classmethod
    def choices(cls, name: str) -> tuple[Any, ...]:
        """Return the allowed values of an option that has a fixed set."""
        return cls.options()[name].check.choices

    @classmethod
    def from_options(cls, options: Mapping[str, object] | None) -> RiverConfig:
        """Build a config from the ``options`` of ``torch.compile``.

        Raises:
            OptionError: (a ``ValueError``) an unknown name or a bad value.
        """
        names = list(cls.options())
        given: dict[str, Any] = dict(options or {})
        unknown = next((name for name in given if name not in names), None)
        if unknown is not None:
            raise OptionError(
                f"Unknown option {short_repr(unknown)} of backend='river'. Options are {', '.join(names)}"
                f"{did_you_mean(unknown, names)}",
                id="RC001",
            )
        return cls(**given)

    def check_depths(self, num_blocks: int) -> None:
        """Raise an OptionError for depths that a model with `num_blocks` layers does not have."""
        if self.offload is not None and self.offload >= num_blocks:
            raise OptionError(
                f"offload={self.offload} leaves none of {num_blocks} layers to offload. Use 0 to {num_blocks - 1}, or "
                "remove it",
                id="RC004",
            )
        name, least, never = ("first_exit", 1, "") if self.exit_depth is None else ("exit_depth", 0, " (= full depth)")
        if num_blocks < getattr(self, name) < WHOLE:
            raise OptionError(
                f"{name}={getattr(self, name)} lies beyond the last of {num_blocks} layers. "
                f"Use {least} to {num_blocks}{never}",
                id="RC004",
            )


def check_mode(mode: str | None) -> str | None:
    """Return ``torch.compile``'s mode as Inductor takes it, None for the default; raise an OptionError."""
    mode = _MODE("mode", mode, OptionError)
    return None if mode == "default" else mode
