"""Where two greedy texts of one model part, and whether two tokens nearly tied there.

Sums of another order round differently, so texts of equally good programs may part where two logits nearly tie. The
same weights in a wider dtype show which of the two tokens less rounding takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import StoppingCriteriaList

from river_compile.reporting.timing import StopAfter

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_NEAR = 4  # roundings that separate the logits of a near tie, at most


def parts_at(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Return the index of the first token in which two texts differ, or None; a text's end differs from a token."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return None if len(one) == len(other) else min(len(one), len(other))


@dataclass(frozen=True)
class Parting:
    """The first difference of a text from the eager one.

    Attributes:
        index: of the token, from 0.
        eager, other: the token ids there.
        logits: of both, in that order, of the eager model.
        dtype: of the eager model.
        wider: the token that the same weights take in `wider_dtype`.
    """

    index: int
    eager: int
    other: int
    logits: tuple[float, float]
    dtype: torch.dtype
    wider: int
    wider_dtype: torch.dtype

    @property
    def is_near_tie(self) -> bool:
        """Whether rounding may change the order of the two logits."""
        first, second = self.logits
        return abs(first - second) <= _NEAR * torch.finfo(self.dtype).eps * max(abs(first), abs(second))

    def text(self, decode: Callable[[Sequence[int]], str]) -> str:
        """Return the difference in words."""
        eager, other, wider = (repr(decode([token])) for token in (self.eager, self.other, self.wider))
        first, second = self.logits
        what = "two tokens nearly tied" if self.is_near_tie else "two tokens did not nearly tie"
        return (
            f"at token {self.index + 1} {what}: {eager} (logit {first:.2f}) and {other} ({second:.2f}) "
            f"in eager {_name(self.dtype)}; {_name(self.wider_dtype)} takes {wider}"
        )


def parting(
    model: PreTrainedModel, prompt: Tensor, new_tokens: int, eager: Sequence[int], other: Sequence[int]
) -> Parting:
    """Return the first difference of two texts, and convert the model to a wider dtype.

    Args:
        model: not accelerated, in the dtype of the texts; afterwards in float32, or in float64 if it was in float32.
        prompt: ids ``[1, length]``.
        new_tokens: the longest text that `eager` might have had, since rounding depends on the size of the cache.
        eager: the new ids of the model, greedy on a static cache.
        other: those of another program.

    Raises:
        ValueError: no token differs, or the model does not repeat `eager`.
    """
    index = parts_at(eager, other)
    if index is None or index >= min(len(eager), len(other)):
        raise ValueError("the texts have no token that differs")
    dtype = model.dtype
    logits = _repeated(model, prompt, new_tokens, eager[: index + 1])
    wider_dtype = torch.float64 if dtype == torch.float32 else torch.float32
    ids = torch.cat([prompt, torch.tensor([eager[:index]], dtype=prompt.dtype)], dim=1)
    with torch.inference_mode():
        wider = model.to(wider_dtype)(input_ids=ids).logits[0, -1]
    return Parting(
        index=index,
        eager=eager[index],
        other=other[index],
        logits=(logits[eager[index]].item(), logits[other[index]].item()),
        dtype=dtype,
        wider=int(wider.argmax()),
        wider_dtype=wider_dtype,
    )


def _repeated(model: PreTrainedModel, prompt: Tensor, new_tokens: int, text: Sequence[int]) -> Tensor:
    """Generate `text` again and return the logits ``[V]`` that its last token was taken from."""
    length = prompt.shape[1]
    made = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        min_new_tokens=2,
        do_sample=False,
        cache_implementation="static",
        disable_compile=True,
        stopping_criteria=StoppingCriteriaList([StopAfter(length + len(text))]),
        return_dict_in_generate=True,
        output_logits=True,
    )
    if made.sequences[0, length:].tolist() != list(text):
        raise ValueError("the model does not repeat its text")
    return made.logits[-1][0]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
