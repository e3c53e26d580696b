"""Gets what ``generate`` has but does not give to a callable ``custom_generate``.

transformers passes a streamer and an assistant model on to its own loops only, and forgets the tokenizer of
``stop_strings`` where a callable takes their place. They stand in the local variables of frames that are running at
that moment, and are read from there. The tests of exact mode with each of them fail when transformers moves them.
"""

from __future__ import annotations

import inspect
from types import FrameType
from typing import Any

from transformers import GenerationConfig

from river_compile.upstream.hf_cache import cache_of


def argument_of_generate(name: str) -> Any:
    """Returns an argument of the generate call that is running, None where it has none."""
    frame = _running("generate")
    return None if frame is None else frame.f_locals.get(name)


def shares_cache(config: GenerationConfig) -> bool:
    """Whether the caller of the generate that is running brings its KV cache, or gets it back."""
    return config.return_dict_in_generate or cache_of(argument_of_generate("kwargs") or {}) is not None


def _running(function: str) -> FrameType | None:
    """Returns the innermost frame of a function of that name."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != function:
        frame = frame.f_back
    return frame


class KeepsTokenizer:
    """Descriptor for ``__signature__`` of a callable given as ``custom_generate``.

    ``generate`` takes the tokenizer out of its arguments, asks for the callable's signature, and then keeps only those
    arguments that the signature names. While it asks, the tokenizer is put back among the arguments.
    """

    def __get__(self, instance: Any, owner: type) -> inspect.Signature:
        if instance is None:
            raise AttributeError("__signature__")  # the class itself has its ordinary signature
        frame = _running("_extract_generation_mode_kwargs")
        if frame is not None:
            taken, left = (frame.f_locals.get(name) for name in ("generation_mode_kwargs", "kwargs"))
            if isinstance(taken, dict) and isinstance(left, dict) and "tokenizer" in taken:
                left["tokenizer"] = taken["tokenizer"]
        whole = inspect.signature(owner.__call__)
        _, *parameters, rest = whole.parameters.values()
        options = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in instance.per_call]
        return whole.replace(parameters=[*parameters, *options, rest])
