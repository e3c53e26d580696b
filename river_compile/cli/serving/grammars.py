"""Answers in a form that a client asks for: JSON, or JSON of a schema, by a grammar of llguidance.

Not handled: grammars of other kinds; schemas with keywords that llguidance does not know, which are refused.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import llguidance.hf
import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor
from transformers import LogitsProcessor

from river_compile.cli.serving.errors import Refused, invalid
from river_compile.cli.serving.forms import need
from river_compile.kernels.checks import short_repr

# A model that is unsure may write spaces until its tokens are used up.
JSON_SPACES: Any = {"whitespace_pattern": r"[ \n]{0,16}"}
_FORMS = ("text", "json_object", "json_schema")


def grammar_of(form: object, path: str) -> str | None:
    """Return the grammar of a `response_format`, None for text; raise Refused for what is none.

    Args:
        form: as in chat completions, ``{"type": "json_schema", "json_schema": {"schema": ...}}``, or as in responses,
            where name and schema are next to the type.
        path: of it in the request.
    """
    given = need(form, dict, path, f"an object with a type of {', '.join(_FORMS)}")
    kind = given.get("type")
    if kind not in _FORMS:
        raise invalid(f"{path}.type={short_repr(kind)} is not allowed; give {', '.join(_FORMS)}", f"{path}.type")
    if kind == "text":
        return None
    if kind == "json_object":
        return LLMatcher.grammar_from_json_schema({"type": "object"}, overrides=JSON_SPACES)
    inner = f"{path}.json_schema" if "schema" not in given else path
    holder = need(given.get("json_schema"), dict, inner, "an object with a schema") if inner != path else given
    schema = need(holder.get("schema"), dict, f"{inner}.schema", "a JSON schema")
    return check_schema(schema, f"{inner}.schema")


def check_schema(schema: dict[str, Any], path: str) -> str:
    """Return the grammar of a JSON schema; raise Refused for one that llguidance does not support."""
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=JSON_SPACES)
    wrong = LLMatcher.validate_grammar(grammar)
    if wrong and not wrong.startswith("WARNING"):
        why = " ".join(wrong.split())[:200]
        raise Refused(400, "invalid_json_schema", f"{path} is not supported: {why}", path)
    return grammar


@functools.lru_cache(maxsize=1)
def vocabulary_of(tokenizer: Any, vocabulary: int) -> LLTokenizer:
    """Return llguidance's form of a tokenizer, with so many tokens as the model has logits."""
    return llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocabulary)


class Grammar(LogitsProcessor):
    """Bars the tokens after which a text cannot become one of a grammar; after its end, all but the end token.

    Args:
        grammar: in a form of llguidance's.
        vocabulary: of the model (:func:`vocabulary_of`).
    """

    def __init__(self, grammar: str, vocabulary: LLTokenizer) -> None:
        self._matcher = LLMatcher(vocabulary, grammar, log_level=0)
        self._length: int | None = None  # ids that it has read

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._length is not None:
            self._matcher.consume_tokens(input_ids[0, self._length :].tolist())
        self._length = input_ids.shape[1]
        if self._matcher.is_error():
            raise RuntimeError(self._matcher.get_error())
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        return scores.masked_fill(allowed.to(scores.device) == 0, -torch.inf)
