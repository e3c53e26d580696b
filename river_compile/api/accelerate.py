"""One line before a pipeline: ``accelerate(model)`` replaces a model's ``generate``; `restore` undoes it.

    quality       generate                                     the text
    "exact"       the river drafts, the backbone verifies      the plain model's, in 16 bits up to rounding
    "strict"      the same; an error where a row of a pass     the text of the same kernels without drafts, to the bit
                  of several tokens may have other bits
    "calibrated"  tokens leave by a calibrated rule            another one, within the promise of the calibration
    "fast"        tokens leave by the backend's default rule   another one

A call of the model itself, ``model(...)``, is the plain model's. `load` maps weights and artifact from a folder, if the
model keeps its folder's dtype and the C++ kernels of a CPU multiply.

Not handled: wrappers (``torch.compile(model)``, PEFT's) instead of the transformers model in them; `load` of models
that are no causal language models, and of quantized folders that need arguments of their own.
"""

from __future__ import annotations

import functools
import os
import warnings
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from river_compile.api.generation import generate_by, has_generate_of_its_own, restore_generate
from river_compile.backend import river
from river_compile.building import build, rebuild
from river_compile.calibration.result import Calibration
from river_compile.compile_cache.programs import Origin, ProgramCache
from river_compile.config import RiverConfig
from river_compile.decoding.mode import ExactMode, decode, exact
from river_compile.decoding.session import check_paths
from river_compile.errors import ExactModeError, OptionError, RiverWarning
from river_compile.exits import WHOLE
from river_compile.kernels.checks import FLAG, PATH, one_of, shown
from river_compile.lowering.inductor import begin_kernels
from river_compile.model_record import GraphRecord, ModelRecord, find_record, forget, record_of, unwrap
from river_compile.passes.program import Program, RiverProgram
from river_compile.runtime.executor import RiverExecutor
from river_compile.runtime.tensor_parallel import ranks_of
from river_compile.twins.file import FILE, TwinFile
from river_compile.upstream.dynamo import OwnCall, compiled_with, untraceable

Model = TypeVar("Model", bound=PreTrainedModel)

QUALITIES = ("exact", "strict", "calibrated", "fast")
_QUALITY = one_of(*QUALITIES)
_RULE = ("criterion", "threshold", "first_exit", "exit_depth")  # options that say which tokens leave
# No token leaves by itself, and no block has a check.
_NEVER_LEAVES = {"first_exit": WHOLE}


def accelerate(
    model: Model,
    quality: str = "exact",
    calibration: Calibration | str | os.PathLike[str] | None = None,
    *,
    compile_cache: bool = True,
    **options: Any,
) -> Model:
    """Makes a model generate faster, by ``model.generate``, ``pipeline(model=model)`` and all other callers.

    Nothing of the model but ``generate`` changes, which traces and builds what it needs at its first calls. A call that
    it does not handle (beams, assisted modes, attention weights as outputs, ...) runs plainly; a warning names the
    reason, once for each. `deepcopy`, `pickle` and `save_pretrained` give the plain model, and
    :func:`river_compile.restore` takes everything back. Another call with other arguments replaces the first one's.

    Args:
        model: a causal language model of transformers.
        quality: "exact", "strict", "calibrated" or "fast", as the module's table says.
        calibration: for "calibrated": what :func:`river_compile.calibrate` returned, or the file it was saved to.
        compile_cache: whether other processes may use what this one builds, and the reverse (docs/usage.md).
        options: of the backend (such as ``artifact=``), and with "exact" and "strict" those of exact mode (such as
            ``max_draft=``).

    Returns:
        The same model.

    Raises:
        OptionError: (a ``ValueError``) an unknown or bad argument, one that does not go with the quality, or a model
            whose layers unpack their weights by code of compressed-tensors.
        ArtifactError: (a ``ValueError``) there is no such artifact. (One of another model shows at the first token.)
        ValueError: the calibration's file cannot be read.
        After an error the model is what it was before the call.
    """
    if not isinstance(model, PreTrainedModel) or not hasattr(model, "generate"):
        raise OptionError(
            f"accelerate takes a transformers model that generates, not a {type(model).__name__}{_in(model)}"
        )
    why_not = untraceable(model)
    if why_not:
        raise OptionError(f"this {type(model).__name__} cannot be accelerated: {why_not}")
    quality = _QUALITY("quality", quality, OptionError)
    compile_cache = FLAG("compile_cache", compile_cache, OptionError)
    if quality in ("exact", "strict"):
        _nothing_of(quality, calibration=calibration, **{name: options.get(name) for name in _RULE})
        exact_mode, backend_options = _exact_mode(quality, options)
        _check_exact(backend_options)
        backend_options |= _NEVER_LEAVES
    else:
        for name in filter(vars(exact).__contains__, options):
            raise OptionError(
                f"{name}={shown(options[name])} is about drafts, and with quality={quality!r} there are none; leave it "
                "out, or use quality='exact' or quality='strict'"
            )
        exact_mode, backend_options = None, {**_rule(quality, calibration, options), **options}
    config = RiverConfig.from_options(backend_options)
    if config.artifact is not None and config.on_missing_artifact == "raise":
        artifact = ranks_of(model.parameters()).folder(Path(config.artifact))
        if not os.path.exists(artifact / FILE):
            TwinFile(artifact)  # (says what is wrong)
    record, call = record_of(model.parameters()), OwnCall(river, backend_options)
    programs = ProgramCache(config, functools.partial(_built, weakref.ref(model), record, config), compile_cache)
    begin_kernels(config, model.device)
    # (The model changes last, so that whatever fails leaves it as it was.)
    if has_generate_of_its_own(model):
        warnings.warn(
            f"this {type(model).__name__} came with a generate of its own (custom_generate of its folder), which "
            "stays in use: accelerate changes nothing",
            RiverWarning,
            stacklevel=2,
        )
    else:
        generate_by(model, exact_mode or decode)
    record.graphs.clear()
    record.call, record.programs, record.twins.stores = call, programs, compile_cache
    return model


def _built(
    model: weakref.ref[PreTrainedModel],
    record: ModelRecord,
    config: RiverConfig,
    found: Program | RiverProgram,
    names: Sequence[str],
    args: Sequence[Any],
    origin: Origin,
) -> RiverExecutor:
    """Builds a program that Dynamo did not trace here for a model."""
    owner = model()
    assert owner is not None, "the model that is being called is there"
    record.self_calibration.is_of(owner)
    graph = GraphRecord(config, inputs=tuple(names), origin=origin)
    if isinstance(found, Program):
        executor = rebuild(found, args, record, graph)
    else:
        executor = build(found, dict(zip(found.inputs, args, strict=True)), None, record, graph)
    record.graphs.append(graph)
    return executor


def _in(model: object) -> str:
    """Returns how to get at the model in a wrapper, for a message."""
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        return "; give it the model before torch.compile(model) wraps it"
    if hasattr(model, "get_base_model"):
        return "; give it model.get_base_model()"
    return "; give it pipeline.model" if isinstance(getattr(model, "model", None), PreTrainedModel) else ""


def _exact_mode(quality: str, options: Mapping[str, Any]) -> tuple[ExactMode, dict[str, Any]]:
    """Returns exact mode with its options of these, and the backend's."""
    own = {name: value for name, value in options.items() if name in vars(exact)}
    if own.setdefault("strict", quality == "strict") is not (quality == "strict"):
        raise OptionError(
            f"strict={shown(own['strict'])} does not go with quality={quality!r}; choose it by quality alone"
        )
    return exact.with_options(**own), {name: value for name, value in options.items() if name not in own}


def _check_exact(options: Mapping[str, Any]) -> None:
    """Raises an OptionError for options of the backend that leave a model without its river or its backbone.

    They are looked at before those that are set here, which no error is to name.
    """
    given: Any = SimpleNamespace(**{**vars(RiverConfig()), **options})
    try:
        check_paths(given)
    except ExactModeError as error:
        raise OptionError(str(error)) from None


def _nothing_of(quality: str, **arguments: object) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise OptionError(
                f"{name}={shown(value)} says which tokens leave, and with quality={quality!r} none does; leave it out, "
                "or use quality='calibrated' or quality='fast'"
            )


def _rule(
    quality: str, calibration: Calibration | str | os.PathLike[str] | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the options of a calibration, none for "fast"."""
    if quality == "fast":
        if calibration is not None:
            raise OptionError("a calibration goes with quality='calibrated', not with quality='fast'")
        return {}
    if calibration is None:
        raise OptionError(
            "quality='calibrated' needs calibration=: what river_compile.calibrate(model, tokenizer, texts, kl=0.1) "
            "returns, or the file it was saved to"
        )
    if not isinstance(calibration, Calibration):
        calibration = Calibration.load(PATH("calibration", calibration, OptionError))
    given = next((name for name in options if name in calibration.options), None)
    if given is not None:
        raise OptionError(f"{given}={shown(options[given])} is what the calibration says; leave it out")
    return calibration.options


def load(
    folder: str | os.PathLike[str],
    artifact: str | os.PathLike[str] | None = None,
    quality: str = "exact",
    calibration: Calibration | str | os.PathLike[str] | None = None,
    loading: Mapping[str, Any] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Loads a model in eval mode and accelerates it.

    Args:
        folder: a model folder or the name of a hub repository.
        artifact: a folder written by :func:`river_compile.save` or ``river pack``; None: the twins are packed at
            the first token. With ``on_missing_artifact="save"`` a folder that is missing is written then.
        quality, calibration, options: as for :func:`river_compile.accelerate`.
        loading: arguments of ``from_pretrained``, such as ``{"dtype": "bfloat16"}``; by default the folder's dtype.

    Raises:
        OptionError: (a ``ValueError``) a bad argument.
        OSError: there is no such model (of transformers).
    """
    arguments = {"dtype": "auto", **({} if loading is None else loading)}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **arguments).eval()
    given: dict[str, Any] = {} if artifact is None else {"artifact": os.fspath(artifact)}
    return accelerate(model, quality, calibration, **given, **options)


Module = TypeVar("Module", bound=nn.Module)


def restore(model: Module) -> Module:
    """Undoes ``accelerate`` and ``model.compile(backend="river")``, and frees the twins.

    Offloaded weights come back, bit for bit. What ``torch.compile(model, backend="river")`` returned cannot be taken
    back: such a wrapper compiles again at its next call.

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
    forget(inner)
    return model


def free_cache(model: nn.Module) -> int:
    """Frees the KV cache and the texts that a model keeps for its next call of generate; that one makes its own.

    Args:
        model: the module that was compiled, or the wrapper that ``torch.compile`` returned.

    Returns:
        The bytes of their keys and values, 0 where none were kept.
    """
    record = find_record(model)
    return 0 if record is None else record.prefixes.free()


def bring_back(model: nn.Module) -> int:
    """Brings a model's offloaded weights back into device memory, bit for bit.

    The model, compiled or not, computes the same before and after. With ``offload_policy="exit"`` tokens still leave by
    that depth. The next decode graph that is compiled with ``offload=`` offloads again.

    Args:
        model: the module that was compiled, or the wrapper that ``torch.compile`` returned.

    Returns:
        The bytes that came back, 0 where nothing was offloaded.
    """
    record = find_record(model)
    if record is None:
        return 0
    with record.twins.moving():
        return record.offloaded.restore([*model.parameters(), *model.buffers()])
