"""Chooses tokens from logits, so that the text is plain generation's for any drafts.

Greedy: the best token. Sampling: the token that ``torch.multinomial`` would draw. That function divides the
probabilities by exponential noise and takes the largest (the Gumbel-max trick), so the noise of a position can be drawn
before anything is known of its scores. Drafts are chosen with the same noise as the backbone's tokens, which makes them
agree often (Daliri, Musco, Suresh, "Coupling without Communication and Drafter-Invariant Speculative Decoding",
arXiv 2408.07978), and a draft is kept exactly where it is the backbone's own choice. The text then depends on the seed
alone, and not on drafts.

Shapes: B rows, V vocabulary entries, N rows that are chosen for. Not handled: random numbers that others draw from
PyTorch's default generator meanwhile, a logits processor for instance, which come from another place of its stream than
in plain sampling.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.generation import LogitsProcessor, LogitsProcessorList, logits_process

from river_compile.runtime.tensor_parallel import ALONE, Ranks


class Sampler:
    """Chooses tokens for one call of generate.

    Args:
        rows: B.
        do_sample: draw from the scores' softmax instead of taking their maximum.
        processors: the user's logits processors; drafts pass through those that remember nothing.
        ranks: that share the model; all of them choose what the first one does.
        drafting: whether some steps are asked for more than once, or for some of the rows.
        generator: of random numbers, on the logits' device; None for PyTorch's.
        keeps_scores, keeps_logits: whether the attributes below are wanted.

    Attributes:
        scores, logits: processed scores and raw logits of each kept token, None where they are not wanted.
    """

    def __init__(
        self,
        rows: int,
        do_sample: bool,
        processors: Sequence[LogitsProcessor] = (),
        ranks: Ranks = ALONE,
        drafting: bool = True,
        generator: torch.Generator | None = None,
        keeps_scores: bool = False,
        keeps_logits: bool = False,
    ) -> None:
        self.do_sample, self.scores, self.logits = do_sample, [] if keeps_scores else None, [] if keeps_logits else None
        self._processors, self._of_drafts = processors, [p for p in processors if type(p) in STATELESS]
        self._ranks, self._drafting, self._generator, self._rows = ranks, drafting, generator, rows
        self._drawn = 0  # steps whose noise was drawn
        self._steps: dict[int, tuple[Tensor, Tensor]] = {}  # the generator's state before a step, and the step's noise

    scores: list[Tensor] | None
    logits: list[Tensor] | None

    @property
    def is_greedy(self) -> bool:
        """Whether each position's token is the best by its logits, whatever stands before it."""
        return not (self.do_sample or self._processors) and self.scores is None and self.logits is None

    def best(self, logits_NV: Tensor) -> Tensor:
        """Returns the best tokens ``[N]`` by their logits, all ranks the first one's."""
        tokens_N = logits_NV.argmax(-1)
        return self._ranks.first(tokens_N) if self._ranks.several else tokens_N

    def choose(self, logits_NV: Tensor, ids_NS: Tensor, rows: Sequence[int], step: int) -> Tensor:
        """Returns a token ``[N]`` for each of these rows, which have so many new tokens so far.

        Raises:
            RuntimeError: as ``torch.multinomial`` does: a row's scores are all -inf, or one of them is NaN or +inf.
        """
        if self.is_greedy:  # (the best token is the same in the logits' own dtype)
            return self.best(logits_NV)
        raw = logits_NV.to(copy=True, dtype=torch.float32, device=ids_NS.device)
        scores = _processed(self._processors, ids_NS, raw, rows)
        for kept, values in ((self.scores, scores), (self.logits, raw)):
            if kept is not None:
                kept.append(values)
        if not self.do_sample or self._drafting:
            return self._token(scores, rows, step, draft=False)
        shares_NV = scores.softmax(-1)
        return self._ranks.first(torch.multinomial(shares_NV, num_samples=1, generator=self._generator).squeeze(1))

    def draft(self, logits_1V: Tensor, ids_1S: Tensor, row: int, step: int) -> tuple[Tensor, Tensor]:
        """Returns a drafted token ``[1]`` of a row, any one where none can be drawn, and its scores ``[1, V]``."""
        scores = logits_1V.float()
        if self._of_drafts:
            scores = _processed(self._of_drafts, ids_1S, scores, [row])
        return self._token(scores, [row], step, draft=True), scores

    def _token(self, scores_NV: Tensor, rows: Sequence[int], step: int, draft: bool) -> Tensor:
        if not self.do_sample:
            return self.best(scores_NV)
        noise_NV = self._noise(step, scores_NV)
        if len(rows) < self._rows:
            noise_NV = torch.stack([noise_NV[row] for row in rows])
        shares_NV = scores_NV.softmax(-1) / noise_NV
        tokens_N = shares_NV.argmax(-1)
        if not draft and shares_NV[:, 0].isnan().any():  # (the softmax of such scores is NaN everywhere)
            raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
        return self._ranks.first(tokens_N)

    def forget(self, before: int) -> None:
        """Drops the noise of steps that are over."""
        for step in [step for step in self._steps if step < before]:
            del self._steps[step]

    def close(self, steps: int) -> None:
        """Leaves PyTorch's generator in the state after plain sampling of this many steps."""
        if steps in self._steps and self._generator is None:
            state, noise = self._steps[steps]
            set_random_state(noise.device, state)
        self._steps.clear()

    def _noise(self, step: int, like_NV: Tensor) -> Tensor:
        """Returns the noise ``[B, V]`` that plain sampling would draw in a step."""
        while self._drawn <= step:
            state = random_state(like_NV.device)
            noise = torch.empty(self._rows, like_NV.shape[-1], device=like_NV.device)
            noise.exponential_(generator=self._generator)
            self._steps[self._drawn] = state, noise
            self._drawn += 1
        return self._steps[step][1]


def random_state(device: torch.device) -> Tensor:
    """Returns the state of PyTorch's generator of a device."""
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


def set_random_state(device: torch.device, state: Tensor) -> None:
    """Sets the state of PyTorch's generator of a device."""
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


# Processors that remember nothing from call to call: drafts, some of which are dropped again, may pass through them.
STATELESS = (
    logits_process.EpsilonLogitsWarper,
    logits_process.EtaLogitsWarper,
    logits_process.ExponentialDecayLengthPenalty,
    logits_process.ForcedEOSTokenLogitsProcessor,
    logits_process.InfNanRemoveLogitsProcessor,
    logits_process.LogitNormalization,
    logits_process.MinLengthLogitsProcessor,
    logits_process.MinNewTokensLengthLogitsProcessor,
    logits_process.MinPLogitsWarper,
    logits_process.NoBadWordsLogitsProcessor,
    logits_process.NoRepeatNGramLogitsProcessor,
    logits_process.RepetitionPenaltyLogitsProcessor,
    logits_process.SequenceBiasLogitsProcessor,
    logits_process.SuppressTokensAtBeginLogitsProcessor,
    logits_process.SuppressTokensLogitsProcessor,
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.TypicalLogitsWarper,
)


def _processed(processors: Sequence[LogitsProcessor], ids_NS: Tensor, scores_NV: Tensor, rows: Sequence[int]) -> Tensor:
    """Returns the scores of these rows of the batch as processors, which take rows of one length, leave them."""
    if not processors:
        return scores_NV
    return LogitsProcessorList(_for_rows(p, rows) for p in processors)(ids_NS, scores_NV)


def _for_rows(processor: LogitsProcessor, rows: Sequence[int]) -> LogitsProcessor:
    """Returns a processor that holds a number for each row with those of some rows."""
    ignored = getattr(processor, "prompt_ignore_length", None)
    if not isinstance(ignored, Tensor) or list(rows) == list(range(len(ignored))):
        return processor
    chosen = copy.copy(processor)
    chosen.prompt_ignore_length = ignored[list(rows)]
    return chosen
