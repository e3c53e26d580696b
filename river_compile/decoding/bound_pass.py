"""A pass of one width that a session runs again: its graph's inputs, those that change moved on in place.

Between a model's call and its graph stands Dynamo. It checks thousands of guards and gathers the graph's inputs from
hundreds of modules, about a millisecond a token. Within one session the same graph runs with the same parameters and
the same cache, and with other ids, masks and positions. A static sliding window counts its tokens in Python besides.

Not handled (such passes go through the model each time): caches that grow, whose graphs return longer ones, and models
whose code does more in a call than to run one graph.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, StaticSlidingWindowLayer

from river_compile.runtime.draft_vocab import DraftVocab
from river_compile.runtime.executor import Replay, RiverExecutor, on_call
from river_compile.store.stored_pass import named
from river_compile.upstream.dynamo import runs_one_graph
from river_compile.upstream.transformers import is_static

COUNTER = "cumulative_length_int"  # what a static sliding window counts in

# A graph that ran in this thread: its executor, what it was given, and what it returned.
Call = tuple[RiverExecutor, tuple, tuple]


@contextlib.contextmanager
def graph_calls() -> Iterator[list[Call]]:
    """Collects the calls of rewritten graphs that this thread makes inside."""
    calls: list[Call] = []
    here = threading.get_ident()

    def note(*call: Any) -> None:
        if threading.get_ident() == here:
            calls.append(call)

    with on_call(note):
        yield calls


class BoundPass:
    """Runs a graph again with its first inputs; see :meth:`of`.

    The model is not looked at again: a session's contract says that it does not change.

    Args:
        executor: runs the graph.
        args: the graph's inputs.
        given: the numbers of those among them that the model is given, with their names.
        width: tokens of each row.
        logits: which of the graph's outputs they are.
        cache: the KV cache.
    """

    def __init__(
        self,
        executor: RiverExecutor,
        args: Sequence,
        given: Sequence[tuple[int, Any]],
        width: int,
        logits: int,
        cache: Cache,
    ) -> None:
        self.executor, self.args, self._given = executor, list(args), given
        self._width, self.logits = width, logits
        self._latest: Mapping[str, Any] | None = None  # what the inputs in the list were taken from
        self._replays: dict[int | None, Replay] = {}  # by depth
        self._counters = [i for i, name in enumerate(executor.inputs) if name.endswith(COUNTER)]
        self._windows: list[Any] = [layer for layer in cache.layers if type(layer) is StaticSlidingWindowLayer]

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        inputs: Mapping[str, Any],
        cache: Cache,
        calls: Sequence[Call],
        logits: Tensor,
        width: int,
    ) -> BoundPass | None:
        """Binds a pass that ran.

        Args:
            model: the model.
            inputs: what it was given, by name.
            cache: the KV cache among them.
            calls: the graphs that ran.
            logits: what it returned.
            width: tokens of each row.

        Returns:
            The pass; None where a call does more than to run one graph, or where it is not known where one of the
            graph's inputs came from.
        """
        if len(calls) != 1 or not is_static(cache):
            return None
        executor, args, outputs = calls[0]
        made = next((i for i, output in enumerate(outputs) if output is logits), None)
        if made is None or executor.entry is None or not runs_one_graph(model, executor.entry.code):
            return None
        names = {id(value): name for name, value in named(inputs) if isinstance(value, Tensor)}
        held = {id(value) for layer in cache.layers for value in vars(layer).values()}
        given = []
        for number, arg in enumerate(args):
            if isinstance(arg, Tensor) and id(arg) in names:
                given.append((number, names[id(arg)]))
            elif isinstance(arg, Tensor) and id(arg) not in held and number not in executor.fixed:
                return None
        return cls(executor, args, given, width, made, cache)

    def __call__(
        self, inputs: Mapping[str, Any], depth: int | None, tokens: DraftVocab | None, last_token: bool = False
    ) -> Tensor:
        """Runs the graph with other inputs of the same shapes, whose tokens have room in the cache; returns the logits
        ``[B, W, V]``.

        Args:
            inputs: as the model takes them, by name.
            depth: blocks to execute; None leaves it to the exit policy.
            tokens: those whose logits the river's head computes, None for all.
            last_token: the caller reads no logits but those of the last token; there may be no others.
        """
        args = self.args
        if inputs is not self._latest:
            values = dict(named(inputs))
            for number, name in self._given:
                args[number] = values[name]
            self._latest = inputs
        for number in self._counters:
            args[number] = self._windows[0].cumulative_length_int
        replay = None if last_token else self._replays.get(depth)
        if replay is not None:
            outputs = replay(args, tokens)
        else:
            outputs = self.executor.step(args, depth, tokens, last_token, has_room=True)
            if not last_token:
                found = self.executor.replay(args, depth)
                if found is not None:
                    self._replays[depth] = found
        for window in self._windows:
            window.cumulative_length_int += self._width
        logits: Tensor = outputs[self.logits]
        return logits
