"""Drafts by an assistant: a smaller model with the same tokens, all of whose layers run as 4-bit twins.

Its prompts run in 16 bits. Not handled: models with other tokens, or with states that cannot be rewound;
prompts that came as embeddings, whose ids are unknown.
"""

from __future__ import annotations

import math
import warnings

from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import GenerationConfig, PreTrainedModel

from river_compile.building.graph_record import Graphs
from river_compile.config import RiverConfig
from river_compile.decoding.admission import verification_widths
from river_compile.decoding.begin import passes_for
from river_compile.decoding.draft_length import ASSISTANT
from river_compile.decoding.inputs import prepares_as_most_do
from river_compile.decoding.kv_cache import why_no_rewind
from river_compile.decoding.passes import Passes
from river_compile.decoding.prompt import Prompt
from river_compile.decoding.setup import set_up
from river_compile.errors import RiverWarning
from river_compile.exits import WHOLE
from river_compile.kernels.messages import with_id
from river_compile.kernels.ops import MASKED_LOGIT
from river_compile.record import ModelRecord, record_of
from river_compile.tracing.programs import ProgramCache
from river_compile.twins.pack import TwinWeights
from river_compile.upstream.dynamo import OwnCall
from river_compile.upstream.transformers import local_tokenizer, prompt_arguments

_PADDING = 512  # Qwen2.5's vocabularies end at multiples of 128 or 256, with the same tokens before
_ALIKE = ("kernels", "quantizer", "group_size", "graphs", "target_kernels")  # options that the model's own count for
_OWN = {"first_exit": WHOLE, "target_weights": "model"}  # only prompts read the 16-bit weights
_ONE_BY_ONE = 3  # tokens that it lacks at most, if it takes them by draft steps instead of by a pass in 16 bits


class Assistant:
    """A model that drafts the texts of one call, on its own KV cache."""

    source = ASSISTANT
    longest = None

    # Its cache has entries for the first ids of a text. A draft adds some, and what others drafted is missing there
    # until the next step.
    def __init__(self, model: PreTrainedModel, vocabulary: int, least_probability: float | None) -> None:
        self.model, self.least_probability = model, least_probability or 0.0
        self._vocabulary = vocabulary  # of the model that it drafts for
        self._positions = _positions(model)
        self._passes: Passes | None = None  # of the present text; None: it cannot draft it
        self._padding = 0
        self._ids: Tensor | None = None  # of the latest step

    def begin(self, ids_1S: Tensor, padding: int) -> None:
        self._padding, self._ids = padding, None
        ids_1S = self._own(ids_1S)
        # (One token alone: the prompt came as embeddings, whose ids are unknown.)
        if not 2 <= ids_1S.shape[1] < self._positions:
            return
        self._passes = passes = _passes_for(self.model, ids_1S)
        try:
            logits = Prompt(passes, ids_1S[:, :-1], GenerationConfig()).run()
            why_not = _why_no_drafts(passes)
            if why_not:
                self._give_up(why_not)
                return
            passes.widths, passes.vocabulary = verification_widths(15), logits.shape[-1]
            passes.begin_drafts(ids_1S)
            if not passes.can_draft():  # a pass of one token builds the program, and begins to pack the twins
                passes.reserve_slots(ids_1S.shape[1])
                passes.step(ids_1S)
                passes.rewind(1)
        except BaseException:
            self.close()
            raise

    def can_draft(self, tokens: int) -> bool:
        return self._passes is not None and tokens < self._positions and self._passes.can_draft()

    def behind(self, tokens: int) -> int:
        filled = 0 if self._passes is None else self._passes.kv.filled
        return min(tokens - 1 - self._padding - filled, _ONE_BY_ONE + 1)

    def step(self, ids_1S: Tensor) -> Tensor:
        assert self._passes is not None, "it can draft"
        passes, self._ids = self._passes, self._own(ids_1S)
        passes.reserve_slots(self._ids.shape[1] + passes.widths[-1])
        self._take_in(self._ids[:, :-1])
        logits_1V = passes.draft_step(self._ids)
        missing = self._vocabulary - logits_1V.shape[1]
        logits_1V = pad(logits_1V, (0, missing), value=MASKED_LOGIT) if missing > 0 else logits_1V
        return logits_1V[:, : self._vocabulary].to(ids_1S.device)

    def _take_in(self, ids_1S: Tensor) -> None:
        """Run the ids that the cache lacks: by draft steps if they are few, else in passes of all layers."""
        assert self._passes is not None, "it can draft"
        passes = self._passes
        while missing := ids_1S.shape[1] - passes.kv.filled:
            one_by_one = missing <= _ONE_BY_ONE
            tokens = 1 if one_by_one else min(missing, passes.widths[-1])
            upto = ids_1S[:, : passes.kv.filled + tokens]
            if one_by_one:
                passes.draft_step(upto)
            else:
                passes.verify(upto, tokens - 1)
                passes.rewind(passes.width_for(tokens - 1) - tokens)

    def end(self, steps: int) -> None:
        pass

    def rewind(self, tokens: int) -> None:
        if self._passes is not None:
            self._passes.rewind(max(self._passes.kv.filled + self._padding - tokens, 0))

    def close(self) -> None:
        passes, self._passes = self._passes, None
        if passes is None:
            return
        kept = None if self._ids is None else self._ids[:, : passes.kv.filled]
        passes.write_programs()
        passes.release(kept, passes.kv.filled)

    def _own(self, ids_1S: Tensor) -> Tensor:
        """Return ids as the assistant takes them."""
        rows = self.model.get_input_embeddings().weight.shape[0]
        return ids_1S[:, self._padding :].clamp(max=rows - 1).to(self.model.device)

    def _give_up(self, why_not: str) -> None:
        """Leave drafts to other sources, with one warning."""
        self.close()
        refused = record_of(self.model.parameters()).of(_Refused)
        if not refused.told:
            refused.told = True
            message = f"assistant_model={type(self.model).__name__} does not draft: {why_not}"
            warnings.warn(with_id("RC068", message), RiverWarning, stacklevel=3)


class _Refused:
    """Whether a warning said that a model cannot draft."""

    told = False


def prepare(model: PreTrainedModel, target: ModelRecord, config: RiverConfig) -> None:
    """Set up an assistant as its target is, with the target's `config`; one that has been accelerated stays."""
    record = record_of(model.parameters())
    if record.find(OwnCall) is not None:
        return
    options = {name: getattr(config, name) for name in _ALIKE} | _OWN
    twins = target.of(TwinWeights)
    set_up(model, options, RiverConfig.from_options(options), twins.stores, twins.background.enabled)()


def why_not_assistant(model: PreTrainedModel, assistant: PreTrainedModel) -> str:
    """Return why a model cannot draft for another one, and what to do; empty if nothing is against it."""
    if not isinstance(assistant, PreTrainedModel):
        return "it is no model of transformers. Load it with AutoModelForCausalLM"
    if assistant.config.is_encoder_decoder:
        return "it is an encoder-decoder model. Use a decoder-only model"
    if own := why_no_rewind(assistant):
        return f"{own}. Use another model"
    fixed = _fixed_depth(assistant)
    if fixed is not None:
        return f"it was accelerated with exit_depth={fixed}. Call river_compile.restore(assistant_model) first"
    sizes = [m.config.get_text_config(decoder=True).vocab_size for m in (model, assistant)]
    if abs(sizes[0] - sizes[1]) >= _PADDING or not _same_tokens(model, assistant):
        return (
            f"it has other tokens ({sizes[1]} instead of {sizes[0]}). Use a model with the same tokenizer"
            if sizes[0] != sizes[1]
            else "its tokenizer has other tokens. Use a model with the same tokenizer"
        )
    return ""


def _fixed_depth(assistant: PreTrainedModel) -> int | None:
    programs = record_of(assistant.parameters()).find(ProgramCache)
    return None if programs is None else programs.config.exit_depth


class _Compared(dict[str, bool]):
    """Whether a model's tokenizer has the same tokens as those of others, by their names."""


def _same_tokens(model: PreTrainedModel, assistant: PreTrainedModel) -> bool:
    """Whether two models' tokenizers have the same tokens; true if one of them is unknown."""
    compared, name = record_of(assistant.parameters()).of(_Compared), model.name_or_path
    if name not in compared:
        found = [local_tokenizer(m) for m in (model, assistant)]
        compared[name] = None in found or found[0].get_vocab() == found[1].get_vocab()
    return compared[name]


def _passes_for(model: PreTrainedModel, ids_1S: Tensor) -> Passes:
    """Return passes on a KV cache that may hold the text's first ids."""
    kwargs = prompt_arguments(model, ids_1S[:, :-1])
    known = ids_1S[0, :-1].cpu() if prepares_as_most_do(model) else None
    return passes_for(model, kwargs, 1, ids_1S.shape[1], known, WHOLE)


def _why_no_drafts(passes: Passes) -> str:
    """Return why a model whose prompt has run cannot draft."""
    if passes.graph is None:
        return passes.record.of(Graphs).why_not or "Dynamo traced no graph of it"
    return "" if passes.kv.is_full else why_no_rewind(passes.model, passes.kv.cache)


def _positions(model: PreTrainedModel) -> float:
    """Return how many positions a model has embeddings for; rotary ones have no end."""
    most: int = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", 0)
    tables = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    return most if any(0 <= rows - most <= 2 for rows in tables) else math.inf  # (OPT's tables begin at 2)
