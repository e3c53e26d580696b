"""Calibration statistics for "awq" and "gptq": what each matrix of a model reads in some texts.

Texts run through the model as it is, never through compiled code. Every product of an input with a two-dimensional
parameter is seen where it happens. Experts that are stacked in one parameter run one after another meanwhile, and each
has moments of its own. :func:`record` keeps the moments of all matrices, over any number of texts; :func:`visit` hands
those of each matrix over in the middle of one forward pass, so that nobody holds the moments of more than a few.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary
from tqdm import tqdm

from river_compile.errors import OptionError
from river_compile.kernels.quant.moments import RowMoments, SecondMoments, WholeMoments
from river_compile.upstream.dynamo import uncompiled_forward
from river_compile.upstream.tensors import local_of, version_of

Tokenizer = Callable[[str], Mapping[str, Sequence[int]]]
_FEWER = 4  # times as many features as tokens, whatever the matrix's rows; nearer to each other, it depends on those
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
                forward(input_ids=ids.to(device), use_cache=False, **full_attention_mask(model, ids.to(device)))
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
        uncompiled_forward(model)(input_ids=ids_BT, use_cache=False, **full_attention_mask(model, ids_BT))
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


def full_attention_mask(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Returns the mask for ids of which none is padding, for a model that takes one: it may draw any token."""
    takes_mask = "attention_mask" in inspect.signature(type(model).forward).parameters
    return {"attention_mask": torch.ones_like(ids)} if takes_mask else {}


def windows_of(
    tokenizer: Tokenizer | None, texts: Sequence[str] | None, inputs: Iterable[Tensor] | None
) -> list[Tensor]:
    """Returns token ids ``[B, T]`` of texts or inputs, cut into pieces that run at once; raises as `observe`."""
    if (tokenizer is None) == (inputs is None):
        raise OptionError("observe takes a tokenizer (and texts=), or inputs=[ids, ...]: one of the two")
    if tokenizer is not None:
        chosen = default_texts() if texts is None else checked_texts(texts)
        inputs = [torch.tensor(tokenizer(text)["input_ids"]) for text in chosen]
    batches = [torch.atleast_2d(ids) for ids in inputs or ()]
    windows = [window for ids in batches if ids.numel() for window in ids.split(_WINDOW, dim=1)]
    if not windows:
        raise OptionError("observe was given no token; pass texts= of some thousand tokens in all")
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

    def cheapest(self, device: torch.device | None = None) -> SecondMoments:
        """Returns the moments in the form that takes a quantizer the fewest operations, on a device if one is given."""
        if self._sum is None and _FEWER * self.tokens <= self.features:
            return RowMoments(torch.cat(self._rows).to(device, torch.float32))
        return WholeMoments(self.matrix().to(device))

    def _summed(self) -> Tensor:
        if not self._rows:
            assert self._sum is not None, "no input was added"
            return self._sum
        rows = torch.cat(self._rows).float()
        return rows.T @ rows if self._sum is None else self._sum.addmm(rows.T, rows)


class ExpertMoments:
    """Second moments of the inputs of each of E stacked matrices with K `features`."""

    def __init__(self, experts: int, features: int) -> None:
        self._each = [InputMoments(features) for _ in range(experts)]

    @property
    def nbytes(self) -> int:
        return sum(moments.nbytes for moments in self._each)

    def add(self, expert: int, x: Tensor) -> None:
        """Adds inputs ``[..., K]`` of one of them."""
        self._each[expert].add(x)

    def of(self, expert: int, device: torch.device | None = None) -> tuple[SecondMoments, int]:
        """Returns an expert's moments, as `InputMoments.cheapest`, and tokens; without tokens those of all experts."""
        own = self._each[expert]
        return (own.cheapest(device), own.tokens) if own.tokens else (WholeMoments(self._together.to(device)), 0)

    @functools.cached_property
    def _together(self) -> Tensor:
        reached = [moments for moments in self._each if moments.tokens]
        total = sum(moments.tokens for moments in reached)
        return torch.stack([moments.matrix() * (moments.tokens / total) for moments in reached]).sum(0)


Moments = InputMoments | ExpertMoments


class Observation:
    """Calibration statistics of a model: the second moments of its matrices' inputs; see :func:`observe`.

    Attributes:
        own: whether the model sampled the text itself.
        number: distinguishes observations, for what was made with them; 0 for those of own text.
        tokens: how many were seen.
    """

    _made = 0

    def __init__(self, own: bool = False) -> None:
        Observation._made += not own
        self.own = own
        self.number = 0 if own else Observation._made
        self.tokens = 0
        self.moments: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    @property
    def nbytes(self) -> int:
        return sum(moments.nbytes for moments in set(self.moments.values()))

    @property
    def source(self) -> str:
        """A description of the observed text."""
        return f"{self.tokens} tokens that the model sampled" if self.own else f"{self.tokens} observed tokens"

    def moments_of(self, weight: Tensor) -> Moments | None:
        """Returns the moments of a parameter's inputs, of each expert's for a stack; None if no text reached it."""
        return self.moments.get(weight)

    def clear(self) -> None:
        """Frees its memory; twins that are packed stay, and others are made from text of the model's own."""
        self.moments.clear()

    def __str__(self) -> str:
        return f"observed {len(self.moments)} matrices on {self.tokens} tokens ({self.nbytes / 1e6:.0f} MB)"


_MATMULS = (nn.functional.linear, torch.addmm, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


class MatmulHook(TorchFunctionMode):
    """Calls `on_input` for each product with one of the parameters, and computes with what `substitute` returns.

    Args:
        parameters: of a model; under tensor parallelism the rank's own parts are the matrices.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__()
        self._matrices: dict[int, tuple[Tensor, int]] = {}  # by address: the parameter, and which one of its stack
        self._stacks: dict[int, Tensor] = {}
        for parameter in map(local_of, parameters):
            if parameter.dim() == 2:
                self._matrices[parameter.data_ptr()] = parameter, 0
            elif parameter.dim() == 3:
                self._stacks[parameter.data_ptr()] = parameter
                self._matrices |= {matrix.data_ptr(): (parameter, i) for i, matrix in enumerate(parameter.detach())}

    def on_input(self, x: Tensor, parameter: Tensor, index: int) -> None:
        """Sees inputs ``[..., K]`` of a matrix; of a stack, of the one with this index."""

    def substitute(self, matrix: Tensor, parameter: Tensor, index: int | None) -> Tensor:
        """Returns the operand in a matrix's place; index None: a whole stack."""
        return matrix

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        before = after = None
        if func in _MATMULS:
            known = [self._matrices.get(t.data_ptr()) if t.dim() == 2 else None for t in tensors]
            at = next((i for i, found in enumerate(known) if found is not None), 0)
            found = known[at] if at > 0 else None  # (the first argument is an input or a bias)
            if found is not None:
                self.on_input(tensors[at - 1], *found)
                before, after = tensors[at], self.substitute(tensors[at], *found)
        elif func is torch.bmm and (stack := self._stacks.get(tensors[1].data_ptr())) is not None:
            for expert, x in enumerate(tensors[0]):  # (rows that it was not chosen for are zero)
                self.on_input(x[(x != 0).any(-1)], stack, expert)
            before, after = tensors[1], self.substitute(tensors[1], stack, None)
        if after is before:
            return func(*args, **kwargs)
        swapped = {name: after if value is before else value for name, value in kwargs.items()}
        return func(*(after if value is before else value for value in args), **swapped)


class _Recorder(MatmulHook):
    """Adds every input of a product with one of the parameters to that parameter's moments."""

    def __init__(self, parameters: Iterable[Tensor], observation: Observation) -> None:
        super().__init__(parameters)
        self._observation = observation
        self._last: tuple[Tensor, int, InputMoments] | None = None

    def on_input(self, x: Tensor, parameter: Tensor, index: int) -> None:
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


class _Visitor(MatmulHook):
    """Hands over the moments of each wanted matrix when the model reads it; see :func:`visit`."""

    def __init__(
        self, parameters: Iterable[Tensor], weights: Iterable[Tensor], see: Callable[[Tensor, Moments], None]
    ) -> None:
        super().__init__(parameters)
        self._wanted = {id(weight) for weight in weights}
        self._stacks_met: dict[int, tuple[Tensor, ExpertMoments]] = {}
        self._see = see

    def on_input(self, x: Tensor, parameter: Tensor, index: int) -> None:
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
