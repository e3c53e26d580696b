"""Choose tokens from logits so that drafts never change the output, and draft by prompt lookup.

Shapes: B rows, V vocabulary entries, N rows that are chosen for. Not handled: other users of PyTorch's default
generator meanwhile, who draw from another place of its stream than in plain sampling; lookup in earlier calls' texts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.generation import LogitsProcessor

from river_compile.agreement import ALONE, Agreement
from river_compile.decoding.processors import BARRED, STATELESS, bars, processed
from river_compile.kernels.native.load import best_tokens, choices


class Sampler:
    """Chooses the tokens of one call of generate."""

    # `torch.multinomial` divides probabilities by exponential noise and takes the largest (the Gumbel-max trick), so
    # a position's noise can be drawn before its scores are known. Drafts use the same noise as the backbone's tokens,
    # so they often agree (Daliri, Musco, Suresh, arXiv 2408.07978). A draft is accepted only if it is the backbone's
    # own choice: the output depends on the seed alone.

    def __init__(
        self,
        rows: int,
        do_sample: bool,
        processors: Sequence[LogitsProcessor] = (),
        agreement: Agreement = ALONE,  # on the tokens
        drafting: bool = True,  # whether steps may be repeated, or run for some of the rows
        generator: torch.Generator | None = None,  # on the logits' device; None: PyTorch's
        keeps_scores: bool = False,
        keeps_logits: bool = False,
    ) -> None:
        self.do_sample = do_sample
        self.scores: list[Tensor] | None = [] if keeps_scores else None  # processed, of each emitted token
        self.logits: list[Tensor] | None = [] if keeps_logits else None  # raw
        self._processors, self._of_drafts = processors, [p for p in processors if type(p) in STATELESS]
        self._agreed, self._drafting, self._generator, self._rows = agreement.first, drafting, generator, rows
        self._drawn = 0  # steps with noise
        self._steps: dict[int, tuple[Tensor, Tensor]] = {}  # the generator's state before a step, and the step's noise

    @property
    def scores_so_far(self) -> tuple[Tensor, ...] | None:
        """The scores for stopping criteria and for the result; None if they are not kept."""
        return None if self.scores is None else tuple(self.scores)

    @property
    def is_greedy(self) -> bool:
        """Whether each token is the best by its logits, unless :meth:`bars` says otherwise."""
        only_bars = all(type(processor) in BARRED for processor in self._processors)
        return only_bars and not self.do_sample and self.scores is None and self.logits is None

    def bars(self, token: int, length: int) -> bool:
        """Whether processors that only bar tokens bar this one after `length` ids."""
        return bool(self._processors) and bars(self._processors, token, length)

    def best(self, logits_NV: Tensor) -> Tensor:
        """Return the best tokens ``[N]`` by their logits."""
        return self._agreed(best_tokens(logits_NV))

    def choose(self, logits_NV: Tensor, ids_NS: Tensor, rows: Sequence[int], step: int) -> Tensor:
        """Return each row's token ``[N]`` after `step` new ones; raise as ``torch.multinomial`` does."""
        if self.is_greedy:  # the best token is the same in the logits' own dtype
            tokens_N = self.best(logits_NV)
            if not self._processors or not any(self.bars(token, ids_NS.shape[1]) for token in tokens_N.tolist()):
                return tokens_N
        raw = logits_NV.to(copy=True, dtype=torch.float32, device=ids_NS.device)
        scores = processed(self._processors, ids_NS, raw, rows)
        for kept, values in ((self.scores, scores), (self.logits, raw)):
            if kept is not None:
                kept.append(values)
        if not self.do_sample or self._drafting:
            return self._token(scores, rows, step, draft=False)
        shares_NV = scores.softmax(-1)
        return self._agreed(torch.multinomial(shares_NV, num_samples=1, generator=self._generator).squeeze(1))

    def draft(self, logits_1V: Tensor, ids_1S: Tensor, row: int, step: int) -> Tensor:
        """Return a draft token of a row, any one if none can be drawn, and its entropy in nats: float64 ``[1, 2]``."""
        scores = logits_1V
        chosen = choices(logits_1V) if self.is_greedy or not self._of_drafts else None
        # (Without processors nothing is read here, so that steps on a GPU queue.)
        if chosen is None or (self._of_drafts and self.bars(int(chosen[0, 0]), ids_1S.shape[1])):
            scores = processed(self._of_drafts, ids_1S, logits_1V.float(), [row])
            chosen = choices(scores)
        if self.do_sample:
            chosen[:, 0] = self._token(scores.float(), [row], step, draft=True)
        return self._agreed(chosen)

    def _token(self, scores_NV: Tensor, rows: Sequence[int], step: int, draft: bool) -> Tensor:
        if not self.do_sample:
            return self.best(scores_NV)
        noise_NV = self._noise(step, scores_NV)
        if len(rows) < self._rows:
            noise_NV = torch.stack([noise_NV[row] for row in rows])
        shares_NV = scores_NV.softmax(-1) / noise_NV
        tokens_N = shares_NV.argmax(-1)
        if not draft and shares_NV[:, 0].isnan().any():  # a softmax with bad scores is NaN everywhere
            raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
        return self._agreed(tokens_N)

    def forget(self, before: int) -> None:
        """Drop the noise of earlier steps."""
        for step in [step for step in self._steps if step < before]:
            del self._steps[step]

    def close(self, steps: int) -> None:
        """Leave PyTorch's generator in the state after plain sampling of this many steps."""
        if steps in self._steps and self._generator is None:
            state, noise = self._steps[steps]
            set_random_state(noise.device, state)
        self._steps.clear()

    def _noise(self, step: int, like_NV: Tensor) -> Tensor:
        """Return the noise ``[B, V]`` that plain sampling would draw in a step."""
        while self._drawn <= step:
            state = random_state(like_NV.device)
            noise = torch.empty(self._rows, like_NV.shape[-1], device=like_NV.device)
            noise.exponential_(generator=self._generator)
            self._steps[self._drawn] = state, noise
            self._drawn += 1
        return self._steps[step][1]


def random_state(device: torch.device) -> Tensor:
    """Return the state of PyTorch's generator of a device."""
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


def set_random_state(device: torch.device, state: Tensor) -> None:
    """Set the state of PyTorch's generator of a device."""
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


SHORTEST = 2  # tokens that must repeat
_LIMIT = 1 << 16  # tokens of a row that are indexed; about 40 MB
_STEPS = 32  # links whose latest place is updated; endings further down are short and occur everywhere


class SuffixAutomaton:
    """Prompt lookup: finds the longest ending of a text that occurred before in it."""

    # Prompt lookup (Saxena, "Prompt Lookup Decoding", 2023) with a suffix automaton (Blumer et al., 1985; for drafts:
    # "SAM Decoding", arXiv 2411.10666). A state stands for endings that occur at the same places; its link leads to
    # the longest shorter ending that occurs at more places; a token adds at most two states.
    def __init__(self, tokens: Sequence[int] = (), limit: int = _LIMIT) -> None:
        self._limit = limit  # indexed tokens; at the limit, the older half is dropped
        self._restart(tokens)

    def _restart(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._next: list[dict[int, int]] = [{}]  # by state: the state after each token
        self._link, self._length, self._latest = [-1], [0], [0]  # latest: the index after an ending's last place
        self._last = 0  # the state of the whole text
        self._found = (0, 0)  # place and length of the longest repeated ending
        self.extend(tokens[-self._limit // 2 :] if len(tokens) > self._limit else tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens at the end of the text."""
        for token in tokens:
            if len(self._tokens) == self._limit:
                self._restart(self._tokens[self._limit // 2 :])
            self._add(token)

    def continuation(self, count: int, ahead: Sequence[int] = ()) -> tuple[list[int], int]:
        """Return up to `count` tokens that followed the longest repeated ending, and its length (0: none)."""
        start, length = self._follow(ahead) if ahead else self._found
        if length < SHORTEST:
            return [], 0
        # A repetition that reaches the end of the text continues in itself.
        known = [*self._tokens[start : start + count], *ahead]
        for i in range(max(count - len(known), 0)):
            known.append(known[i])
        return known[:count], length

    def _follow(self, ahead: Sequence[int]) -> tuple[int, int]:
        """Return the place and length of the longest ending of the text and `ahead` that is in the text."""
        state, length = self._last, len(self._tokens)
        for token in ahead:
            while state and token not in self._next[state]:
                state = self._link[state]
                length = self._length[state]
            if token in self._next[state]:
                state, length = self._next[state][token], length + 1
        return self._latest[state], length

    def _add(self, token: int) -> None:
        new = self._state(self._length[self._last] + 1, {}, 0, len(self._tokens) + 1)
        state = self._last
        while state >= 0 and token not in self._next[state]:
            self._next[state][token] = new
            state = self._link[state]
        if state >= 0:
            after = self._next[state][token]
            if self._length[after] > self._length[state] + 1:
                after = self._split(state, token, after)
            self._link[new] = after
        self._tokens.append(token)
        self._last = new
        link = self._link[new]
        self._found = (self._latest[link], self._length[link])
        for _ in range(_STEPS):
            if link <= 0:
                break
            self._latest[link] = len(self._tokens)
            link = self._link[link]

    def _split(self, state: int, token: int, after: int) -> int:
        """Move the endings of a state that also occur elsewhere to a separate state."""
        shorter = self._state(self._length[state] + 1, dict(self._next[after]), self._link[after], self._latest[after])
        self._link[after] = shorter
        while state >= 0 and self._next[state].get(token) == after:
            self._next[state][token] = shorter
            state = self._link[state]
        return shorter

    def _state(self, length: int, following: dict[int, int], link: int, latest: int) -> int:
        self._next.append(following)
        self._link.append(link)
        self._length.append(length)
        self._latest.append(latest)
        return len(self._link) - 1
