"""What a user does with a model's twins: `observe` text for them, `save` them, `refresh` them.

Not handled: other formats than the package's own (:mod:`river_compile.api.export`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from river_compile.errors import ArtifactError
from river_compile.kernels.checks import PATH
from river_compile.model_record import find_record, record_of, unwrap
from river_compile.runtime.executor import RiverExecutor
from river_compile.runtime.tensor_parallel import ranks_of
from river_compile.twins.calibration_stats import Observation
from river_compile.twins.file import write
from river_compile.twins.observe import Tokenizer, record, windows_of
from river_compile.twins.weights import TwinWeight, digest_of, is_in


def observe(
    model: PreTrainedModel,
    tokenizer: Tokenizer | None = None,
    texts: Sequence[str] | None = None,
    *,
    inputs: Iterable[Tensor] | None = None,
    progress: bool = True,
) -> Observation:
    """Records every matrix's inputs in a model, for ``options={"quantizer": "gptq"}`` and ``"awq"``.

    Call it before the first generation with such a quantizer, before or after ``model.compile``; twins that are packed
    already stay as they are. A later call replaces what an earlier one recorded.

    Args:
        model: a causal language model in eval mode.
        tokenizer: maps a text to ``{"input_ids": [...]}``.
        texts: like those that the model will see and write, chat template included; some thousand tokens in all. None
            takes a few short ones that come with the package: :func:`default_texts`.
        inputs: token ids ``[T]`` or ``[B, T]`` without padding, in place of tokenizer and texts.
        progress: whether to show a progress bar.

    Returns:
        What was recorded; the model keeps it too, until ``observation.clear()``.

    Raises:
        OptionError: (a ``ValueError``) neither or both of tokenizer and inputs, or no token in them.
        RankError: ranks that share the model were given different texts.
    """
    model = unwrap(model)
    windows = windows_of(tokenizer, texts, inputs)
    ranks = ranks_of(model.parameters())
    if ranks.several:
        ranks.check_alike("the texts to observe", digest_of(windows))
    observation = record(model, windows, progress=progress)
    record_of(model.parameters()).observation = observation
    return observation


def save(model: nn.Module, folder: str | Path) -> Path:
    """Writes the packed twins of a model; ``options={"artifact": folder}`` reads them at the next start.

    Of a model on several ranks each one calls this and writes its own part, "rank-0-of-2" and so on.

    Args:
        model: a model that has generated with the backend, so that its twins are packed.
        folder: where to; must not exist or be empty. It appears complete or not at all.

    Returns:
        The folder.

    Raises:
        ArtifactError: (a ``ValueError``) nothing is packed, weights changed since, or it cannot be written.
    """
    folder = Path(PATH("folder", folder, ArtifactError))
    mine = ranks_of(unwrap(model).parameters()).folder(folder)
    write(mine, packed_twins(model, mine))
    return folder


def packed_twins(model: nn.Module, folder: Path) -> list[TwinWeight]:
    """Returns the packed twins of a model as its weights are now, for a folder that they are to be written to.

    Raises:
        ArtifactError: (a ``ValueError``) nothing is packed, or weights changed since.
    """
    record = find_record(model)
    made = record.packed if record else []
    if not made:
        raise ArtifactError(
            f"cannot save to {folder}: no twin of this model is packed; generate a token with "
            'model.compile(backend="river") first'
        )
    made = [twin for twin in made if is_in(unwrap(model), twin)] or made  # (not those of adapters that are gone)
    stale = next((twin.name for twin in made if not twin.is_current), None)
    if stale is not None:
        raise ArtifactError(
            f"cannot save to {folder}: the weights of {stale} changed after they were packed; call "
            "river_compile.refresh(model) and generate a token first"
        )
    return made


def refresh(model: nn.Module) -> int:
    """Has the next text packed with the twins of the weights as they are now, whatever changed them.

    That happens by itself at the next prompt after ``load_state_dict``, an optimizer's step, ``parameter.data = ...``
    or a merged adapter. Call it after changing single elements under ``torch.inference_mode()`` or through
    ``parameter.data``, which PyTorch does not count. It reads all weights. Texts that were kept for the next call of
    generate are forgotten.

    Args:
        model: the module that was compiled, or the wrapper that ``torch.compile`` returned.

    Returns:
        The number of weights that the next text packs again, those of several layers in one matmul counting once.
    """
    record = find_record(model)
    if record is None:
        return 0
    record.prefixes.forget_texts()
    for graph in record.graphs:
        if isinstance(executor := graph.executor(), RiverExecutor):
            executor.model_state = None
    return record.twins.look_again()
