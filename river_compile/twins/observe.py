"""Calibration statistics for "awq" and "gptq": what each matrix of a model reads in some texts.

Texts run through the model as it is, never through compiled code. Every product of an input with a two-dimensional
parameter is seen where it happens. Experts that are stacked in one parameter run one after another meanwhile, and each
has moments of its own. :func:`record` keeps the moments of all matrices, over any number of texts; :func:`visit` hands
those of each matrix over in the middle of one forward pass, so that nobody holds the moments of more than a few.
"""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from river_compile.errors import OptionError
from river_compile.twins.calibration_stats import ExpertMoments, InputMoments, Moments, Observation, Products
from river_compile.twins.sampling import everything_counts
from river_compile.upstream.dynamo import uncompiled_forward
from river_compile.upstream.tensors import version_of

Tokenizer = Callable[[str], Mapping[str, Sequence[int]]]
_WINDOW = 512  # tokens that run at once: the logits of a large vocabulary take memory


@torch.no_grad()
def record(model: nn.Module, windows: Iterable[Tensor], *, own: bool = False, progress: bool = False) -> Observation:
    """Returns the statistics of a model's matrices on token ids ``[B, T]``; `own` says that it sampled them itself."""
    observation, forward = Observation(own), uncompiled_forward(model)
    recorder, device = _Recorder(model.parameters(), observation), next(model.parameters()).device
    bar = tqdm(windows, desc="river: observing", unit="text", leave=False, delay=1, disable=not progress)
    with one_expert_at_a_time(model):
        for ids in bar:
            with recorder:
                forward(input_ids=ids.to(device), use_cache=False, **everything_counts(model, ids.to(device)))
            observation.tokens += ids.numel()
    return observation


@torch.no_grad()
def visit(model: nn.Module, ids_BT: Tensor, weights: Iterable[Tensor], see: Callable[[Tensor, Moments], None]) -> None:
    """Runs token ids through a model until it has read these matrices, and calls `see` with the moments of each.

    The logits are never computed. A matrix that the model reads several times is seen the first time; one that it does
    not read, or an expert's, not at all.

    Raises:
        Exception: whatever the model or `see` raises.
    """
    visitor, device = _Visitor(model.parameters(), weights, see), next(model.parameters()).device
    ids_BT = ids_BT.to(device)
    with one_expert_at_a_time(model), contextlib.suppress(_AllSeen), visitor:
        uncompiled_forward(model)(input_ids=ids_BT, use_cache=False, **everything_counts(model, ids_BT))
        visitor.see_stacks()


@contextlib.contextmanager
def one_expert_at_a_time(model: Any) -> Iterator[None]:
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


def windows_of(data: Iterable[str] | Iterable[Tensor] | None, tokenizer: Tokenizer | None) -> list[Tensor]:
    """Returns calibration data as token ids ``[B, T]``, cut into windows; raises as `collect_statistics`."""
    if isinstance(data, (str, bytes, Tensor)) or not (data is None or isinstance(data, Iterable)):
        raise OptionError(f"calibration_data={reprlib.repr(data)} is not allowed; give a list of texts or of token ids")
    listed: list[Any] = default_texts() if data is None else list(data)
    if any(not isinstance(entry, Tensor) for entry in listed):
        if not callable(tokenizer):
            raise OptionError(
                "calibration_data= of texts needs tokenizer=, which maps a text to its input_ids; give both"
            )
        listed = [torch.tensor(tokenizer(text)["input_ids"]) for text in checked_texts(listed)]
    elif tokenizer is not None:
        raise OptionError("tokenizer= is for texts, and calibration_data= holds token ids; leave it out")
    windows = [window for ids in map(torch.atleast_2d, listed) if ids.numel() for window in ids.split(_WINDOW, dim=1)]
    if not windows:
        raise OptionError("calibration_data= has no token; give texts of some thousand tokens in all")
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


class _Recorder(Products):
    """Adds every input of a product with one of the parameters to that parameter's moments."""

    def __init__(self, parameters: Iterable[Tensor], observation: Observation) -> None:
        super().__init__(parameters)
        self._observation = observation
        self._last: tuple[Tensor, int, InputMoments] | None = None

    def meets(self, x: Tensor, parameter: Tensor, index: int) -> None:
        if parameter.dim() == 2:
            self._record(x, parameter)
        elif x.numel():
            self._record_expert(x, parameter, index)

    def _record_expert(self, x: Tensor, stack: Tensor, expert: int) -> None:
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


class _AllSeen(BaseException):
    """Ends a forward pass. (No error: the code of any model may catch those.)"""


class _Visitor(Products):
    """Hands over the moments of each wanted matrix when the model reads it; see :func:`visit`."""

    def __init__(
        self, parameters: Iterable[Tensor], weights: Iterable[Tensor], see: Callable[[Tensor, Moments], None]
    ) -> None:
        super().__init__(parameters)
        self._wanted = {id(weight) for weight in weights}
        self._stacks_met: dict[int, tuple[Tensor, ExpertMoments]] = {}
        self._see = see

    def meets(self, x: Tensor, parameter: Tensor, index: int) -> None:
        if parameter.dim() == 3:
            self._meets_expert(x, parameter, index)
            return
        self.see_stacks()  # (all experts of a block have run when the next matrix is read)
        if id(parameter) in self._wanted:
            moments = InputMoments(x.shape[-1])
            moments.add(x)
            self._hand_over(parameter, moments)

    def _meets_expert(self, x: Tensor, stack: Tensor, expert: int) -> None:
        if id(stack) not in self._wanted:
            return
        met = self._stacks_met.setdefault(id(stack), (stack, ExpertMoments(len(stack), x.shape[-1])))
        if x.numel():
            met[1].add(expert, x)

    def see_stacks(self) -> None:
        """Hands over the moments of experts that have all run."""
        met, self._stacks_met = self._stacks_met, {}
        for stack, moments in met.values():
            if moments.nbytes:
                self._hand_over(stack, moments)

    def _hand_over(self, parameter: Tensor, moments: Moments) -> None:
        self._wanted.remove(id(parameter))
        self._see(parameter, moments)
        if not self._wanted:
            raise _AllSeen
