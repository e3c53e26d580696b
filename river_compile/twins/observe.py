"""Calibration statistics for "awq" and "gptq": second moments of the inputs of a model's weights.

Not handled: stacks of experts that are not read one, or all, at a time; other threads than the one that entered.
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
from river_compile.kernels.quant.calibrated import RowMoments, SecondMoments, WholeMoments
from river_compile.upstream.dynamo import uncompiled_forward
from river_compile.upstream.tensors import version_of

Tokenizer = Callable[[str], Mapping[str, Sequence[int]]]
# With this many times more features than tokens, quantizers take the inputs themselves; with fewer, which form is
# cheaper depends on the weight's rows.
_FEWER = 4
_WINDOW = 512  # tokens per forward pass: the logits of a large vocabulary take memory


@torch.no_grad()
def record(model: nn.Module, windows: Iterable[Tensor], *, progress: bool = False) -> Observation:
    """Return the statistics of a model's weights on token ids ``[B, T]``."""
    observation, forward = Observation(), uncompiled_forward(model)
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
    """Run token ids until all `weights` were read; call `see` with each one's moments."""
    # The logits are not computed. A weight that is read again is seen once; one that is not read, never.
    visitor, device = _Visitor(model.parameters(), weights, see), next(model.parameters()).device
    ids_BT = ids_BT.to(device)
    with one_expert_at_a_time(model), contextlib.suppress(_AllSeen), visitor:
        uncompiled_forward(model)(input_ids=ids_BT, use_cache=False, **full_attention_mask(model, ids_BT))
        visitor.see_stacks()


@contextlib.contextmanager
def one_expert_at_a_time(model: Any) -> Iterator[None]:
    """Inside, transformers multiplies by one expert of a stack after another."""
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
    """Return the mask of ids without padding, if the model takes one: any token may be drawn."""
    takes_mask = "attention_mask" in inspect.signature(type(model).forward).parameters
    return {"attention_mask": torch.ones_like(ids)} if takes_mask else {}


def windows_of(data: Iterable[str] | Iterable[Tensor] | None, tokenizer: Tokenizer | None) -> list[Tensor]:
    """Return calibration data as token ids ``[B, T]``, cut into windows; raise as `collect_statistics`."""
    if isinstance(data, (str, bytes, Tensor)) or not (data is None or isinstance(data, Iterable)):
        raise OptionError(f"calibration_data={reprlib.repr(data)} is not allowed; give a list of texts or of token ids")
    listed: list[Any] = default_texts() if data is None else list(data)
    if any(not isinstance(entry, Tensor) for entry in listed):
        if not callable(tokenizer):
            raise OptionError(
                "Texts in calibration_data= require tokenizer=, which maps a text to its input_ids. Give both",
                id="RC007",
            )
        listed = [torch.tensor(tokenizer(text)["input_ids"]) for text in checked_texts(listed)]
    elif tokenizer is not None:
        raise OptionError("calibration_data= holds token ids, which need no tokenizer. Remove tokenizer", id="RC003")
    windows = [window for ids in map(torch.atleast_2d, listed) if ids.numel() for window in ids.split(_WINDOW, dim=1)]
    if not windows:
        raise OptionError("calibration_data= has no token. Give texts of some thousand tokens in all", id="RC007")
    return windows


def checked_texts(texts: object) -> list[str]:
    """Return texts as a list; raise an OptionError if they are not strings."""
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Iterable):
        raise OptionError(f"texts={reprlib.repr(texts)} is not allowed; it must be a list of strings")
    listed = list(texts)
    for number, text in enumerate(listed):
        if not isinstance(text, str):
            raise OptionError(f"texts[{number}]={reprlib.repr(text)} is not allowed; it must be a string")
    return listed


def default_texts() -> list[str]:
    """Return the package's short texts of many kinds. Texts like the model's workload serve it better."""
    content = resources.files("river_compile.twins").joinpath("default_texts.txt").read_text(encoding="utf-8")
    return content.rstrip("\n").split("\n%%\n")


class InputMoments:
    """Second moments ``E[x x^T]`` of a weight's inputs, for K `features`."""

    def __init__(self, features: int) -> None:
        self.features = features
        self.tokens = 0
        self._rows: list[Tensor] = []
        self._sum: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self._rows) + (0 if self._sum is None else self._sum.nbytes)

    def add(self, x: Tensor) -> None:
        """Add inputs ``[..., K]``."""
        rows = x.detach().reshape(-1, self.features).clone()
        self._rows.append(rows)
        self.tokens += len(rows)
        # Inputs are kept while they take less room than their moments: about 2 K tokens in 16 bits.
        if self._sum is not None or self.nbytes > 4 * self.features**2:
            self._sum = self._summed()
            self._rows = []

    def matrix(self) -> Tensor:
        """Return the moments, float32 ``[K, K]``."""
        return self._summed() / self.tokens

    def cheapest(self, device: torch.device | None = None) -> SecondMoments:
        """Return the moments in the form that costs a quantizer the fewest operations."""
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
    """Second moments of the inputs of E stacked weights with K `features`."""

    def __init__(self, experts: int, features: int) -> None:
        self._each = [InputMoments(features) for _ in range(experts)]

    @property
    def nbytes(self) -> int:
        return sum(moments.nbytes for moments in self._each)

    def add(self, expert: int, x: Tensor) -> None:
        """Add inputs ``[..., K]`` of one expert."""
        self._each[expert].add(x)

    def for_expert(self, expert: int, device: torch.device | None = None) -> tuple[SecondMoments, int]:
        """Return an expert's cheapest moments and its tokens; without tokens, all experts' moments."""
        own = self._each[expert]
        return (own.cheapest(device), own.tokens) if own.tokens else (WholeMoments(self._together.to(device)), 0)

    @functools.cached_property
    def _together(self) -> Tensor:
        reached = [moments for moments in self._each if moments.tokens]
        total = sum(moments.tokens for moments in reached)
        return torch.stack([moments.matrix() * (moments.tokens / total) for moments in reached]).sum(0)


Moments = InputMoments | ExpertMoments


class Observation:
    """Calibration statistics of a model, as `river_compile.collect_statistics` returns them."""

    _made = 0

    def __init__(self) -> None:
        Observation._made += 1
        self.number = Observation._made  # distinguishes observations
        self.tokens = 0  # observed so far
        self.moments: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    @property
    def nbytes(self) -> int:
        return sum(moments.nbytes for moments in set(self.moments.values()))

    @property
    def source(self) -> str:
        """The observed text, in words."""
        return f"{self.tokens} observed tokens"

    def moments_of(self, weight: Tensor) -> Moments | None:
        """Return the moments of a parameter's inputs (a stack: of each expert's); None if unread."""
        return self.moments.get(weight)

    def clear(self) -> None:
        """Free its memory. Packed twins stay; later ones use text of the model's own."""
        self.moments.clear()

    def __str__(self) -> str:
        return f"observed {len(self.moments)} matrices on {self.tokens} tokens ({self.nbytes / 1e6:.0f} MB)"


_MATMULS = (nn.functional.linear, torch.addmm, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


class MatmulHook(TorchFunctionMode):
    """Calls `on_input` for each matmul with a parameter, and multiplies by `substitute`'s result."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__()
        self._matrices: dict[int, tuple[Tensor, int]] = {}  # by address: the parameter, and the index in its stack
        self._stacks: dict[int, Tensor] = {}
        for parameter in parameters:
            if parameter.dim() == 2:
                self._matrices[parameter.data_ptr()] = parameter, 0
            elif parameter.dim() == 3:
                self._stacks[parameter.data_ptr()] = parameter
                self._matrices |= {matrix.data_ptr(): (parameter, i) for i, matrix in enumerate(parameter.detach())}

    def on_input(self, x: Tensor, parameter: Tensor, index: int) -> None:
        """See inputs ``[..., K]`` of a weight; of a stack, of the expert with this index."""

    def _see_input(self, x: Tensor, parameter: Tensor, index: int) -> None:
        with torch._C._DisableAutocast():  # moments and what is made of them are float32
            self.on_input(x, parameter, index)

    def substitute(self, matrix: Tensor, parameter: Tensor, index: int | None) -> Tensor:
        """Return the operand in place of a weight; index None: of a whole stack."""
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
            found = known[at] if at > 0 else None  # the first argument is an input or a bias
            if found is not None:
                self._see_input(tensors[at - 1], *found)
                before, after = tensors[at], self.substitute(tensors[at], *found)
        elif func is torch.bmm and (stack := self._stacks.get(tensors[1].data_ptr())) is not None:
            for expert, x in enumerate(tensors[0]):  # rows of tokens that chose other experts are zero
                self._see_input(x[(x != 0).any(-1)], stack, expert)
            before, after = tensors[1], self.substitute(tensors[1], stack, None)
        if after is before:
            return func(*args, **kwargs)
        swapped = {name: after if value is before else value for name, value in kwargs.items()}
        return func(*(after if value is before else value for value in args), **swapped)


class _Recorder(MatmulHook):
    """Adds the inputs of every matmul to its parameter's moments."""

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
        """Add an input; weights that read the same one, as q, k and v do, share its moments."""
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
    """Ends a forward pass. Not an Exception, which the model's code might catch."""


class _Visitor(MatmulHook):
    """Hands over each weight's moments when the model reads it; see :func:`visit`."""

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
        self.see_stacks()  # all experts of a block have run when the next weight is read
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
        """Hand over the moments of stacks whose experts have all run."""
        met, self._stacks_met = self._stacks_met, {}
        for stack, moments in met.values():
            if moments.nbytes:
                self._hand_over(stack, moments)

    def _hand_over(self, parameter: Tensor, moments: Moments) -> None:
        self._wanted.remove(id(parameter))
        self._see(parameter, moments)
        if not self._wanted:
            raise _AllSeen
