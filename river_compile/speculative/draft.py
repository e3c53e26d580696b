"""Proposes tokens for the backbone to verify: copied from the context where it repeats itself, else by the river.

A copied continuation costs nothing and comes first (prompt lookup; Saxena, "Prompt Lookup Decoding", 2023). Otherwise
the river drafts token after token and stops when the whole draft has become too unlikely to hold; a copied continuation
then fills the verification pass. How likely a token is to hold is learned while generating: from the entropy of the
river's distribution, or from the length of the repeated n-gram.

Rows share one cache length, so a draft is as long for every row. Not handled: rows that draft for themselves.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass

import torch
from torch import Tensor

# Upper edges of the bins in which acceptance rates are learned: nats of entropy, and tokens of the repeated n-gram.
ENTROPY_EDGES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0, 3.0)
NGRAM_SIZES = (2, 3, 4, 6, 9)
# What they are before anything was judged: exp(-entropy / 2), about what a 4-bit twin shows; longer repetitions go on
# more often.
_BY_ENTROPY = [math.exp(-(a + b) / 4) for a, b in zip((0.0, *ENTROPY_EDGES), (*ENTROPY_EDGES, 4.0), strict=True)]
_BY_NGRAM = [0.3, 0.5, 0.7, 0.85, 0.95, 0.97]
_PRIOR_WEIGHT = 4.0
_MEMORY = 200.0  # judged tokens per bin after which older ones fade


class AcceptanceRate:
    """A running estimate of how often drafted tokens hold, in bins of some evidence.

    Args:
        edges: upper edges of the bins, ascending; a last bin holds what lies above.
        prior: the estimate per bin before anything was judged.
    """

    def __init__(self, edges: Sequence[float], prior: Sequence[float]) -> None:
        self._edges = tuple(edges)
        self._kept = [_PRIOR_WEIGHT * p for p in prior]
        self._judged = [_PRIOR_WEIGHT] * (len(edges) + 1)

    def chance(self, evidence: float) -> float:
        """Returns how likely a token with this evidence is to hold."""
        i = bisect(self._edges, evidence)
        return self._kept[i] / self._judged[i]

    def learn(self, evidence: float, held: bool) -> None:
        """Takes in one judged token."""
        i = bisect(self._edges, evidence)
        if self._judged[i] >= _MEMORY:
            self._kept[i], self._judged[i] = self._kept[i] / 2, self._judged[i] / 2
        self._kept[i] += held
        self._judged[i] += 1


class NgramIndex:
    """Finds where the last tokens of one row occurred before, in constant time per token."""

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> index of the token that followed it last
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            end = len(self._tokens)
            for n in NGRAM_SIZES:
                if n <= end:
                    self._after[tuple(self._tokens[end - n :])] = end
            self._tokens.append(token)

    def continuation(self, count: int, ahead: Sequence[int] = ()) -> tuple[list[int], int]:
        """Returns up to `count` tokens that followed the longest repeated n-gram, and its length (0: none repeats).

        Args:
            count: tokens wanted. A repetition that reaches the end of the text goes on in itself.
            ahead: tokens that follow the text but are not part of it yet.
        """
        text = [*self._tokens[-NGRAM_SIZES[-1] :], *ahead]
        for n in reversed(NGRAM_SIZES):
            start = self._after.get(tuple(text[-n:])) if n <= len(text) else None
            if start is not None:
                known = [*self._tokens[start:], *ahead]
                for i in range(max(count - len(known), 0)):
                    known.append(known[i])
                return known[:count], n
        return [], 0


@dataclass(frozen=True)
class Drafted:
    """One position of a draft: a token of each row ``[B]``, from the "river" or a "lookup".

    Attributes:
        proposal: the probabilities ``[B, V]`` it was drawn from; None for copied and for greedy tokens.
        rate: what its chance was read from, by `evidence`, a value per row.
    """

    tokens: Tensor
    proposal: Tensor | None
    source: str
    rate: AcceptanceRate
    evidence: list[float]

    def learn(self, agreed: Sequence[bool], active: Sequence[bool]) -> None:
        """Takes in the verdict, for the rows that are still being generated."""
        for value, held, counts in zip(self.evidence, agreed, active, strict=True):
            if counts:
                self.rate.learn(value, held)


# (ids so far [B, S]) -> the river's scores for the next token [B, V]
DraftStep = Callable[[Tensor], Tensor]


@dataclass
class Drafter:
    """Drafts for one call of generate; learns from verdict to verdict.

    Args:
        prompt_ids: ``[B, S]``.
        prompt_lookup: copy continuations from the context.
        do_sample: the river draws its tokens instead of taking the best.
        stop_below: a river draft ends once its chance of holding in whole falls below this.
        pad_token: what rows that have ended receive.
        end_tokens: a draft ends after any of these, None for none.
    """

    prompt_ids: InitVar[Tensor]
    prompt_lookup: InitVar[bool]
    do_sample: bool
    stop_below: float
    pad_token: int
    end_tokens: Tensor | None

    def __post_init__(self, prompt_ids: Tensor, prompt_lookup: bool) -> None:
        self._rows = [NgramIndex(row) for row in prompt_ids.tolist()] if prompt_lookup else []
        self._by_entropy = AcceptanceRate(ENTROPY_EDGES, _BY_ENTROPY)
        self._by_ngram = AcceptanceRate([n + 0.5 for n in NGRAM_SIZES], _BY_NGRAM)

    def extend(self, tokens_B: Tensor) -> None:
        """Takes in a token that every row received."""
        for row, token in zip(self._rows, tokens_B.tolist() if self._rows else (), strict=True):
            row.extend([token])

    def draft(
        self, ids_BS: Tensor, active_B: Tensor, most: int, step: DraftStep, width: Callable[[int], int]
    ) -> list[Drafted]:
        """Proposes up to `most` tokens, which is as many as can be verified and used.

        Args:
            ids_BS: the ids so far.
            active_B: rows that are still being generated.
            most: the longest draft.
            step: runs the river over the ids it is given, one token further per call.
            width: the verification width for a number of drafted tokens.
        """
        draft = self._copied([], ids_BS, active_B, most, at_least=self.stop_below)
        if draft:
            return draft
        draft = self._ask_river(ids_BS, active_B, most, step)
        return draft + self._copied(draft, ids_BS, active_B, min(most, width(len(draft)) - 1), at_least=0.0)

    def _ask_river(self, ids_BS: Tensor, active_B: Tensor, most: int, step: DraftStep) -> list[Drafted]:
        draft: list[Drafted] = []
        reach, active = 1.0, active_B.tolist()
        while len(draft) < most and reach >= self.stop_below:
            scores_BV = step(ids_BS).float()
            chances_BV = scores_BV.softmax(-1)
            proposal = chances_BV if self.do_sample else None
            tokens_B = torch.multinomial(chances_BV, 1)[:, 0] if self.do_sample else scores_BV.argmax(-1)
            tokens_B = torch.where(active_B, tokens_B, self.pad_token)
            entropies = torch.special.entr(chances_BV).sum(-1).tolist()
            draft.append(Drafted(tokens_B, proposal, "river", self._by_entropy, entropies))
            ids_BS = torch.cat([ids_BS, tokens_B[:, None]], dim=-1)
            reach *= math.prod(self._by_entropy.chance(h) for h, on in zip(entropies, active, strict=True) if on)
            if self.end_tokens is not None and torch.isin(tokens_B[active_B], self.end_tokens).all():
                break
        return draft

    def _copied(
        self, draft: Sequence[Drafted], ids_BS: Tensor, active_B: Tensor, most: int, at_least: float
    ) -> list[Drafted]:
        """Returns continuations of a draft found in the context, where every row that still runs has one."""
        count, active = most - len(draft), active_B.tolist()
        if count <= 0 or not self._rows:
            return []
        ahead = torch.stack([d.tokens for d in draft], dim=1).tolist() if draft else [[] for _ in active]
        found = [
            row.continuation(count, before) if on else ([self.pad_token] * count, 0)
            for row, before, on in zip(self._rows, ahead, active, strict=True)
        ]
        lengths = [float(n) for _, n in found]
        chance = math.prod(self._by_ngram.chance(n) if n else 0.0 for n, on in zip(lengths, active, strict=True) if on)
        if chance <= at_least:
            return []
        columns = zip(*(tokens for tokens, _ in found), strict=True)
        return [Drafted(ids_BS.new_tensor(tokens), None, "lookup", self._by_ngram, lengths) for tokens in columns]
