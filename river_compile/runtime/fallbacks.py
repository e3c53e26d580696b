"""Counts what was meant for the river and ran without it: generations without drafts, and forward passes.

The first block of a rewritten model carries a forward hook. Dynamo traces it as nothing, so compiled code never runs
it: if Python does, the block ran as the plain model has it. The hook then checks whether the call came through
``torch.compile`` with this backend, because running a model plainly on purpose is nobody's error.

Not handled: models that never reached the backend; their report says so.
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch._dynamo import eval_frame

from river_compile.errors import RiverWarning
from river_compile.runtime.compiled_call import on_purpose
from river_compile.runtime.stats import ExitStats
from river_compile.upstream.dynamo import CHANGES_NOTHING, call_through
from river_compile.upstream.transformers import keep_out_of_copies, restore_copying


class PlainCalls:
    """The calls of one model's ``generate`` that ran plainly.

    Attributes:
        reasons: how many for each reason, in the order in which they first came up.
    """

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()

    def count(self, model_name: str, reason: str, told: bool = False) -> None:
        """Counts a call; the first one for a reason is warned of, where nobody has `told` why."""
        self.reasons[reason] += 1
        if self.reasons[reason] == 1 and not told:
            warnings.warn(f"{model_name}.generate runs plainly here: {reason}", RiverWarning, stacklevel=3)


_BROKEN = (
    "its call reached graphs that were left to Inductor. Where a graph broke before (by output_attentions=True, say), "
    "Dynamo may not trace that code again before torch._dynamo.reset()"
)


class PlainRuns:
    """Forward passes of one model that ran without the river although they came through its backend.

    Attributes:
        count: how many.
        reason: of the latest one, empty where there is none.
    """

    def __init__(self) -> None:
        self.count = 0
        self.reason = ""
        self._backend: Callable[..., object] | None = None
        self._model = ""
        self._noticed = False  # a block, since the latest call that reached no graph
        self._stats = ExitStats()
        self._steps = self._steps_before = -1

    def watch(self, model: nn.Module, block_path: str, backend: Callable[..., object], stats: ExitStats) -> None:
        """Watches a model from now on.

        Args:
            model: the model, whose calls go through `torch.compile`.
            block_path: module path of its first block, seen from the model or from what holds it.
            backend: the function that compiles it.
            stats: what counts the model's steps.
        """
        self._backend, self._model, self._stats = backend, type(model).__name__, stats
        for name, module in model.named_modules():
            if block_path == name or block_path.endswith(f".{name}"):
                hooks = module._forward_pre_hooks.values()
                if not any(_is_ours(hook) and hook.tells() is self for hook in hooks):
                    module.register_forward_pre_hook(_hook_of(self))
                    keep_out_of_copies(module)
                return

    @staticmethod
    def end(model: nn.Module) -> None:
        """Stops watching a model."""
        for module in model.modules():
            for number, hook in list(module._forward_pre_hooks.items()):
                if _is_ours(hook):
                    del module._forward_pre_hooks[number]
                    restore_copying(module)

    def notice(self) -> None:
        """Counts a plain run of a block; warns if the river ran since the last one."""
        if call_through(self._backend) is None or on_purpose():
            return
        self._noticed = True
        self._count(_why())

    def called(self) -> None:
        """Counts a call that reached no rewritten graph, where no block that ran in it was noticed."""
        steps = self._stats.steps
        if steps == self._steps_before and not self._noticed:
            self._count(_BROKEN)
        self._noticed, self._steps_before = False, steps

    def _count(self, reason: str) -> None:
        self.count += 1
        self.reason = reason
        if self._stats.steps != self._steps:
            self._steps = self._stats.steps
            warnings.warn(
                f"a forward pass of {self._model} ran without the river: {self.reason}", RiverWarning, stacklevel=3
            )


def _hook_of(runs: PlainRuns) -> Any:
    """Returns the hook of a model's first block. It holds weakly what it tells."""
    told = weakref.ref(runs)

    def block_runs(block: nn.Module, args: object) -> None:
        if torch.compiler.is_compiling():
            return
        found = told()
        if found is not None:
            found.notice()

    hook: Any = block_runs
    hook.tells = told
    setattr(hook, CHANGES_NOTHING, True)
    return hook


def _is_ours(hook: Any) -> bool:
    return hasattr(hook, "tells")


def _why() -> str:
    stance = eval_frame._stance.stance
    if stance != "default":
        return f"torch.compiler.set_stance({stance!r}) is in force"
    if get_eval_frame_callback() is False:
        limit = f"torch._dynamo.config.recompile_limit={torch._dynamo.config.recompile_limit}"
        return (
            f"Dynamo's limit of graphs is reached ({limit}); raise it, or use fewer shapes, and torch._dynamo.reset()"
        )
    return "it is excluded from compilation (torch.compiler.disable, or code that Dynamo skips)"
