"""Chooses tokens from processed scores, so that the text is plain generation's for any drafts.

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

from river_compile.distributed.ranks import ALONE, Ranks


class Chooser:
    """Chooses tokens for one call of generate.

    Args:
        rows: B.
        do_sample: draw from the scores' softmax instead of taking their maximum.
        ranks: that share the model; all of them choose what the first one does.
        drafting: whether some steps are asked for more than once, or for some of the rows.
        generator: of random numbers, on the scores' device; None for PyTorch's.
    """

    def __init__(
        self,
        rows: int,
        do_sample: bool,
        ranks: Ranks = ALONE,
        drafting: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        self.do_sample, self._ranks, self._drafting = do_sample, ranks, drafting
        self._generator = generator
        self._rows = rows
        self._drawn = 0  # steps whose noise was drawn
        self._steps: dict[int, tuple[Tensor, Tensor]] = {}  # the generator's state before a step, and the step's noise

    def choose(self, scores_NV: Tensor, rows: Sequence[int], step: int, draft: bool = False) -> Tensor:
        """Returns a token ``[N]`` for each of these rows, which have so many new tokens so far.

        Raises:
            RuntimeError: as ``torch.multinomial`` does: a row's scores are all -inf, or one of them is NaN or +inf. (A
                draft is of any token then, since it need not hold.)
        """
        if not self.do_sample:
            tokens_N = scores_NV.argmax(-1)
            return self._ranks.first(tokens_N) if self._ranks.several else tokens_N
        if not self._drafting:
            shares_NV = scores_NV.softmax(-1)
            return self._ranks.first(torch.multinomial(shares_NV, num_samples=1, generator=self._generator).squeeze(1))
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
    """Sets it."""
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


class RowProcessors:
    """Logits processors that know the rows of their scores.

    Args:
        processors: they take rows of one length.
    """

    def __init__(self, processors: LogitsProcessorList) -> None:
        self._processors = processors

    def __call__(self, ids_NS: Tensor, scores_NV: Tensor, rows: Sequence[int]) -> Tensor:
        """Returns the processed scores of these rows of the batch."""
        return LogitsProcessorList(_for_rows(p, rows) for p in self._processors)(ids_NS, scores_NV)


def _for_rows(processor: LogitsProcessor, rows: Sequence[int]) -> LogitsProcessor:
    """Returns a processor that holds a number for each row with those of some rows."""
    ignored = getattr(processor, "prompt_ignore_length", None)
    if not isinstance(ignored, Tensor) or list(rows) == list(range(len(ignored))):
        return processor
    chosen = copy.copy(processor)
    chosen.prompt_ignore_length = ignored[list(rows)]
    return chosen
