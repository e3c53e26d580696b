"""Calibration statistics for "awq" and "gptq": ``observe(model, tokenizer, texts)`` records what each matrix reads.

Texts run through the model as it is, never through compiled code, one after another. Every product of an input with a
two-dimensional parameter is seen where it happens (``F.linear``, ``addmm``, ``matmul``: the forms that twins replace),
and the input's second moments are kept under that parameter, as long as it lives.

Inputs are kept as they are while they take less room than their moments, ``4 K^2`` bytes for K features, and are summed
up then: some 2 K tokens in 16 bits. Experts that are stacked in one parameter run one after another meanwhile, and each
has moments of its own. Not handled: other ways to read such a stack than one expert, or all of them, at a time.
"""

from __future__ import annotations

import contextlib
import functools
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import resources

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary
from tqdm import tqdm
from transformers import PreTrainedModel

from river_compile.errors import OptionError
from river_compile.state import state_of, unwrap
from river_compile.upstream.tensors import version_of

_PRODUCTS = (nn.functional.linear, torch.addmm, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
Tokenizer = Callable[[str], Mapping[str, Sequence[int]]]
_WINDOW = 512  # tokens that run at once: the logits of a large vocabulary take memory


def observe(
    model: PreTrainedModel,
    tokenizer: Tokenizer | None = None,
    texts: Sequence[str] | None = None,
    *,
    inputs: Iterable[Tensor] | None = None,
    progress: bool = True,
) -> Observation:
    """Records what every matrix of a model reads, for ``options={"quantizer": "gptq"}`` and ``"awq"``.

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
    """
    model = unwrap(model)
    windows = windows_of(tokenizer, texts, inputs, "observe")
    observation = Observation()
    recorder = _Recorder(model.parameters(), observation)
    bar = tqdm(windows, desc="river: observing", unit="text", leave=False, delay=1, disable=not progress)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), _one_expert_at_a_time(model):
        for ids in bar:
            with recorder:
                model(input_ids=ids.to(model.device), use_cache=False)
            observation.tokens += ids.numel()
    state_of(model.parameters()).put(observation)
    return observation


@contextlib.contextmanager
def _one_expert_at_a_time(model: PreTrainedModel) -> Iterator[None]:
    """Has transformers multiply by one expert of a stack after another."""
    if all(p.dim() != 3 for p in model.parameters()):
        yield
        return
    before = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def windows_of(
    tokenizer: Tokenizer | None, texts: Sequence[str] | None, inputs: Iterable[Tensor] | None, caller: str
) -> list[Tensor]:
    """Returns token ids ``[B, T]`` of texts or inputs, cut into pieces that run at once; raises as `observe`."""
    if (tokenizer is None) == (inputs is None):
        raise OptionError(f"{caller} takes a tokenizer (and texts=), or inputs=[ids, ...]: one of the two")
    if tokenizer is not None:
        chosen = default_texts() if texts is None else checked_texts(texts)
        inputs = [torch.tensor(tokenizer(text)["input_ids"]) for text in chosen]
    batches = [torch.atleast_2d(ids) for ids in inputs or ()]
    windows = [window for ids in batches if ids.numel() for window in ids.split(_WINDOW, dim=1)]
    if not windows:
        raise OptionError(f"{caller} was given no token; pass texts= of some thousand tokens in all")
    return windows


def checked_texts(texts: object) -> list[str]:
    """Returns texts as a list.

    Raises:
        OptionError: they are no list of strings.
    """
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Iterable):
        raise OptionError(f"texts={reprlib.repr(texts)} is not allowed; it must be a list of strings")
    listed = list(texts)
    for number, text in enumerate(listed):
        if not isinstance(text, str):
            raise OptionError(f"texts[{number}]={reprlib.repr(text)} is not allowed; it must be a string")
    return listed


def default_texts() -> list[str]:
    """Returns short texts of many kinds that were written for this package.

    Texts like those that a model will see serve it better.
    """
    content = resources.files("river_compile.twins").joinpath("default_texts.txt").read_text(encoding="utf-8")
    return content.rstrip("\n").split("\n%%\n")


class InputMoments:
    """Second moments of the inputs of a matrix, ``E[x x^T]``, for K `features`."""

    def __init__(self, features: int) -> None:
        self.features = features
        self.tokens = 0
        self._rows: list[Tensor] = []
        self._sum: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self._rows) + (0 if self._sum is None else self._sum.nbytes)

    def add(self, x: Tensor) -> None:
        """Adds inputs ``[..., K]``."""
        rows = x.detach().reshape(-1, self.features).clone()
        self._rows.append(rows)
        self.tokens += len(rows)
        if self._sum is not None or self.nbytes > 4 * self.features**2:
            self._sum = self._summed()
            self._rows = []

    def matrix(self) -> Tensor:
        """Returns the moments, float32 ``[K, K]``."""
        return self._summed() / self.tokens

    def _summed(self) -> Tensor:
        if not self._rows:
            assert self._sum is not None, "no input was added"
            return self._sum
        rows = torch.cat(self._rows).float()
        return rows.T @ rows if self._sum is None else self._sum.addmm(rows.T, rows)


class ExpertMoments:
    """Second moments of what each of E stacked matrices with K `features` reads."""

    def __init__(self, experts: int, features: int) -> None:
        self._each = [InputMoments(features) for _ in range(experts)]

    @property
    def nbytes(self) -> int:
        return sum(moments.nbytes for moments in self._each)

    def add(self, expert: int, x: Tensor) -> None:
        """Adds inputs ``[..., K]`` of one of them."""
        self._each[expert].add(x)

    def of(self, expert: int) -> tuple[Tensor, int]:
        """Returns an expert's moments and tokens; one that no token reached has the moments of all."""
        own = self._each[expert]
        return (own.matrix(), own.tokens) if own.tokens else (self._together, 0)

    @functools.cached_property
    def _together(self) -> Tensor:
        reached = [moments for moments in self._each if moments.tokens]
        total = sum(moments.tokens for moments in reached)
        return torch.stack([moments.matrix() * (moments.tokens / total) for moments in reached]).sum(0)


class Observation:
    """Calibration statistics of a model: the second moments of what its matrices read; see :func:`observe`.

    `number` distinguishes observations, for what was made with them.
    """

    _made = 0

    def __init__(self) -> None:
        Observation._made += 1
        self.number = Observation._made
        self.tokens = 0
        self.moments: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    @property
    def nbytes(self) -> int:
        return sum(moments.nbytes for moments in set(self.moments.values()))

    def moments_of(self, weight: Tensor) -> InputMoments | ExpertMoments | None:
        """Returns the moments of a parameter's inputs, of each expert's for a stack; None where no text reached it."""
        return self.moments.get(weight)

    def clear(self) -> None:
        """Frees its memory; twins that are packed stay."""
        self.moments.clear()

    def __str__(self) -> str:
        return f"observed {len(self.moments)} matrices on {self.tokens} tokens ({self.nbytes / 1e6:.0f} MB)"


class _Recorder(TorchFunctionMode):
    """Adds every input of a product with one of the parameters to that parameter's moments."""

    def __init__(self, parameters: Iterable[Tensor], observation: Observation) -> None:
        super().__init__()
        self._observation = observation
        self._matrices: dict[int, tuple[Tensor, int]] = {}  # by address: the parameter, and which one of its stack
        self._stacks: dict[int, Tensor] = {}
        for parameter in parameters:
            if parameter.dim() == 2:
                self._matrices[parameter.data_ptr()] = parameter, 0
            elif parameter.dim() == 3:
                self._stacks[parameter.data_ptr()] = parameter
                self._matrices |= {matrix.data_ptr(): (parameter, i) for i, matrix in enumerate(parameter.detach())}
        self._last: tuple[Tensor, int, InputMoments] | None = None

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if func in _PRODUCTS:
            known = [self._matrices.get(t.data_ptr()) if t.dim() == 2 else None for t in tensors]
            at = next((i for i, found in enumerate(known) if found is not None), 0)
            found = known[at] if at > 0 else None  # (the first argument is an input or a bias)
            if found is not None and found[0].dim() == 2:
                self._record(tensors[at - 1], found[0])
            elif found is not None:
                self._record_expert(tensors[at - 1], *found)
        elif func is torch.bmm and (stack := self._stacks.get(tensors[1].data_ptr())) is not None:
            for expert, x in enumerate(tensors[0]):  # (rows that it was not chosen for are zero)
                self._record_expert(x[(x != 0).any(-1)], stack, expert)
        return func(*args, **kwargs)

    def _record_expert(self, x: Tensor, stack: Tensor, expert: int) -> None:
        if not x.numel():
            return
        moments = self._observation.moments.get(stack)
        if moments is None:
            moments = self._observation.moments[stack] = ExpertMoments(len(stack), x.shape[-1])
        moments.add(expert, x)

    def _record(self, x: Tensor, weight: Tensor) -> None:
        """Adds an input; matrices that read one and the same, as q, k and v do, share its moments."""
        moments = self._observation.moments.get(weight)
        if self._last is not None and moments in (None, self._last[2]):
            before, version, shared = self._last
            if before is x and version == version_of(x):
                self._observation.moments[weight] = shared
                return
        if moments is None:
            moments = self._observation.moments[weight] = InputMoments(x.shape[-1])
        moments.add(x)
        self._last = (x, version_of(x), moments)
