"""What the arguments of `accelerate` ask for: a mode of decoding, and the backend's options.

Not handled: what is done with them (`accelerate.py`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

from transformers import PreTrainedModel

from river_compile.config import RiverConfig
from river_compile.decoding.admission import check_paths
from river_compile.decoding.mode import Decode, ExactMode, decode, exact
from river_compile.decoding.sources import why_no_source
from river_compile.errors import ExactModeError, OptionError
from river_compile.exit_rule import ExitRule
from river_compile.exits import WHOLE
from river_compile.kernels.checks import FLAG, PATH, one_of, short_repr
from river_compile.runtime.processes import processes_of

QUALITIES = EXACT, FAST = "exact", "fast"
_QUALITY = one_of(None, *QUALITIES)
_RULE = ("criterion", "threshold", "first_exit", "exit_depth")  # options that say which tokens exit
_BUDGET = 0.05  # nats per token
_TUNED = {"criterion": "confidence", "budget": _BUDGET}
_FULL_DEPTH = {"first_exit": WHOLE}  # no token exits, and no block has a check
MODE_OPTIONS = frozenset(vars(exact))  # of exact mode, by keyword of `accelerate`
Rule: TypeAlias = "ExitRule | str | os.PathLike[str]"


class Asked(NamedTuple):
    """What a quality and its options ask for."""

    mode: Decode
    options: dict[str, Any]  # of the backend, as they were given
    config: RiverConfig  # the same, checked


def asked_for(
    model: PreTrainedModel, quality: str | None, strict: bool, calibration: Rule | None, options: Mapping[str, Any]
) -> Asked:
    """Return the mode and the backend's options; raise an OptionError for what is bad or does not go together."""
    chosen = _quality(quality, strict, calibration)
    mode: Decode = decode
    if chosen == FAST:
        backend = _fast_options(model, calibration, options)
    else:
        mode, backend = _exact_mode(model, strict, options)
    config = processes_of(model.parameters()).fitted(RiverConfig.from_options(backend), backend)
    if chosen == EXACT:
        try:
            check_paths(config)
        except ExactModeError as error:
            raise OptionError(error.text, id=error.id) from None
    return Asked(mode, backend, config)


def _quality(quality: str | None, strict: bool, calibration: Rule | None) -> str:
    """Return the quality that three arguments ask for."""
    if quality in ("strict", "calibrated"):
        fix = "strict=True" if quality == "strict" else "calibration=, without quality"
        raise OptionError(f"quality={quality!r} is not allowed; use {fix}")
    chosen: str = _QUALITY("quality", quality, OptionError) or (EXACT if calibration is None else FAST)
    if chosen == EXACT and calibration is not None:
        raise OptionError(
            "calibration= requires quality='fast', got 'exact'. Remove one of the two",
            id="RC003",
        )
    if FLAG("strict", strict, OptionError) and chosen == FAST:
        raise OptionError("strict=True requires quality='exact', got 'fast'. Remove one of the two", id="RC003")
    return chosen


def _exact_mode(model: PreTrainedModel, strict: bool, options: Mapping[str, Any]) -> tuple[ExactMode, dict[str, Any]]:
    """Return exact mode with its options of these, and the backend's."""
    for name in (*_RULE, "budget"):
        if options.get(name) is not None:
            raise OptionError(
                f"{name}={short_repr(options[name])} requires quality='fast', got 'exact'. Remove it or change quality",
                id="RC003",
            )
    drafting = {name: value for name, value in options.items() if name in MODE_OPTIONS}
    backend = {name: value for name, value in options.items() if name not in drafting} | _FULL_DEPTH
    mode = replace(exact, strict=strict, **drafting)
    why_not = why_no_source(model, mode.assistant_model, mode.use_mtp, tries_again=True)
    if why_not:
        raise OptionError(why_not)
    if not mode.self_drafts(backend):
        backend["exit_depth"] = WHOLE  # no program has twins
    return mode, backend


def _fast_options(model: PreTrainedModel, calibration: Rule | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the backend's options, with those of an exit rule, or a budget to tune one within."""
    for name in filter(MODE_OPTIONS.__contains__, options):
        raise OptionError(
            f"{name}={short_repr(options[name])} requires quality='exact', got 'fast'. Remove it or change quality",
            id="RC003",
        )
    if calibration is None:
        known = {name: value for name, value in options.items() if name != "budget" or value is not None}
        return known if _has_rule(model, options) else _TUNED | known
    if options.get("budget") is not None:
        raise OptionError("budget= tunes an exit rule, which calibration= sets. Remove one of the two", id="RC003")
    if not isinstance(calibration, ExitRule):
        calibration = ExitRule.load(PATH("calibration", calibration, OptionError))
    given = next((name for name in options if name in calibration.options), None)
    if given is not None:
        raise OptionError(f"{given}={short_repr(options[given])} is set by calibration=. Remove {given}", id="RC003")
    return {**calibration.options, **options}


def _has_rule(model: PreTrainedModel, options: Mapping[str, Any]) -> bool:
    """Whether options say which tokens exit, or no rule can be tuned with them."""
    if options.get("budget") is not None:
        return False
    untunable = options.get("prefill") == "exit" or (
        options.get("offload") is not None and options.get("offload_policy") != "fetch"
    )
    return untunable or any(options.get(n) is not None for n in _RULE) or processes_of(model.parameters()).several
