"""Self-calibration: statistics of the twins on the package's texts, or on text that the model samples; their loss.

Not handled: models that cannot be sampled from token ids and their cache alone (`refusal` has the reason); models that
several processes run together; rounding of activations in kernels.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from river_compile.kernels.native.load import loaded
from river_compile.kernels.portable import token_kl
from river_compile.progress import stage_reached, stage_shown
from river_compile.twins.observe import (
    MatmulHook,
    Moments,
    default_texts,
    full_attention_mask,
    one_expert_at_a_time,
    visit,
)
from river_compile.twins.weights import TwinWeight
from river_compile.upstream.dynamo import uncompiled_forward
from river_compile.upstream.transformers import cache_argument, local_tokenizer

log = logging.getLogger("river_compile.twins")
R = TypeVar("R")
_ROWS = 32
_STATISTICS_TOKENS, _LOSS_TOKENS = 32, 8  # most in a row: each further token of a row is one more step
LOSS_SEED = 1  # not that of the statistics' text, so that nothing was fitted to it
_LARGE = 0.2  # nats
_WINDOW, _WINDOWS = 256, 4  # of the package's texts
KL_TOKENS = 64  # tokens per comparison: large vocabularies take memory in float32


class Text(NamedTuple):
    """Text for statistics."""

    ids: Tensor  # [B, T]
    sampled: bool  # by the model; else it is the package's

    @property
    def source(self) -> str:
        """The text in words."""
        return f"{self.ids.numel()} tokens " + ("that the model sampled" if self.sampled else "of the package's texts")


class SelfCalibration:
    """Text of one model, kept as token ids: the package's, or sampled ones until the model's weights change."""

    def __init__(self) -> None:
        self._model: Callable[[], nn.Module | None] = lambda: None
        self._text: Text | None = None
        self.refusal = "torch.compile was not given a model"  # why there is no text, else empty
        self.seconds = 0.0  # of sampling and reading it, including work done meanwhile

    def attach(self, model: nn.Module) -> None:
        """Set the model."""
        if self._model() is not model:
            self._model, self._text, self.refusal = weakref.ref(model), None, ""

    @property
    def model(self) -> nn.Module | None:
        """The model, None if it was not given or is gone."""
        return self._model()

    def stream_moments(
        self, weights: Sequence[Tensor], see: Callable[[Tensor, Moments], None], *, resample: bool = False
    ) -> str:
        """Call `see` with the moments of each weight in the order of reading; return the text in words."""

        def run(model: nn.Module) -> str:
            text = self._text_of(model, resample)
            visit(model, text.ids, weights, see)
            return text.source

        return self._run(run) or ""

    def _run(self, function: Callable[[nn.Module], R]) -> R | None:
        """Call `function(model)` uncompiled; None if it raises."""
        model = self._model()
        if model is None or self.refusal:
            return None
        start = time.perf_counter()
        try:
            with NativeLinear():
                return function(model)
        except Exception as error:  # any model's code may fail here
            self.refusal = _why(error)
            log.info("%s cannot sample text for its twins: %s", type(model).__name__, self.refusal)
            return None
        finally:
            self.seconds += time.perf_counter() - start

    def _text_of(self, model: nn.Module, resample: bool) -> Text:
        known = self._text
        if known is None or (known.sampled and resample):
            ids = None if known is not None else package_ids(model)
            if ids is None:
                with stage_shown("reading own text"):
                    known = Text(sample(model, _ROWS, _row_length(model, _STATISTICS_TOKENS)), sampled=True)
            else:
                known = Text(ids, sampled=False)
            self._text = known
        return known

    def loss(self, packed: Iterable[TwinWeight]) -> TwinLoss | None:
        """Estimate the joint loss of these twins on other text; None if the model cannot be sampled."""
        model = self._model()
        if model is None or self.refusal:
            return None
        try:
            with NativeLinear():
                return estimate_loss(model, packed)
        except Exception as error:  # as above
            log.info("the loss of the twins of %s is not known: %s", type(model).__name__, _why(error))
            return None


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.200}"


@dataclass(frozen=True)
class TwinLoss:
    """The joint loss of all twins of a model."""

    kl: float  # mean KL divergence from the backbone, in nats per token
    agreement: float  # share of tokens with the same most likely successor
    tokens: int  # sampled for it

    @property
    def large(self) -> bool:
        """Whether early exits are likely to change tokens."""
        return self.kl > _LARGE

    def __str__(self) -> str:
        return f"KL {self.kl:.3f}, {100 * self.agreement:.0f} % of next tokens, on {self.tokens} tokens of its own"


@torch.no_grad()
def estimate_loss(model: nn.Module, packed: Iterable[TwinWeight]) -> TwinLoss:
    """Compare a model's logits with and without its twins on sampled text; raises as `sample`."""
    # The estimate is for exits before the first block, after a prompt through the twins: an upper bound for all exits.
    ids = sample(model, _ROWS, _row_length(model, _LOSS_TOKENS), LOSS_SEED)
    reference = logits_of(model, ids).flatten(0, 1)
    logits = logits_of(model, ids, packed).flatten(0, 1)
    pairs = zip(reference.split(KL_TOKENS), logits.split(KL_TOKENS), strict=True)
    kl = torch.cat([token_kl(a, b) for a, b in pairs]).mean().item()
    agreement = (reference.argmax(-1) == logits.argmax(-1)).float().mean().item()
    return TwinLoss(kl, agreement, ids.numel())


def logits_of(model: nn.Module, ids_BT: Tensor, twins: Iterable[TwinWeight] = ()) -> Tensor:
    """Return the model's logits ``[B, T, V]``, with twins in place of the weights that they were made from."""
    with one_expert_at_a_time(model), _InTwins(model.parameters(), list(twins)):
        inputs = {"input_ids": ids_BT, "use_cache": False, **full_attention_mask(model, ids_BT)}
        logits: Tensor = uncompiled_forward(model)(**inputs).logits
    return logits


class _InTwins(MatmulHook):
    """Multiplies by the dequantized weights of twins."""

    def __init__(self, parameters: Iterable[Tensor], packed: Sequence[TwinWeight]) -> None:
        super().__init__(parameters)
        self._parts: dict[int, tuple[TwinWeight, int]] = {}  # by parameter: its matmul, and the part
        for twin in packed:
            weights = twin.parameters[: len(twin.matmul.weights)]
            self._parts |= {id(weight): (twin, i) for i, weight in enumerate(weights)}
        self._last: tuple[TwinWeight, Tensor] | None = None

    def substitute(self, matrix: Tensor, parameter: Tensor, index: int | None) -> Tensor:
        found = self._parts.get(id(parameter))
        if found is None:
            return matrix
        twin, part = found
        whole = self._dequantized(twin)
        if twin.matmul.experts:
            stack = whole.unflatten(0, (twin.matmul.experts, -1))
            weight = stack if index is None else stack[index]
        else:
            weight = whole.split(twin.matmul.out_features)[part]
        weight = weight.to(matrix.dtype)
        # A block may read its parameter transposed: it then has the strides of the transposed matrix.
        as_stored = weight.mT if twin.matmul.transposed else weight
        same = matrix.stride()[-2:] == parameter.stride()[-2:] and matrix.shape[-2:] == parameter.shape[-2:]
        return as_stored if same else as_stored.mT

    def _dequantized(self, twin: TwinWeight) -> Tensor:
        if self._last is None or self._last[0] is not twin:
            self._last = twin, twin.dequantize()
        return self._last[1]


def package_ids(model: nn.Module) -> Tensor | None:
    """Return the package's texts as token ids ``[B, T]``; None if the model's folder has no fitting tokenizer."""
    # Twins that were fitted to them are as near to the backbone as with text that the model sampled, on each kind of
    # text (docs/notes/2026-11-quantizers.md). Sampling takes as long as all the rest for billions of weights.
    network: Any = model
    config = network.config.get_text_config()
    length = min(_WINDOW, getattr(config, "max_position_embeddings", None) or _WINDOW)
    tokenizer = local_tokenizer(model)
    if tokenizer is None:
        return None
    try:
        ids = torch.tensor([token for text in default_texts() for token in tokenizer(text)["input_ids"]])
        starts = torch.linspace(0, len(ids) - length, _WINDOWS).long().tolist()
        windows = torch.stack([ids[start : start + length] for start in starts])
    except Exception as error:  # any tokenizer's code may fail
        log.info("the package's texts are not read: %s", _why(error))
        return None
    return windows.to(network.device) if int(ids.max()) < config.vocab_size else None


def beginnings(model: nn.Module, rows: int, tokens: int) -> Tensor | None:
    """Return token ids ``[rows, tokens]`` that the package's texts begin with; None without a fitting tokenizer."""
    tokenizer = local_tokenizer(model)
    if tokenizer is None:
        return None
    network: Any = model
    try:
        ids = [list(tokenizer(text)["input_ids"])[:tokens] for text in default_texts()]
        begun = torch.tensor([row for row in ids if len(row) == tokens][:rows])
        fits = len(begun) and int(begun.max()) < network.config.get_text_config().vocab_size
    except Exception as error:  # any tokenizer's code may fail
        log.info("the package's texts are not read: %s", _why(error))
        return None
    return begun.to(network.device) if fits else None


@torch.no_grad()
def sample(model: nn.Module, rows: int, tokens: int, seed: int = 0, begun: Tensor | None = None) -> Tensor:
    """Sample token ids ``[rows, tokens]`` from a model, at temperature 1. Raises as the model does."""
    # One batch of rows that begin with a uniformly drawn token, as in LLM-QAT (Liu et al. 2023, arXiv 2305.17888), or
    # as `begun` does. A separate generator makes the text reproducible and leaves the caller's random state alone. The
    # model runs uncompiled, also while Dynamo compiles it.
    network: Any = model
    forward, device = uncompiled_forward(model), next(model.parameters()).device
    draws = torch.Generator(device).manual_seed(seed)
    vocabulary = network.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (rows, 1), generator=draws, device=device) if begun is None else begun
    name = cache_argument(model)
    cache: dict[str, Any] = {}
    while ids.shape[1] < tokens:
        outputs = forward(
            input_ids=ids[:, -1:] if cache else ids, use_cache=True, **full_attention_mask(model, ids), **cache
        )
        cache = {name: outputs[name]}
        ids = torch.cat([ids, _draw(outputs.logits[:, -1], draws)], dim=1)
        stage_reached(ids.shape[1] / tokens)
    return ids


def _draw(logits: Tensor, draws: torch.Generator) -> Tensor:
    """Draw a token ``[B, 1]`` for each row of logits ``[B, V]``, with one random number each."""
    up_to = logits.float().softmax(-1).cumsum(-1)
    if not torch.isfinite(up_to).all():
        raise ValueError("its logits are not finite")
    points = torch.rand(len(logits), 1, generator=draws, device=logits.device) * up_to[:, -1:]
    return torch.searchsorted(up_to, points, right=True).clamp(max=logits.shape[1] - 1)


def _row_length(model: nn.Module, most: int) -> int:
    """Return tokens per row, 4 to `most`: in all rows two for each feature of the hidden state."""
    network: Any = model
    return min(most, max(4, 2 * network.config.get_text_config().hidden_size // _ROWS))


# Without AVX-512, torch's own 16-bit linear takes ten times as long.
class NativeLinear(TorchFunctionMode):
    """Inside, `F.linear` of ordinary 16-bit tensors runs the C++ kernels, if loaded. No gradients."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func is nn.functional.linear and loaded():
            x, weight, bias = _operands(*args, **kwargs)
            if all(_is_supported(t) and t.dtype == x.dtype for t in (x, weight, bias) if t is not None):
                return torch.ops.river_native.dense(x, [weight], [] if bias is None else [bias])
        return func(*args, **kwargs)


def _operands(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def _is_supported(x: Tensor) -> bool:
    plain = type(x) in (Tensor, nn.Parameter) and x.is_cpu and x.is_contiguous()
    return plain and x.dtype in (torch.bfloat16, torch.float16) and not (torch.is_grad_enabled() and x.requires_grad)
