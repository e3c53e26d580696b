"""Log-probabilities of an answer's tokens, in OpenAI's forms for chats and for completions.

They are of the logits after `logit_bias` and the model's own repetition penalty, before temperature, `top_p`, other
penalties and grammars. Not handled: tokens of the prompt; those of tool calls and of reasoning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llguidance import LLTokenizer
from torch import Tensor
from transformers import LogitsProcessor

_LEAST = -9999.0  # OpenAI's number for what has no probability; JSON has no infinity


@dataclass(frozen=True)
class Token:
    """A generated token, and the likeliest tokens in its place."""

    text: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...]


class Logprobs(LogitsProcessor):
    """Keeps the log-probabilities of each place until its token is chosen.

    Args:
        top: number of likeliest tokens.
        vocabulary: the bytes of tokens.
    """

    def __init__(self, top: int, vocabulary: LLTokenizer) -> None:
        self._top, self._vocabulary = top, vocabulary
        self._places: dict[int, Tensor] = {}  # by number of ids before: [V]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._places[input_ids.shape[1]] = scores[0].float().log_softmax(-1)
        return scores

    def take(self, token: int) -> Token:
        """Return the first place that has not been taken; `token` was chosen there."""
        values = self._places.pop(min(self._places))
        likeliest = values.topk(self._top)
        top = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
        return Token(
            self._bytes(token), max(float(values[token]), _LEAST),
            tuple((self._bytes(other), max(value, _LEAST)) for other, value in top),
        )  # fmt: skip

    def _bytes(self, token: int) -> bytes:
        return self._vocabulary.decode_bytes([token])


class Piece(str):
    """A piece of an answer, with the tokens that begin in it and their places in the answer, in characters."""

    tokens: Sequence[tuple[int, Token]]

    def __new__(cls, text: str, tokens: Sequence[tuple[int, Token]]) -> Piece:
        made = super().__new__(cls, text)
        made.tokens = tokens
        return made


def of_chat(tokens: Sequence[tuple[int, Token]]) -> dict[str, Any]:
    """Return `logprobs` of a choice of chat completions."""
    content = [
        {
            **_named(token.text, token.logprob),
            "top_logprobs": [_named(text, value) for text, value in token.top],
        }
        for _, token in tokens
    ]
    return {"content": content, "refusal": None}


def _named(text: bytes, value: float) -> dict[str, Any]:
    return {"token": text.decode(errors="replace"), "logprob": value, "bytes": [*text]}


def of_completion(tokens: Sequence[tuple[int, Token]]) -> dict[str, Any]:
    """Return `logprobs` of a choice of completions."""
    return {
        "tokens": [_key(token.text) for _, token in tokens],
        "token_logprobs": [token.logprob for _, token in tokens],
        "top_logprobs": [{_key(text): value for text, value in token.top} for _, token in tokens],
        "text_offset": [at for at, _ in tokens],
    }


def _key(text: bytes) -> str:
    """Return a token's name, which another token's half of a character does not share."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)
