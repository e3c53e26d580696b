"""The options of the backend: ``torch.compile(model, backend="river", options={...})``."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from river_compile.fills.rivals import FILLS

from .errors import OptionError
from .exits import CRITERIA, Threshold

_GROUP_SIZES = (32, 64, 128, 256)
_CHOICES = {
    "criterion": tuple(CRITERIA),
    "fill": tuple(FILLS),
    "quantizer": ("hqq", "rtn", "awq", "gptq", "none"),
    "prefill": ("backbone", "exit"),
    "lm_head": ("keep", "w4"),
    "lowering": ("auto", "inductor", "triton", "eager"),
    "on_unsupported": ("inductor", "raise"),
    "offload_policy": ("exit", "fetch"),
}
MODES = (None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class RiverConfig:
    """Options of the backend.

    Attributes:
        threshold: where the criterion draws the line; None takes the criterion's own default. A similarity that must be
            exceeded for "similarity" and "history" (1 and more never let a token leave), or a sequence of them, one
            for each depth from 1 on, whose last holds for all greater depths; for "confidence" and "doubt" an entropy
            in nats that must not be reached, at least 0 (0 never lets a token leave, infinity always does).
        criterion: which tokens leave: "similarity" (of a block's input and output, the paper's), "history" (that
            averaged over the last tokens), "confidence" (the previous step's logits were sure) or "doubt" (the token
            leaves, and the backbone runs it again where the river's logits are not sure).
        first_exit: smallest exit depth, in backbone blocks executed, at least 1; the only one for "confidence" and
            "doubt", where 0 is possible too.
        exit_every: distance between the depths at which a token may leave, at least 1.
        exit_depth: None, or one depth for every token: 0 (all blocks in 4 bits) to L (never leave).
        group_size: consecutive input features of a 4-bit matrix that share a scale and a zero: 32, 64, 128 or 256.
            A matrix that it does not divide takes the largest power of two that does, or stays in 16 bits below 32.
        quantizer: how 4-bit weights are found. From the weights alone: "hqq" or "rtn" (round to nearest). From what
            they read in a text too, which `river_compile.observe` records: "awq" or "gptq". "none" keeps the
            backbone's weights in the twins (for tests).
        min_sqnr: dB of signal-to-noise ratio below which a matrix product of a twin stays in 16 bits: of its outputs on
            the observed text with "awq" and "gptq", of its weights with "hqq" and "rtn". None for no floor.
        prefill: "backbone" (the prompt runs through all blocks) or "exit" (the whole prompt leaves at the first depth
            where the least similar of its tokens passes the threshold).
        lm_head: "keep", or "w4" to put the head into 4 bits for tokens that left the backbone.
        lowering: "auto" ("triton" on a GPU, "inductor" on a CPU), "inductor" (4-bit products as operators of their
            own, all else through Inductor), "triton" (twins, their head and the exit checks become the generated
            kernels, on a CPU in Triton's interpreter: very slow, for tests) or "eager" to run the rewritten graph
            operator by operator (slow: for debugging and tests; its backbone gives the very bits of the model run
            eagerly).
        on_unsupported: "inductor" (a graph that cannot be rewritten runs as Inductor runs it, with one warning) or
            "raise".
        dump_dir: a folder that receives every segment, each twin beside its block, and the plan; None for none.
        artifact: a folder that `river_compile.save` wrote, whose twins are used instead of quantizing; None for none.
        same_rows: True computes every token of a prompt with the bits that it has when tokens come one at a time, which
            is slower. Exact mode's `strict=True` compiles its verification with it.
        cudagraphs: whether decode steps on a static cache are captured and replayed. None: on a GPU. "record": by a
            recorder that needs no GPU and checks the schedule (slow: for tests and `benchmarks.schedule`).
        max_captures: graphs kept at the same time, at least 1; the one that was not used for longest gives way.
        fill: what stands in for the KV entries of skipped blocks: "river" (4-bit twins run, and write them), or for
            comparison "propagate", "recompute", "mask" or "monotone" (see :mod:`river_compile.fills.rivals`).
        launch_ahead: whether the blocks behind an exit check start before its result is known. None: where that was
            measured to help.
        offload: None, or the number of backbone blocks that stay in device memory, 0 to L - 1; the others move out
            (:mod:`river_compile.offload.weights`).
        offload_policy: "exit" (every token leaves by that depth) or "fetch" (tokens that go on bring blocks in).
        offload_dir: the folder for the offloaded weights of a model on the CPU; None: TMPDIR, or else /var/tmp.
    """

    threshold: Threshold | None = None
    criterion: str = "similarity"
    first_exit: int = 2
    exit_every: int = 1
    exit_depth: int | None = None
    group_size: int = 64
    quantizer: str = "hqq"
    min_sqnr: float | None = None
    prefill: str = "backbone"
    lm_head: str = "keep"
    lowering: str = "auto"
    on_unsupported: str = "inductor"
    dump_dir: str | None = None
    artifact: str | None = None
    same_rows: bool = False
    cudagraphs: bool | str | None = None
    max_captures: int = 256
    launch_ahead: bool | None = None
    offload: int | None = None
    offload_policy: str = "exit"
    offload_dir: str | None = None
    fill: str = "river"

    def __post_init__(self) -> None:
        _require(_is_int(self.exit_every, 1), "exit_every", self.exit_every, "an integer of 1 or more")
        _require(
            self.exit_depth is None or _is_int(self.exit_depth, 0),
            "exit_depth",
            self.exit_depth,
            "None or an integer from 0 to the number of blocks",
        )
        _require(self.group_size in _GROUP_SIZES, "group_size", self.group_size, f"one of {_listed(_GROUP_SIZES)}")
        for name in ("dump_dir", "artifact", "offload_dir"):
            value = getattr(self, name)
            _require(value is None or isinstance(value, (str, Path)), name, value, "None or a path")
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise OptionError(
                    f"{name}={value!r} is not allowed; choose one of {_listed(allowed)}{_closest(value, allowed)}"
                )

        floor = self.min_sqnr
        _require(floor is None or _is_number(floor), "min_sqnr", floor, "None or a number of decibels, such as 20")
        self._check_rule()
        _require(isinstance(self.same_rows, bool), "same_rows", self.same_rows, "True or False")
        self._check_capture()
        self._check_offload()
        self._check_fill()
        if self.artifact is not None and self.quantizer == "none":
            raise OptionError("artifact= holds 4-bit twins, which quantizer='none' does not use; leave one of them out")

    def _check_capture(self) -> None:
        graphs, ahead = self.cudagraphs, self.launch_ahead
        allowed = "None (on a GPU), True, False or 'record'"
        _require(graphs is None or isinstance(graphs, bool) or graphs == "record", "cudagraphs", graphs, allowed)
        _require(_is_int(self.max_captures, 1), "max_captures", self.max_captures, "an integer of 1 or more")
        _require(ahead is None or isinstance(ahead, bool), "launch_ahead", ahead, "None, True or False")

    def _check_fill(self) -> None:
        """Checks that nothing is asked for that only the river has."""
        if self.fill == "river":
            return
        for name, value, instead in (
            ("prefill", "exit", "'backbone'"),
            ("criterion", "doubt", "'similarity'"),
            ("cudagraphs", True, "None"),
            ("cudagraphs", "record", "None"),
            ("offload", self.offload, "None"),
        ):
            if value is not None and getattr(self, name) == value:
                raise OptionError(
                    f"{name}={value!r} is not available with fill={self.fill!r}; use {name}={instead}, or fill='river'"
                )
        if self.artifact is not None:
            raise OptionError(
                f"artifact= holds 4-bit twins, which fill={self.fill!r} does not use; leave one of them out"
            )

    def _check_offload(self) -> None:
        k = self.offload
        _require(k is None or _is_int(k, 0), "offload", k, "None or an integer from 0 to the number of blocks - 1")
        if k is None:
            if self.offload_policy == "fetch":
                raise OptionError("offload_policy='fetch' needs offload=, the number of blocks that stay in memory")
            return
        if self.quantizer == "none":
            raise OptionError(
                f"offload={k} is not available with quantizer='none', whose twins use the backbone's weights; use 'hqq'"
            )
        if self.deepest is None:
            return
        if self.exit_depth is not None and self.exit_depth > k:
            raise OptionError(
                f"exit_depth={self.exit_depth} lies behind offload={k}, where offload_policy='exit' lets no token go; "
                f"use exit_depth={k}, offload={self.exit_depth} or offload_policy='fetch'"
            )
        if self.exit_depth is None and self.first_exit > k:
            raise OptionError(
                f"first_exit={self.first_exit} lies behind offload={k}, where offload_policy='exit' lets no token go; "
                f"use offload={self.first_exit} or more, exit_depth={k} or offload_policy='fetch'"
            )
        if CRITERIA[self.criterion].may_doubt and self.exit_depth is None:
            raise OptionError(
                f"criterion={self.criterion!r} sends tokens through the whole backbone, where offload_policy='exit' "
                "lets none go; use offload_policy='fetch'"
            )

    @property
    def deepest(self) -> int | None:
        """Blocks that a token which may leave executes at most; None where that is all of them."""
        return self.offload if self.offload_policy == "exit" else None

    def _check_rule(self) -> None:
        """Checks threshold and first exit against the criterion, and fills in its threshold where none was given."""
        criterion = CRITERIA[self.criterion]
        if self.threshold is None:
            object.__setattr__(self, "threshold", criterion.threshold)
        if criterion.scores_blocks:
            if isinstance(self.threshold, list):
                object.__setattr__(self, "threshold", tuple(self.threshold))
            several = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)
            allowed = "a number, such as 0.7, or a list with one for each depth from 1 on"
            _require(several != () and all(map(_is_number, several)), "threshold", self.threshold, allowed)
            _require(_is_int(self.first_exit, 1), "first_exit", self.first_exit, "an integer of 1 or more")
            return
        allowed = f"an entropy in nats of 0 or more, such as {criterion.threshold}, with criterion={self.criterion!r}"
        _require(_is_number(self.threshold) and self.threshold >= 0, "threshold", self.threshold, allowed)
        _require(_is_int(self.first_exit, 0), "first_exit", self.first_exit, "an integer of 0 or more")
        if self.prefill == "exit":
            raise OptionError(
                f"prefill='exit' is not available with criterion={self.criterion!r}, which knows a prompt's entropy "
                "only afterwards; use prefill='backbone', or criterion='similarity'"
            )

    @staticmethod
    def choices(name: str) -> tuple[str, ...]:
        """Returns the values that an option with a fixed set of them takes: ``choices("quantizer")``."""
        return _CHOICES[name]

    @classmethod
    def from_options(cls, options: Mapping[str, object] | None) -> RiverConfig:
        """Builds a config from the ``options`` of ``torch.compile``.

        Raises:
            OptionError: (a ``ValueError``) an unknown name or a bad value.
        """
        options = dict(options or {})
        names = [f.name for f in dataclasses.fields(cls)]
        for name in options:
            if name not in names:
                raise OptionError(
                    f"unknown option {name!r} of backend 'river'; options are {', '.join(names)}{_closest(name, names)}"
                )
        return cls(**options)

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
        if self.exit_depth is not None and self.exit_depth > num_blocks:
            raise OptionError(
                f"exit_depth={self.exit_depth} lies beyond the last of {num_blocks} blocks; "
                f"use 0 to {num_blocks} ({num_blocks} = never leave)"
            )
        if self.exit_depth is None and self.first_exit > num_blocks:
            raise OptionError(
                f"first_exit={self.first_exit} lies beyond the last of {num_blocks} blocks; use 1 to {num_blocks}"
            )


def check_mode(mode: str | None) -> str | None:
    """Checks the ``mode`` of ``torch.compile``, which goes to Inductor.

    Raises:
        OptionError: an unknown mode.
    """
    if mode not in MODES:
        allowed = [m for m in MODES if m]
        raise OptionError(f"mode={mode!r} is not allowed; choose one of {_listed(allowed)}{_closest(mode, allowed)}")
    return None if mode == "default" else mode


def _require(fine: bool, name: str, value: object, allowed: str) -> None:
    if not fine:
        raise OptionError(f"{name}={value!r} is not allowed; it must be {allowed}")


def _is_int(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _listed(values: object) -> str:
    return ", ".join(map(repr, values))


def _closest(value: object, allowed: object) -> str:
    match = difflib.get_close_matches(str(value), list(allowed), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""
