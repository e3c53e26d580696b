"""What the caller of generate gave, of which transformers tells a ``custom_generate`` callable nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import GenerationConfig
from transformers.cache_utils import Cache

from river_compile.upstream.transformers import cache_of, running_generate

# What transformers puts into the configuration of a call that names no other value.
_FILLED_IN = {
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.4,
}


@dataclass(frozen=True)
class Given:
    """Arguments of one call of generate."""

    streamer: Any | None = None
    assistant_model: object | None = None
    config: GenerationConfig | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)  # those that generate does not name

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Given:
        """Return the arguments that generate's parameters got, by name."""
        return cls(
            streamer=arguments.get("streamer"),
            assistant_model=arguments.get("assistant_model"),
            config=arguments.get("generation_config"),
            kwargs=arguments.get("kwargs") or {},
        )

    @classmethod
    def of_running_call(cls) -> Given:
        """Return those of the running generate: a model that is not accelerated hands none over."""
        return cls.of(running_generate())

    @property
    def cache(self) -> Cache | None:
        """The caller's KV cache."""
        return cache_of(self.kwargs)

    def settings(self, names: Iterable[str], other: GenerationConfig | None = None) -> dict[str, Any]:
        """Return the generation settings of these names, given by keyword, by configuration or by another one."""
        found = {name: self.kwargs.get(name) for name in names}
        for name, config in itertools.product(found, (self.config, other)):
            value = getattr(config, name, None)
            if found[name] is None and value != _FILLED_IN.get(name):
                found[name] = value
        return {name: value for name, value in found.items() if value is not None}
