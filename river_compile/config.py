"""The options of the backend: ``torch.compile(model, backend="river", options={...})``.

Each option stands once, in :class:`RiverConfig`: its default, what is allowed, one sentence, and who it is for.
The tables of README and docs/options.md are made from there (``python -m tools.options``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from river_compile.errors import OptionError
from river_compile.exits import CRITERIA, WHOLE, ExitPolicy, Threshold
from river_compile.kernels.checks import PATH, Check, did_you_mean, integer, number, one_of, optional, short_repr
from river_compile.kernels.quant.calibrated import OBSERVING
from river_compile.kernels.quant.grid import GROUP_SIZES, QUANTIZERS
from river_compile.passes.program import DecoderPlan, Program

USER, EXPERT = "user", "expert"
_A_SCORE = number("it must be a number, such as 0.7, a list with one for each depth from 1 on, or nats of entropy")
_MODE = optional(one_of("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"))


@dataclass(frozen=True)
class Option:
    """What is known of an option beside its name, type and default.

    Attributes:
        check: what it may be, whatever the other options are.
        text: what it does, in Markdown.
        audience: "user", or "expert" for what few will need.
        for_tests: another value that is for tests and debugging, and what it does; messages do not list it.
    """

    check: Check
    text: str
    audience: str = USER
    for_tests: tuple[str, str] | None = None


def _option(
    default: object, check: Check, text: str, audience: str = USER, for_tests: tuple[str, str] | None = None
) -> Any:
    return dataclasses.field(default=default, metadata={"option": Option(check, text, audience, for_tests)})


def _one_or_several(value: object) -> bool:
    return bool(value) and all(map(_A_SCORE.allows, value)) if isinstance(value, tuple) else _A_SCORE.allows(value)


@dataclass(frozen=True, kw_only=True)
class RiverConfig:
    """Options of the backend, checked; ``RiverConfig.options()`` says what each one does.

    Raises:
        OptionError: (a ``ValueError``) a value that is not allowed, or does not go with another one.
    """

    criterion: str = _option(
        "similarity",
        one_of(*CRITERIA),
        'which tokens leave: `"similarity"` (of a block\'s output to its input) or `"confidence"` (the previous '
        "step's logits were sure) ([docs/criteria.md](docs/criteria.md))",
    )
    threshold: Threshold | None = _option(
        None,
        optional(Check(_A_SCORE.requirement, _one_or_several)),
        "0.7 for similarity: a cosine to exceed (1 never leaves), or a list with one for each depth from 1 on; "
        "0.5 for confidence: nats of entropy to stay below (0 never leaves)",
    )
    first_exit: int = _option(
        2, integer(0), "smallest exit depth, in backbone blocks executed; may be 0 for confidence"
    )
    exit_depth: int | None = _option(
        None,
        optional(integer(0, "it must be an integer from 0 to the number of blocks")),
        "one depth for every token: 0 (all blocks in 4 bits) to L (never leave)",
    )
    quantizer: str = _option(
        "gptq",
        one_of(*OBSERVING, *QUANTIZERS),
        '4-bit quantization method: `"gptq"` and `"awq"` calibrate on text that the model samples, or on '
        '`calibration_data=`; `"hqq"` and `"rtn"` need no data; `"symmetric"` is for `river_compile.export` '
        "([docs/twins.md](docs/twins.md))",
        for_tests=("none", "twins keep the backbone's 16-bit weights"),
    )
    prefill: str = _option(
        "backbone",
        one_of("backbone", "exit"),
        '`"exit"`: the whole prompt leaves at the first depth where its least similar token passes the threshold',
    )
    lm_head: str | None = _option(
        None,
        one_of(None, "keep", "w4"),
        'the head of tokens that left: `"keep"` in 16 bits, or `"w4"`, its largest logits computed anew in 16 bits; '
        "`None`: w4 with the C++ kernels, else keep ([docs/quality.md](docs/quality.md))",
    )
    twins: str | Path | None = _option(
        None,
        optional(PATH),
        "a folder written by `river_compile.save_twins`: its packed twins are read instead of made",
    )
    on_missing_twins: str = _option(
        "raise",
        one_of("raise", "save"),
        '`"save"`: if `twins` does not exist, one process packs the twins and writes it, and those that start at '
        "the same time wait; all of them map it ([docs/twins.md](docs/twins.md#many-processes))",
    )
    offload: int | None = _option(
        None,
        optional(integer(0, "it must be an integer from 0 to the number of blocks - 1")),
        "backbone blocks that stay in device memory; the weights of those after them leave it "
        "([docs/offloading.md](docs/offloading.md))",
    )
    offload_policy: str = _option(
        "exit",
        one_of("exit", "fetch"),
        'every token leaves by that depth; `"fetch"`: blocks are streamed in for tokens that go on',
    )
    on_unsupported: str = _option(
        "inductor",
        one_of("inductor", "raise"),
        'a graph that cannot be rewritten runs as Inductor runs it, with a warning; `"raise"`: it is an error',
    )
    group_size: int = _option(
        64,
        one_of(*GROUP_SIZES),
        "weights of a row that share a scale and a zero: 32, 64 or 128; a matrix that it does not divide takes "
        "the largest power of two that does, or stays in 16 bits below 32",
        EXPERT,
    )
    target_kernels: str | None = _option(
        None,
        one_of(None, "model", "river"),
        'the matmuls of the 16-bit blocks: the `"model"`\'s own operators, or `"river"`: the C++ '
        "kernels, which give a row the same bits among any number of rows, or the generated ones; `None`: river if "
        "twins are C++ ([docs/lowering.md](docs/lowering.md))",
        EXPERT,
    )
    target_weights: str = _option(
        "model",
        one_of("auto", "model", "12bit", "8bit"),
        'how the kernels read the weights of the 16-bit blocks: the `"model"`\'s own tensors, or packed without loss: '
        '`"12bit"`, of bfloat16, and `"8bit"`, of what a file in 8 bits was loaded to; `"auto"`: 12bit where it was '
        "measured to be faster on this machine ([docs/lowering.md](docs/lowering.md#weights-in-12-bits))",
    )
    exit_every: int = _option(1, integer(1), "distance between depths with a check", EXPERT)
    kernels: str = _option(
        "auto",
        one_of("auto", "inductor", "triton", "native"),
        '`"native"`: matmuls are C++ kernels, the default on a CPU; `"triton"`: twins become generated kernels, the '
        'default on a GPU (on a CPU in Triton\'s interpreter, very slow); `"inductor"`: 4-bit matmuls are operators of '
        "their own (on a CPU in plain torch, slow) ([docs/lowering.md](docs/lowering.md))",
        EXPERT,
        for_tests=("eager", "the rewritten graph runs operator by operator, with the bits of the model run eagerly"),
    )
    graphs: bool | None = _option(
        None,
        one_of(None, True, False),
        "whether passes of a few tokens on a static cache are captured and replayed; `None`: on a GPU "
        "([docs/cuda.md](docs/cuda.md))",
        EXPERT,
    )
    offload_dir: str | Path | None = _option(
        None,
        optional(PATH),
        "the folder for the offloaded weights of a model on the CPU; `None`: `TMPDIR`, else `/var/tmp`",
        EXPERT,
    )

    def __post_init__(self) -> None:
        for name, option in self.options().items():
            if option.for_tests is None or getattr(self, name) != option.for_tests[0]:
                self._set(name, option.check)
        criterion = CRITERIA[self.criterion]
        if self.threshold is None:
            object.__setattr__(self, "threshold", criterion.threshold)
        if criterion.reads == "block":
            self._set("first_exit", integer(1))
        else:
            wanted = f"an entropy in nats of 0 or more, such as {criterion.threshold}"
            self._set("threshold", number(f"it must be {wanted}, with criterion={criterion.name!r}", least=0))
        for contradiction in (*self._contradictions(), *self._unreachable()):
            raise OptionError(contradiction)

    def _set(self, name: str, check: Check) -> None:
        object.__setattr__(self, name, check(name, getattr(self, name), OptionError))

    def _contradictions(self) -> Iterator[str]:
        if self.prefill == "exit" and CRITERIA[self.criterion].reads != "block":
            yield (
                f"prefill='exit' is not available with criterion={self.criterion!r}, which knows a prompt's entropy "
                "only afterwards; use prefill='backbone', or criterion='similarity'"
            )
        if self.offload is None and self.offload_policy == "fetch":
            yield "offload_policy='fetch' needs offload=, the number of blocks that stay in memory"
        if self.offload is not None and self.quantizer == "none":
            yield (
                f"offload={self.offload} is not available with quantizer='none', whose twins use the backbone's "
                "weights; use 'hqq'"
            )
        if self.twins is None and self.on_missing_twins == "save":
            yield "on_missing_twins='save' needs twins=, the folder to write; name one"
        if self.twins is not None and self.quantizer == "none":
            yield "twins= holds 4-bit twins, which quantizer='none' does not use; leave one of them out"

    def _unreachable(self) -> Iterator[str]:
        """Yields what asks for blocks that no token may reach."""
        k = self.deepest
        if k is None:
            return
        nowhere = f"offload={k}, after which offload_policy='exit' lets no token go"
        if self.exit_depth is not None:
            if self.exit_depth > k:
                yield (
                    f"exit_depth={self.exit_depth} lies beyond {nowhere}; "
                    f"use exit_depth={k}, offload={self.exit_depth} or offload_policy='fetch'"
                )
        elif self.first_exit > k:
            yield (
                f"first_exit={self.first_exit} lies beyond {nowhere}; "
                f"use offload={self.first_exit} or more, exit_depth={k} or offload_policy='fetch'"
            )

    @property
    def deepest(self) -> int | None:
        """Blocks that a token which may leave executes at most; None if that is all of them."""
        return self.offload if self.offload_policy == "exit" else None

    def exit_policy(self, plan: DecoderPlan | Program) -> ExitPolicy:
        """Returns when the tokens of a graph leave. With a fixed depth no criterion plays a part."""
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
        """Returns what is known of each option, by name."""
        return {field.name: field.metadata["option"] for field in dataclasses.fields(cls)}

    @classmethod
    def choices(cls, name: str) -> tuple[Any, ...]:
        """Returns the values that an option with a fixed set of them takes, but those for tests."""
        return cls.options()[name].check.choices

    @classmethod
    def from_options(cls, options: Mapping[str, object] | None) -> RiverConfig:
        """Builds a config from the ``options`` of ``torch.compile``.

        Raises:
            OptionError: (a ``ValueError``) an unknown name or a bad value.
        """
        names = list(cls.options())
        given: dict[str, Any] = dict(options or {})
        unknown = next((name for name in given if name not in names), None)
        if unknown is not None:
            raise OptionError(
                f"unknown option {short_repr(unknown)} of backend 'river'; options are {', '.join(names)}"
                f"{did_you_mean(unknown, names)}"
            )
        return cls(**given)

    def check_depths(self, num_blocks: int) -> None:
        """Checks the depths against a model with `num_blocks` blocks.

        Raises:
            OptionError: an exit depth beyond the last block, or no block that could be offloaded.
        """
        if self.offload is not None and self.offload >= num_blocks:
            raise OptionError(
                f"offload={self.offload} leaves none of {num_blocks} blocks to offload; use 0 to {num_blocks - 1}, or "
                "leave it out"
            )
        name, least, never = ("first_exit", 1, "") if self.exit_depth is None else ("exit_depth", 0, " (= never leave)")
        if num_blocks < getattr(self, name) < WHOLE:
            raise OptionError(
                f"{name}={getattr(self, name)} lies beyond the last of {num_blocks} blocks; "
                f"use {least} to {num_blocks}{never}"
            )


def check_mode(mode: str | None) -> str | None:
    """Returns the ``mode`` of ``torch.compile`` as Inductor takes it, None for the default one.

    Raises:
        OptionError: an unknown mode.
    """
    mode = _MODE("mode", mode, OptionError)
    return None if mode == "default" else mode
