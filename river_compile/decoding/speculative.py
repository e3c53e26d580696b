"""Speculative decoding of one row: draft, verify, accept, rewind.

Not handled: who drafts (`drafters.py`), and how long (`draft_length.py`); how passes run (`passes.py`).
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from river_compile.decoding.draft_length import LOOKUP, Draft, DraftLength
from river_compile.decoding.drafters import Drafter
from river_compile.decoding.passes import Passes
from river_compile.decoding.sampling import SuffixAutomaton
from river_compile.decoding.text import Text
from river_compile.runtime.stats import CycleRecord


class Drafting(NamedTuple):
    """How a call drafts."""

    length: DraftLength  # decides who drafts and how long
    max_copied: int  # tokens that a draft copies from the context
    drafters: tuple[Drafter, ...]  # the first one drafts where `length` does not choose


def speculate(passes: Passes, text: Text, drafting: Drafting) -> Iterator[None]:
    """Generate a text: in each cycle the accepted part of a draft and one more token; yields after each."""
    #     ids      ... a b        a has cache entries, b not yet
    #     draft    ... a b c d e  the 4-bit twins, or a smaller model, propose c d e
    #     verify   ... a b c d e  one backbone pass over b c d e scores every position
    #     accept   ... a b c x    c is accepted, d is not: x is the backbone's own token after c
    index = SuffixAutomaton(text.ids[0].tolist() if drafting.max_copied else ())
    try:
        for drafter in drafting.drafters:
            drafter.begin(text.ids, passes.padding)
        while text.runs:
            _cycle(passes, text, drafting, index)
            yield
    finally:
        for drafter in drafting.drafters:
            drafter.close()


def _cycle(passes: Passes, text: Text, drafting: Drafting, index: SuffixAutomaton) -> None:
    """Draft, verify, accept and rewind once."""
    passes.make_room(text.tokens_left)
    times = [time.perf_counter()]

    # Draft: the twins' steps fill cache slots, which the verifying pass overwrites.
    draft = _draft(passes, text, drafting, index)
    drafted = len(draft.tokens)
    times.append(time.perf_counter())

    # Verify: one backbone pass over the last emitted token and the draft, padded to a fixed width.
    logits = passes.verify(text.ids_and(drafted), drafted)
    best = text.sampler.best(logits[0]).tolist() if text.sampler.is_greedy else []
    times.append(time.perf_counter())

    # Accept: the draft's tokens that are the backbone's own choice, then the backbone's next token.
    emitted, sources = _accept(text, draft, logits, best)
    if drafting.max_copied:
        index.extend(emitted)

    # Rewind: rejected tokens and padding. The last emitted token has no entry yet, as in plain decoding.
    passes.rewind(passes.width_for(drafted) - len(emitted))
    for drafter in drafting.drafters:
        drafter.rewind(text.length - 1)
    times.append(time.perf_counter())
    _learn(passes, drafting.length, draft, sources, times)


def _draft(passes: Passes, text: Text, drafting: Drafting, index: SuffixAutomaton) -> Draft:
    """Return tokens of a drafter, and after them a copy by prompt lookup."""
    length, max_copied, drafters = drafting
    draft = Draft(max(min(passes.longest_draft, text.tokens_left - 1), 0))
    draft.longest = {drafter.source: drafter.longest for drafter in drafters if drafter.longest is not None}
    text.reserve(draft.room)
    ready = {drafter.source: drafter for drafter in drafters if drafter.can_draft(text.length + draft.room)}
    draft.behind = {source: drafter.behind(text.length) for source, drafter in ready.items()}
    while True:
        if max_copied:
            most = min(draft.room - len(draft.tokens), max_copied)
            copied, ending = index.continuation(most, [token.token for token in draft.tokens])
            draft.copy = [length.token(token, LOOKUP, ending + i) for i, token in enumerate(copied)]
        plan = length.plan(draft, [*ready])
        if not plan.steps:
            break
        _run_steps(ready[plan.source], text, draft, length, plan.steps if passes.runs_late else 1)
    if draft.steps:
        ready[draft.source].end(draft.steps)
    drafted = len(draft.tokens)
    copies = draft.copy[: max(plan.verified - drafted, 0)]
    if copies:
        text.note_draft(drafted, torch.tensor([copy.token for copy in copies]))
        for copy in copies:
            draft.add(copy)
    return draft


def _run_steps(drafter: Drafter, text: Text, draft: Draft, length: DraftLength, steps: int) -> None:
    """Queue draft steps, then read and add their tokens, up to one that ends the draft."""
    first, least = len(draft.tokens), drafter.least_probability
    found, certain = [], []
    for drafted in range(first, first + steps):
        logits_1V = drafter.step(text.ids_and(drafted))
        chosen = text.draft(drafted, logits_1V)  # a token, and its entropy in nats
        found.append(chosen)
        certain.append(not least or bool(logits_1V.float().softmax(-1)[0, int(chosen[0, 0])] >= least))
    draft.source, draft.steps = drafter.source, draft.steps + steps
    for (token, entropy), is_certain in zip(torch.cat(found).tolist(), certain, strict=True):
        draft.add(length.token(int(token), drafter.source, entropy))
        if token in text.end_tokens or not is_certain:
            draft.room = len(draft.tokens)
            break


def _accept(text: Text, draft: Draft, logits_1WV: Tensor, best: Sequence[int]) -> tuple[list[int], list[str]]:
    """Emit tokens up to the first that the draft lacks, or the text's end; return them and their sources."""
    emitted: list[int] = []
    sources: list[str] = []
    for i in range(logits_1WV.shape[1]):
        # Greedy: all positions were read in one transfer.
        known = best and not text.sampler.bars(best[i], text.length)
        token = best[i] if known else int(text.choose(logits_1WV[:, i]))
        text.append(token)
        accepted = i < len(draft.tokens) and draft.tokens[i].token == token
        emitted.append(token)
        sources.append(draft.tokens[i].source if accepted else "backbone")
        if not (accepted and text.runs):
            break
    return emitted, sources


def _learn(passes: Passes, length: DraftLength, draft: Draft, sources: Sequence[str], times: Sequence[float]) -> None:
    """Record a cycle: the sources of its tokens, and the times of drafting, verifying and accepting."""
    drafting, verifying, accepting = (b - a for a, b in itertools.pairwise(times))
    length.learn(draft, sources, drafting, verifying + accepting)
    record = CycleRecord(
        drafted=tuple(token.source for token in draft.tokens),
        emitted=tuple(sources),
        width=passes.width_for(len(draft.tokens)),
        seconds=(drafting, verifying, accepting),
        thread=threading.get_ident(),
        model=passes.stats.model_id,
    )
    passes.stats.count_cycle(record)
