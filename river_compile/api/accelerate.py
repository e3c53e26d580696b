"""One line before a pipeline: `accelerate` replaces a model's ``generate``, `restore` undoes it.

``model(...)`` itself stays the plain model. Not handled: wrappers (``torch.compile(model)``, PEFT's) instead of the
transformers model in them; `from_pretrained` of models that are not causal language models.
"""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from river_compile.api.generation import generate_by, has_generate_of_its_own, restore_generate
from river_compile.backend import river
from river_compile.building.graph_record import Graphs
from river_compile.config import RiverConfig
from river_compile.decoding.admission import check_paths
from river_compile.decoding.mode import Decode, ExactMode, decode, exact
from river_compile.decoding.prefix_cache import PrefixPool
from river_compile.errors import ExactModeError, OptionError, RiverWarning
from river_compile.exit_rule import ExitRule
from river_compile.exits import WHOLE
from river_compile.kernels.checks import FLAG, PATH, one_of, short_repr
from river_compile.kernels.messages import with_id
from river_compile.lowering.inductor import begin_kernels
from river_compile.ranks import ranks_of
from river_compile.record import find_record, forget, record_of, unwrap
from river_compile.runtime.offload import OffloadedWeights
from river_compile.tracing.programs import ProgramCache
from river_compile.twins.file import FILE, TwinFile
from river_compile.twins.making import Statistics
from river_compile.twins.observe import Observation, Tokenizer, windows_of
from river_compile.twins.observe import record as record_inputs
from river_compile.twins.pack import TwinWeights
from river_compile.twins.weights import digest_of
from river_compile.upstream.dynamo import OwnCall, compiled_with, drop_graphs, untraceable

Model = TypeVar("Model", bound=PreTrainedModel)

QUALITIES = EXACT, FAST = "exact", "fast"
_QUALITY = one_of(None, *QUALITIES)
_RULE = ("criterion", "threshold", "first_exit", "exit_depth")  # options that say which tokens exit
_ARGUMENTS = ("calibration_data", "tokenizer", "compile_cache", "background_packing")  # of accelerate by keyword
_FULL_DEPTH = {"first_exit": WHOLE}  # no token exits, and no block has a check
Rule: TypeAlias = "ExitRule | str | os.PathLike[str]"


def accelerate(
    model: Model,
    quality: str | None = None,
    *,
    strict: bool = False,
    calibration: Rule | None = None,
    calibration_data: Sequence[str] | Sequence[Tensor] | None = None,
    tokenizer: Tokenizer | None = None,
    compile_cache: bool = True,
    background_packing: bool = True,
    **options: Any,
) -> Model:
    """Make a model generate faster, by ``model.generate``, ``pipeline(model=model)`` and all other callers.

    Only ``generate`` is replaced; its first calls trace the model and quantize its twins. A call that River does not
    support (beams, assisted modes, attention weights as outputs, ...) runs transformers' own code, with one warning for
    each reason. `deepcopy`, `pickle` and `save_pretrained` give the plain model, and `river_compile.restore` undoes
    all of it. A second call with other arguments replaces the first. After an error the model is as it was.

    Args:
        model: a causal language model of transformers.
        quality: "exact" (default): the twins draft, the model's own weights verify, and the output is the model's.
            "fast": tokens exit early to the 4-bit twins, and the output changes.
        strict: with "exact": raise an error if a verifying pass might not be bit-identical to one without drafts.
        calibration: an exit rule of `river_compile.tune_exit` or the file it was saved to; implies "fast".
        calibration_data: texts like yours, or tensors of token ids ``[T]`` or ``[B, T]``, to quantize the twins with
            ("gptq" and "awq"). None: the package's texts, or text that the model samples if its folder has no
            tokenizer.
        tokenizer: for texts in `calibration_data`.
        compile_cache: whether to reuse and keep what is built in the compile cache (docs/startup.md).
        background_packing: with "exact" on a CPU: whether to answer, with drafts from the context only, while new twins
            are packed in a thread of lower priority. False: the first call waits for them.
        options: of the backend (such as ``twins=``), and with "exact" transformers' ``num_assistant_tokens``,
            ``num_assistant_tokens_schedule`` and ``prompt_lookup_num_tokens`` (docs/options.md).

    Returns:
        The same model.

    Raises:
        OptionError: (a ``ValueError``) an unknown or bad argument, one that does not go with the quality, a file
            that holds no exit rule, or a model that Dynamo cannot trace.
        TwinsError: (a ``ValueError``) there are no saved twins. (Those of another model raise at the first token.)
    """
    if not isinstance(model, PreTrainedModel) or not hasattr(model, "generate"):
        raise OptionError(
            f"accelerate requires a transformers model that generates, got {type(model).__name__}{_unwrap_hint(model)}",
            id="RC006",
        )
    why_not = untraceable(model) or _without_values(model)
    if why_not:
        raise OptionError(f"Cannot accelerate this {type(model).__name__}: {why_not}", id="RC006")
    chosen = _quality(quality, strict, calibration)
    compile_cache = FLAG("compile_cache", compile_cache, OptionError)
    background_packing = FLAG("background_packing", background_packing, OptionError)
    mode: Decode = decode
    if chosen == EXACT:
        mode, backend_options = _exact_mode(strict, options)
    else:
        backend_options = _fast_options(calibration, options)
    config = _config(chosen, backend_options)
    if config.twins is not None and config.on_missing_twins == "raise":
        folder = ranks_of(model.parameters()).folder(Path(config.twins))
        if not os.path.exists(folder / FILE):
            TwinFile(folder)  # raises the error that says what is wrong
    if tokenizer is not None and calibration_data is None:
        raise OptionError("tokenizer= requires calibration_data=. Give both or none", id="RC003")
    if calibration_data is not None:
        collect_statistics(model, calibration_data, tokenizer)
    record, call = record_of(model.parameters()), OwnCall(river, backend_options)
    programs = ProgramCache(config, compile_cache)
    begin_kernels(config, model.device)
    # The model changes last, so any error above leaves it as it was.
    if has_generate_of_its_own(model):
        warnings.warn(
            with_id(
                "RC023",
                f"accelerate changes nothing: this {type(model).__name__} has its own generate (custom_generate of its "
                "folder), which stays in use. Delete model.generate to accelerate the model",
            ),
            RiverWarning,
            stacklevel=2,
        )
    else:
        generate_by(model, mode)
    record.put(call, programs, Graphs())
    twins = record.of(TwinWeights)
    twins.stores, twins.background.enabled = compile_cache, background_packing
    weakref.finalize(model, _end_packing, weakref.ref(twins)).atexit = False
    return model


def _end_packing(twins: weakref.ref[TwinWeights]) -> None:
    """End the packing for a model that is gone, which holds its weights, unless a later process uses the result."""
    here = twins()
    packing = None if here is None else here.background.packing
    if packing is not None and not packing.finishes_at_exit:
        packing.cancel()


def _without_values(model: nn.Module) -> str:
    """Return why a model cannot run: its weights are on the meta device, and nothing loads them in each call."""
    loads = any(hasattr(module, "_hf_hook") for module in model.modules())
    name = next((name for name, weight in model.named_parameters() if weight.is_meta), "")
    return f"{name} is on the meta device, which holds no values. Load the weights first" if name and not loads else ""


def _unwrap_hint(model: object) -> str:
    """Return how to get at the model in a wrapper, for a message."""
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        return ". Pass the model before torch.compile(model) wraps it"
    if hasattr(model, "get_base_model"):
        return ". Pass model.get_base_model()"
    return ". Pass pipeline.model" if isinstance(getattr(model, "model", None), PreTrainedModel) else ""


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


def _exact_mode(strict: bool, options: Mapping[str, Any]) -> tuple[ExactMode, dict[str, Any]]:
    """Return exact mode with its options of these, and the backend's."""
    for name in _RULE:
        if options.get(name) is not None:
            raise OptionError(
                f"{name}={short_repr(options[name])} requires quality='fast', got 'exact'. Remove it or change quality",
                id="RC003",
            )
    drafting = {name: value for name, value in options.items() if name in vars(exact)}
    backend = {name: value for name, value in options.items() if name not in drafting} | _FULL_DEPTH
    if backend.get("offload") is not None and backend.get("offload_policy") is None:
        backend["offload_policy"] = "fetch"  # drafts are verified by all layers
    return replace(exact, strict=strict, **drafting), backend


def _config(quality: str, options: Mapping[str, Any]) -> RiverConfig:
    """Return the backend's options, checked, with exact mode also against those that it does not support."""
    config = RiverConfig.from_options(options)
    if quality == EXACT:
        try:
            check_paths(config)
        except ExactModeError as error:
            raise OptionError(error.text, id=error.id) from None
    return config


def _fast_options(calibration: Rule | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the backend's options, with those of an exit rule."""
    for name in filter(vars(exact).__contains__, options):
        raise OptionError(
            f"{name}={short_repr(options[name])} requires quality='exact', got 'fast'. Remove it or change quality",
            id="RC003",
        )
    if calibration is None:
        return {**options}
    if not isinstance(calibration, ExitRule):
        calibration = ExitRule.load(PATH("calibration", calibration, OptionError))
    given = next((name for name in options if name in calibration.options), None)
    if given is not None:
        raise OptionError(f"{given}={short_repr(options[given])} is set by calibration=. Remove {given}", id="RC003")
    return {**calibration.options, **options}


def from_pretrained(
    name: str | os.PathLike[str],
    quality: str | None = None,
    *,
    strict: bool = False,
    calibration: Rule | None = None,
    twins: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a causal language model in eval mode and accelerate it.

    Args:
        name: a model folder, or the name of a hub repository.
        quality: as for `river_compile.accelerate`.
        strict: as for `river_compile.accelerate`.
        calibration: as for `river_compile.accelerate`.
        twins: a folder of `river_compile.save_twins` or ``river quantize``; None: the first token quantizes.
        kwargs: River's other arguments and options, and arguments of ``from_pretrained`` of transformers; ``dtype`` is
            the checkpoint's by default.

    Raises:
        OptionError: (a ``ValueError``) a bad argument.
        OSError: (of transformers) there is no such model.
    """
    ours = {*_ARGUMENTS, *RiverConfig.options(), *vars(exact)}
    options = {key: kwargs.pop(key) for key in ours & kwargs.keys()}
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, **{"dtype": "auto", **kwargs}).eval()
    except ImportError as error:
        raise OptionError(
            f'Cannot load {name}: a package is missing ({error}). In the clone, run pip install ".[gguf]" for GGUF '
            'files, or pip install ".[accelerate]" for device_map=',
            id="RC005",
        ) from error
    return accelerate(model, quality, strict=strict, calibration=calibration, twins=twins, **options)


def collect_statistics(
    model: PreTrainedModel,
    data: Sequence[str] | Iterable[Tensor] | None = None,
    tokenizer: Tokenizer | None = None,
    *,
    progress: bool = True,
) -> Observation:
    """Run calibration data through a model, for the quantizers "gptq" and "awq".

    ``accelerate(model, calibration_data=...)`` calls it. Call it before the first token; twins that exist stay as they
    are. A second call replaces what the first one collected.

    Args:
        model: a causal language model in eval mode.
        data: texts like those that the model will see and write, chat template included, some thousand tokens in all;
            or token ids ``[T]`` or ``[B, T]`` without padding. None: a few short texts that come with the package.
        tokenizer: maps a text to ``{"input_ids": [...]}``; for texts.
        progress: whether to show a progress bar.

    Returns:
        The statistics. The model keeps them too, until their ``clear()``.

    Raises:
        OptionError: (a ``ValueError``) texts without a tokenizer, a tokenizer without texts, or no token in the data.
        RankError: ranks that share the model were given different data.
    """
    model = unwrap(model)
    windows = windows_of(data, tokenizer)
    ranks = ranks_of(model.parameters())
    if ranks.several:
        ranks.check_alike("the calibration data", digest_of(windows))
    observation = record_inputs(model, windows, progress=progress)
    record_of(model.parameters()).of(Statistics).observed = observation
    return observation


Module = TypeVar("Module", bound=nn.Module)


def restore(model: Module) -> Module:
    """Undo ``accelerate`` and ``model.compile(backend="river")``, and free the twins.

    Offloaded weights return to device memory, bit for bit. A wrapper that ``torch.compile(model, backend="river")``
    returned stays compiled: it traces the model again at its next call.

    Args:
        model: the module that was compiled, or the wrapper that ``torch.compile`` returned.

    Returns:
        The same object.

    Raises:
        OptionError: (a ``ValueError``) it is no module.
    """
    inner = unwrap(model)
    bring_back(inner)
    restore_generate(inner)
    if compiled_with(river, inner._compiled_call_impl):
        vars(inner).pop("_compiled_call_impl")
    record = find_record(inner)
    if record is not None:
        if record.find(OwnCall) is None:
            drop_graphs(inner)
        packing = record.of(TwinWeights).background.packing
        if packing is not None:
            packing.cancel()
    forget(inner)
    return model


def empty_cache(model: nn.Module) -> int:
    """Free the KV cache and the prefix cache that a model keeps for its next ``generate``.

    Args:
        model: the module that was compiled, or the wrapper that ``torch.compile`` returned.

    Returns:
        The bytes of keys and values that were freed.
    """
    record = find_record(model)
    return 0 if record is None else record.of(PrefixPool).free()


def bring_back(model: nn.Module) -> int:
    """Move offloaded weights back into device memory, bit for bit; return their bytes."""
    record = find_record(model)
    if record is None:
        return 0
    with record.of(TwinWeights).moving():
        return record.of(OffloadedWeights).restore([*model.parameters(), *model.buffers()])
