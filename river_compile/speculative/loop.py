"""The loop of exact mode (self-speculative decoding): draft, verify, keep what agrees, rewind.

    ids      ... a b        a cached, b kept but not cached
    draft    ... a b c d e  the river proposes c d e (its cache entries are freed again)
    verify   ... a b c d e  one backbone pass over b c d e writes exact entries and scores every position
    keep     ... a b c x    c agrees, d does not: x is the backbone's own token there; the slots of d e are freed

Kept positions go one by one through the user's logits processors, stopping criteria and streamer, in the order and
with the arguments of plain generation; nothing after the first disagreement or stop ever reaches them.

Not handled: rows that advance for themselves. They share one cache length, so the slowest row decides.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from river_compile.runtime.stats import CycleRecord

from .accept import select
from .draft import Drafted, Drafter
from .pays import Pays
from .plain import PlainRunner
from .runner import DraftVerifyRunner


@dataclass
class ExactLoop:
    """Generates until every row has ended.

    Attributes:
        ids: ``[B, S]``, grows (from S = 0 where the prompt came as ``inputs_embeds``).
        process: the user's logits processors, ``(ids, scores) -> scores``.
        process_draft: those that may also see drafts.
        stops: the stopping criteria, ``(ids, scores) -> bool [B]``.
        max_length: ids in all, at most.
        pad_token: what rows receive that have ended; None where no row can end before the others.
        put: the streamer's method, None for no streamer.
        scores, logits: receive each kept token's processed scores and raw logits ``[B, V]``, None where nobody asks.
        pays: says when to do without drafts, None for never.
        clock: seconds, from wherever.
        active: the rows that have not ended ``[B]``.
    """

    runner: DraftVerifyRunner | PlainRunner
    drafter: Drafter
    ids: Tensor
    process: Callable[[Tensor, Tensor], Tensor]
    process_draft: Callable[[Tensor, Tensor], Tensor]
    stops: Callable[[Tensor, object], Tensor]
    do_sample: bool
    max_length: int
    pad_token: int | None
    put: Callable[[Tensor], object] | None = None
    scores: list[Tensor] | None = None
    logits: list[Tensor] | None = None
    pays: Pays | None = None
    clock: Callable[[], float] = time.perf_counter
    active: Tensor = field(init=False)
    _began_resting: bool = field(init=False, default=False)

    def run(self, first_logits: Tensor) -> Tensor:
        """Generates from the prompt's last logits ``[B, 1, V]`` on; returns all ids ``[B, S]``."""
        self.active = self.ids.new_ones(self.ids.shape[0], dtype=torch.bool)
        self._settle(first_logits, [])
        self._began_resting = self.pays is not None and self.pays.resting
        while self.active.any():
            self._cycle()
        return self.ids

    def _cycle(self) -> None:
        if self.pays is not None:
            self.pays.measure_plain(self._plain_pass)
        start = self.clock()
        rows = int(self.active.sum())
        most = max(min(self.runner.longest_draft, self.max_length - self.ids.shape[1] - 1), 0)
        most = 0 if self._resting else most
        draft = self.drafter.draft(self.ids, self.active, most, self._draft_step, self.runner.width_for)
        drafted = tuple(d.source for d in draft)
        self.runner.rewind(drafted.count("river"))
        width = self.runner.width_for(len(draft))
        drafted_at = self.clock()
        ids = torch.cat([self.ids, *(d.tokens[:, None] for d in draft)], dim=-1)
        logits = self.runner.verify(ids, len(draft))
        verified_at = self.clock()
        sources, held_back = self._settle(logits, draft)
        self.runner.keep(len(sources))
        end = self.clock()
        cycle = CycleRecord(
            drafted=drafted,
            kept=sources,
            width=width,
            held_back=held_back,
            seconds=(drafted_at - start, verified_at - drafted_at, end - verified_at),
            thread=threading.get_ident(),
            model=self.runner.stats.model_id,
            rows=rows,
        )
        self.runner.stats.count_cycle(cycle)
        if self.pays is not None:
            self.pays.note(cycle)

    @property
    def _resting(self) -> bool:
        return self._began_resting if self.do_sample or self.pays is None else self.pays.resting

    def _plain_pass(self) -> None:
        """Runs what a plain step would run next, and forgets it again."""
        self.runner.verify(self.ids, 0).argmax(-1).tolist()
        self.runner.rewind(1)

    def _draft_step(self, ids_BS: Tensor) -> Tensor:
        return self.process_draft(ids_BS, self.runner.draft_step(ids_BS).float())

    def _settle(self, logits_BWV: Tensor, draft: Sequence[Drafted]) -> tuple[tuple[str, ...], int]:
        """Keeps tokens up to the first disagreement or the end; returns their sources and the rows held back."""
        sources: list[str] = []
        for i in range(logits_BWV.shape[1]):
            drafted = draft[i] if i < len(draft) else None
            was_active = self.active
            tokens, agreed = self._keep_next(logits_BWV[:, i], drafted)
            if drafted is None:
                return (*sources, "backbone"), 0
            drafted.learn(agreed.tolist(), was_active.tolist())
            agree = int((agreed & was_active).sum())
            # A row that ended inside the draft holds a drafted token where its text holds padding: draft anew.
            all_agree = bool(torch.where(was_active, agreed, drafted.tokens == tokens).all())
            sources.append(drafted.source if all_agree else "backbone")
            if not all_agree:
                return tuple(sources), agree
            if not self.active.any():
                break
        return tuple(sources), 0

    def _keep_next(self, logits_BV: Tensor, drafted: Drafted | None) -> tuple[Tensor, Tensor]:
        """Keeps one more token of each row ``[B]``; returns them, and where the drafted ones agreed."""
        raw = logits_BV.to(copy=True, dtype=torch.float32)
        scores = self.process(self.ids, raw)
        if self.scores is not None:
            self.scores.append(scores)
        if self.logits is not None:
            self.logits.append(raw)
        drafted_B, proposal_BV = (None, None) if drafted is None else (drafted.tokens, drafted.proposal)
        tokens, agreed = select(scores, drafted_B, proposal_BV, self.do_sample)
        if self.pad_token is not None:
            tokens = torch.where(self.active, tokens, self.pad_token)
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=-1)
        self.drafter.extend(tokens)
        seen = None if self.scores is None else tuple(self.scores)
        self.active = self.active & ~self.stops(self.ids, seen)
        if self.put is not None:
            self.put(tokens.cpu())
        return tokens, agreed
