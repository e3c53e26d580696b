"""Walks through one build, one warm generation and one weight of a tiny Llama in exact mode on a CPU.

A profile hook sees every call of a Python function of the product, in new threads too. Time is not measured: the hook
slows everything down. Functions that Dynamo or Inductor writes belong to no file of the product and are not counted.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from tools.house.sources import FOLDERS, ROOT

PROMPT, TOKENS = 16, 64
#: The weight that is followed, and others that tell the types of one weight from those of many.
FOLLOWED = "model.layers.1.mlp.down_proj.weight"
OTHERS = ("model.layers.2.mlp.down_proj.weight", "model.layers.1.self_attn.o_proj.weight")
_LEVELS, _ITEMS = 3, 64  # how far into an object is looked


@dataclass
class Walk:
    """The product's functions that ran."""

    files: dict[str, None] = field(default_factory=dict)  # in the order of their first call
    calls: int = 0
    frames: int = 0  # the most at the same time, in the main thread
    functions: Counter[str] = field(default_factory=Counter)


class _Hook:
    """A profile function that counts the product's calls; `follow` sees each one's arguments and result."""

    def __init__(self, root: Path = ROOT, follow: Follow | None = None) -> None:
        self.walk, self._follow, self._depth = Walk(), follow, 0
        self._root, self._ours = f"{root}/", tuple(f"{root / folder}/" for folder in FOLDERS)
        self._main = threading.get_ident()

    def __call__(self, frame: FrameType, event: str, value: Any) -> None:
        file = frame.f_code.co_filename
        if event not in ("call", "return") or not file.startswith(self._ours):
            return
        path, step = file.removeprefix(self._root), 1 if event == "call" else -1
        if threading.get_ident() == self._main:
            self._depth += step
            self.walk.frames = max(self.walk.frames, self._depth)
        if event == "call":
            self.walk.calls += 1
            self.walk.files.setdefault(path)
            self.walk.functions[f"{path}:{frame.f_code.co_name}"] += 1
        if self._follow is not None:
            self._follow.see(path, frame, event, value)


@contextlib.contextmanager
def walking(root: Path = ROOT, follow: Follow | None = None) -> Iterator[Walk]:
    """Inside, calls of functions in the product's folders below `root` are counted."""
    hook = _Hook(root, follow)
    threading.setprofile(hook)
    sys.setprofile(hook)
    try:
        yield hook.walk
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]


class Follow:
    """Follows one parameter from the module to its packed operand.

    A value is the followed weight's if it is that parameter or the placeholder that stands for it in a graph. So is a
    tensor that a function made of it, of as many elements, or of 4 bits each. So is an instance of the product's
    classes that holds one of these and nothing of other weights.

    Args:
        parameters: by name; with those of `OTHERS`.
        followed: the name of one.
    """

    def __init__(self, parameters: Mapping[str, Any], followed: str = FOLLOWED) -> None:
        self._followed = followed
        self._sizes = {name: p.numel() for name, p in parameters.items()}
        self._marked = {id(p): (name, p) for name, p in parameters.items()}  # (kept alive, so that ids stay theirs)
        self._placeholders = {_placeholder(name): name for name in parameters}
        self._calls: dict[int, set[str]] = {}
        self.files: dict[str, None] = {}
        self.types: dict[str, None] = {}

    def see(self, path: str, frame: FrameType, event: str, value: Any) -> None:
        """Look at a call's arguments, or at its result."""
        if event == "call":
            found = [self._of(argument) for argument in [*frame.f_locals.values()]]
            names = set().union(*(of for of in found if len(of) == 1))  # (an argument of many weights tells nothing)
            self._calls[id(frame)] = names
        else:
            given = self._calls.pop(id(frame), set())
            if len(given) == 1:
                self._mark(value, *given)
            names = self._of(value)
        if names == {self._followed}:
            self.files.setdefault(path)

    def _of(self, value: Any, level: int = _LEVELS) -> set[str]:
        """Return the names of the parameters that a value belongs to; note the classes that hold the followed one."""
        if (mark := self._marked.get(id(value))) is not None:
            return {mark[0]}
        if type(value).__module__ == "torch.fx.node":
            return {name for text, name in self._placeholders.items() if text in value.name}
        is_ours = type(value).__module__.partition(".")[0] in FOLDERS
        if not level or not (is_ours or isinstance(value, (tuple, list, dict))):
            return set()
        names = set().union(*(self._of(part, level - 1) for part in _parts(value)))
        if is_ours and names == {self._followed}:
            self.types.setdefault(f"{type(value).__module__}.{type(value).__qualname__}")
        return names

    def _mark(self, value: Any, name: str, level: int = _LEVELS) -> None:
        """Note the tensors in a result that have the size of the weight, packed or not."""
        from torch import Tensor

        if isinstance(value, Tensor):
            size = self._sizes[name]
            if value.numel() == size or 0.5 * size <= value.numel() * value.element_size() < 0.75 * size:
                self._marked.setdefault(id(value), (name, value))
        elif level and (type(value).__module__.partition(".")[0] in FOLDERS or isinstance(value, (tuple, list))):
            for part in _parts(value):
                self._mark(part, name, level - 1)


def _parts(value: Any) -> list[Any]:
    """Return the items of a container, or the attributes of an instance, of a large one the first."""
    if isinstance(value, dict):
        return [*value.keys(), *value.values()][:_ITEMS]
    if isinstance(value, (tuple, list)):
        return [*value[:_ITEMS]]
    names = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    found = [value.__dict__[name] for name in [*getattr(value, "__dict__", ())][:_ITEMS]]
    return found + [getattr(value, name) for name in names if name != "__weakref__" and hasattr(value, name)]


def _placeholder(parameter: str) -> str:
    """Return what the name of a parameter's placeholder in Dynamo's graph contains."""
    *modules, last = parameter.split(".")
    return f"{'_modules_'.join(modules)}_parameters_{last}"


@dataclass(frozen=True)
class Walks:
    """The first generation of a model, a warm one, and the way of a weight."""

    build: Walk
    warm: Walk
    tokens: int  # of the warm generation
    weight_files: tuple[str, ...]
    weight_types: tuple[str, ...]


def walk() -> Walks:
    """Generate with a tiny Llama in bfloat16, exact mode, with drafts that do not depend on the clock."""
    warnings.filterwarnings("ignore")
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import river_compile

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, max_position_embeddings=512, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    ids = torch.randint(0, 512, (1, PROMPT))
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": TOKENS, "do_sample": False}
    river_compile.accelerate(model, num_assistant_tokens_schedule="constant", prompt_lookup_num_tokens=0)
    follow = Follow({name: model.get_parameter(name) for name in (FOLLOWED, *OTHERS)})
    with walking(follow=follow) as build:
        model.generate(ids, **given)
    for _ in range(2):
        model.generate(ids, **given)
    with walking() as warm:
        out = model.generate(ids, **given)
    return Walks(build, warm, out.shape[1] - PROMPT, tuple(follow.files), tuple(follow.types))
