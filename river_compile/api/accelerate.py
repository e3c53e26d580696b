"""One line before a pipeline: `accelerate` replaces a model's ``generate``, `restore` undoes it.

``model(...)`` itself stays the plain model. Not handled: wrappers (``torch.compile(model)``, PEFT's) instead of the
transformers model in them; `from_pretrained` of models that are not causal language models.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from river_compile.api.generation import generate_by, has_generate_of_its_own, mode_of, restore_generate
from river_compile.api.mxfp4 import load_as_it_comes
from river_compile.api.quality import MODE_OPTIONS, Rule, asked_for
from river_compile.backend import river
from river_compile.config import RiverConfig
from river_compile.decoding.prefix_cache import PrefixPool
from river_compile.decoding.setup import set_up
from river_compile.errors import OptionError, RiverWarning
from river_compile.kernels.checks import FLAG
from river_compile.kernels.messages import with_id
from river_compile.record import find_record, forget, record_of, unwrap
from river_compile.runtime.placement import Placement
from river_compile.runtime.processes import processes_of
from river_compile.twins.file import FILE, TwinFile
from river_compile.twins.making import Statistics
from river_compile.twins.observe import Observation, Tokenizer, windows_of
from river_compile.twins.observe import record as record_inputs
from river_compile.twins.pack import TwinWeights
from river_compile.upstream.dynamo import OwnCall, compiled_with, drop_graphs, untraceable

Model = TypeVar("Model", bound=PreTrainedModel)

_ARGUMENTS = (  # of accelerate by keyword
    *("calibration_data", "tokenizer", "compile_cache", "prefix_cache", "background_packing"),
)


def accelerate(
    model: Model,
    quality: str | None = None,
    *,
    strict: bool = False,
    calibration: Rule | None = None,
    calibration_data: Sequence[str] | Sequence[Tensor] | None = None,
    tokenizer: Tokenizer | None = None,
    compile_cache: bool = True,
    prefix_cache: bool = False,
    background_packing: bool = True,
    **options: Any,
) -> Model:
    """Make a model generate faster, by ``model.generate``, ``pipeline(model=model)`` and all other callers.

        model = AutoModelForCausalLM.from_pretrained("path/to/model", dtype=torch.bfloat16)
        river_compile.accelerate(model)
        output = model.generate(**inputs, max_new_tokens=32)  # as before, faster

    Only ``generate`` is replaced; its first calls trace the model and quantize its twins. A call that River does not
    support (beams, assisted modes, attention weights as outputs, ...) runs transformers' own code, with one warning for
    each reason. `deepcopy`, `pickle` and `save_pretrained` give the plain model, and `river_compile.restore` undoes
    all of it. A second call with other arguments replaces the first. After an error the model is as it was.

    Args:
        model: a causal language model of transformers.
        quality: "exact" (default): the twins draft, the model's own weights verify, and the output is the model's.
            "fast": tokens exit early to the 4-bit twins, and the output changes. Without an exit rule among the options
            one is tuned within ``budget=`` (0.05), a mean KL in nats per token; full depth answers until then.
        strict: with "exact": raise an error if a verifying pass might not be bit-identical to one without drafts.
        calibration: an exit rule of `river_compile.tune_exit` or the file it was saved to; implies "fast".
        calibration_data: texts like yours, or tensors of token ids ``[T]`` or ``[B, T]``, to quantize the twins with
            ("gptq" and "awq"). None: the package's texts, or text that the model samples if its folder has no
            tokenizer.
        tokenizer: for texts in `calibration_data`.
        compile_cache: whether to reuse and keep what is built in the compile cache (docs/startup.md).
        prefix_cache: whether prompts of 256 tokens or more are kept on disk, in the compile cache, with their keys and
            values. A later process whose prompt begins like one runs only the new part, with the same output
            (docs/startup.md). On a CPU, in 16 bits.
        background_packing: with "exact" on a CPU: whether to answer, with drafts from the context and then by quick
            twins, while new twins are packed in a thread of lower priority. With "fast" and no rule: whether to answer
            at full depth meanwhile and until a rule is tuned. False: the first call waits for both.
        options: of the backend (such as ``twins=``), and with "exact" transformers' ``num_assistant_tokens``,
            ``num_assistant_tokens_schedule``, ``assistant_confidence_threshold``, ``prompt_lookup_num_tokens``,
            ``assistant_model``, a smaller model with the same tokens that drafts in place of the twins, and
            ``use_mtp``, drafts by the checkpoint's own layers for multi-token prediction (docs/options.md).

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
    why_not = untraceable(model) or without_values(model)
    if why_not:
        raise OptionError(f"Cannot accelerate this {type(model).__name__}: {why_not}", id="RC006")
    mode, backend_options, config = asked_for(model, quality, strict, calibration, options)
    compile_cache = FLAG("compile_cache", compile_cache, OptionError)
    background_packing = FLAG("background_packing", background_packing, OptionError)
    if FLAG("prefix_cache", prefix_cache, OptionError) and not compile_cache:
        raise OptionError(
            "prefix_cache=True requires compile_cache=True, where prompts are kept. Remove one", id="RC003"
        )
    missing = config.twins is not None and not os.path.exists(Path(config.twins) / FILE)
    if config.twins is not None and missing and config.on_missing_twins == "raise":
        TwinFile(config.twins)  # raises the error that says what is wrong
    if tokenizer is not None and calibration_data is None:
        raise OptionError("tokenizer= requires calibration_data=. Give both or none", id="RC003")
    if calibration_data is not None:
        collect_statistics(model, calibration_data, tokenizer)
    put_programs = set_up(model, backend_options, config, compile_cache, background_packing, prefix_cache)
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
    put_programs()
    return model


def without_values(model: nn.Module) -> str:
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


def from_pretrained(
    name: str | os.PathLike[str],
    quality: str | None = None,
    *,
    strict: bool = False,
    calibration: Rule | None = None,
    twins: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a causal language model in eval mode and accelerate it; MXFP4 experts stay in 4 bits (`load_mxfp4`).

        model = river_compile.from_pretrained("path/to/model", dtype=torch.bfloat16)

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
    ours = {*_ARGUMENTS, *RiverConfig.options(), *MODE_OPTIONS}
    options = {key: kwargs.pop(key) for key in ours & kwargs.keys()}
    try:
        model = load_as_it_comes(name, **kwargs)
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

        river_compile.collect_statistics(model, texts, tokenizer)
        river_compile.accelerate(model)  # the twins are quantized with these statistics

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
        OptionError: (a ``ValueError``) texts without a tokenizer, a tokenizer without texts, no token in the data, or
            a model that several processes share.
    """
    model = unwrap(model)
    if processes_of(model.parameters()).several:
        raise OptionError(
            "Statistics are not available for a model that several processes share. Remove calibration_data, and use "
            "quantizer='hqq'",
            id="RC122",
        )
    windows = windows_of(data, tokenizer)
    observation = record_inputs(model, windows, progress=progress)
    record_of(model.parameters()).of(Statistics).observed = observation
    return observation


Module = TypeVar("Module", bound=nn.Module)


def restore(model: Module) -> Module:
    """Undo ``accelerate`` and ``model.compile(backend="river")``, and free the twins.

        river_compile.restore(model)  # transformers' generate again

    Weights that moved return to device memory, bit for bit. A wrapper that ``torch.compile(model, backend="river")``
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
    assistant = getattr(mode_of(inner), "assistant_model", None)
    restore_generate(inner)
    if assistant is not None and mode_of(assistant) is None:  # it was set up for this model
        restore(assistant)
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

        print(f"{river_compile.empty_cache(model) / 1e6:.0f} MB freed")

    Args:
        model: the module that was compiled, or the wrapper that ``torch.compile`` returned.

    Returns:
        The bytes of keys and values that were freed.
    """
    record = find_record(model)
    return 0 if record is None else record.of(PrefixPool).free()


def bring_back(model: nn.Module) -> int:
    """Move weights back into device memory, bit for bit; return their bytes."""
    record = find_record(model)
    if record is None:
        return 0
    with record.of(TwinWeights).moving():
        return record.of(Placement).restore([*model.parameters(), *model.buffers()])
