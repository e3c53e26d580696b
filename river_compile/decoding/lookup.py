"""Prompt lookup: copies the continuation of the longest ending of the text that occurred before in it.

Prompt lookup (Saxena, "Prompt Lookup Decoding", 2023) by a suffix automaton (Blumer et al., 1985; for drafts: Hu et
al., "SAM Decoding", arXiv 2411.10666), which knows every ending at once: a state stands for endings that occur at the
same places, its link leads to the longest shorter ending that occurs at more places, and a token adds at most two
states.

Not handled: texts of earlier calls. A row's memory is bounded: of a longer text the last tokens are indexed.
"""

from __future__ import annotations

from collections.abc import Sequence

SHORTEST = 2  # tokens that must repeat
_LIMIT = 1 << 16  # tokens of a row that are indexed; some 40 MB
_STEPS = 32  # links along which the latest place is noted; endings further down are short ones that occur all over


class SuffixAutomaton:
    """All endings of one row's text, and where each occurred last.

    Args:
        tokens: the text so far.
        limit: tokens that are indexed at most; half of them go when it is reached.
    """

    def __init__(self, tokens: Sequence[int] = (), limit: int = _LIMIT) -> None:
        self._limit = limit
        self._restart(tokens)

    def _restart(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._next: list[dict[int, int]] = [{}]  # by state: the state after each token
        self._link, self._length, self._latest = [-1], [0], [0]  # (latest: the index after an ending's last place)
        self._last = 0  # the state of the whole text
        self._found = (0, 0)  # the place where the longest repeated ending occurred before, and its length
        self.extend(tokens[-self._limit // 2 :] if len(tokens) > self._limit else tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Takes in tokens that follow the text."""
        for token in tokens:
            if len(self._tokens) == self._limit:
                self._restart(self._tokens[self._limit // 2 :])
            self._add(token)

    def continuation(self, count: int, ahead: Sequence[int] = ()) -> tuple[list[int], int]:
        """Returns up to `count` tokens that followed the longest repeated ending, and its length (0: none repeats).

        Args:
            count: tokens wanted. A repetition that reaches the end of the text goes on in itself.
            ahead: tokens that follow the text but are not part of it yet.
        """
        start, length = self._follow(ahead) if ahead else self._found
        if length < SHORTEST:
            return [], 0
        known = [*self._tokens[start : start + count], *ahead]
        for i in range(max(count - len(known), 0)):
            known.append(known[i])
        return known[:count], length

    def _follow(self, ahead: Sequence[int]) -> tuple[int, int]:
        """Returns the place and the length of the longest ending of the text and further tokens that is in the text."""
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
        """Takes the endings of a state that also occur elsewhere out of it, into a state of their own."""
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
