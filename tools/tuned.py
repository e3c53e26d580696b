"""Trains a demo model a little, so that its weights leave the 4-bit grid of the file that they were unpacked from.

Texts are questions about functions of Python's standard library, answered by their docstrings, in the model's own chat
format. A fixed seed draws them; the weights differ between processors and releases of Python and torch as sums do.
Not handled: a better model. Rate and steps are small, so that it behaves as before.
"""

from __future__ import annotations

import importlib
import inspect
import random
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from river_compile.cli import shared
from river_compile.progress import stage_reached, stage_shown

MODULES = (
    "argparse", "array", "ast", "bisect", "calendar", "collections", "configparser", "copy", "csv", "datetime",
    "decimal", "difflib", "email.message", "fractions", "functools", "heapq", "html", "inspect", "io", "ipaddress",
    "itertools", "json", "locale", "logging", "math", "mimetypes", "operator", "os", "os.path", "pathlib", "pickle",
    "pprint", "queue", "random", "re", "sched", "shlex", "shutil", "socket", "sqlite3", "statistics", "string",
    "struct", "subprocess", "tempfile", "textwrap", "threading", "time", "timeit", "tokenize", "traceback", "types",
    "typing", "unittest", "urllib.parse", "uuid", "warnings", "wave", "weakref", "xml.dom.minidom", "zipfile", "zlib",
)  # fmt: skip
STEPS, TEXTS, TOKENS = 300, 8, 128  # texts of a step, and tokens of a text
RATE = 2e-5  # of AdamW, after a tenth of the steps, falling to zero
_SHORTEST = 80  # characters of a docstring


def train(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, steps: int = STEPS) -> list[float]:
    """Train a float32 model in place, in bfloat16 with float32 sums; return the loss of each step."""
    torch.manual_seed(0)
    batches = _batches(tokenizer, steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    losses: list[float] = []
    model.train()
    with stage_shown("training"):
        for step, (ids, mask) in enumerate(batches):
            stage_reached(step / steps, f"loss {losses[-1]:.2f}" if losses else "")
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
            losses.append(loss.item())
    model.eval()
    return losses


def save(source: str | Path, folder: Path, steps: int = STEPS) -> None:
    """Train the model of a folder and write it, in bfloat16, to another one."""
    model, tokenizer = shared.load(str(source), "float32")
    losses = train(model, tokenizer, steps)
    model.to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    first, last = (sum(part) / len(part) for part in (losses[:10], losses[-10:]))
    print(f"loss {first:.2f} -> {last:.2f}")


def conversations() -> list[tuple[str, str]]:
    """Return questions and answers, in an order that a seed draws."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in MODULES:
            for name, text in _docstrings(module):
                found[f"{module}.{name}"] = text
    pairs = [(f"What does Python's `{name}` do?", text) for name, text in sorted(found.items())]
    random.Random(0).shuffle(pairs)
    return pairs


def _docstrings(module: str) -> Iterator[tuple[str, str]]:
    """Yield names and docstrings of a module's public functions, classes and methods."""
    for name, member in inspect.getmembers(importlib.import_module(module)):
        if name.startswith("_") or not (inspect.isroutine(member) or inspect.isclass(member)):
            continue
        methods = inspect.getmembers(member, inspect.isroutine) if inspect.isclass(member) else ()
        for full, each in ((name, member), *((f"{name}.{n}", m) for n, m in methods if not n.startswith("_"))):
            text = inspect.getdoc(each)
            if text and len(text) >= _SHORTEST:
                yield full, text


def _batches(tokenizer: PreTrainedTokenizerBase, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ids and masks ``[TEXTS, TOKENS]``, over all conversations again and again."""
    pairs, place = conversations(), 0
    for _ in range(steps):
        rows = [pairs[(place + row) % len(pairs)] for row in range(TEXTS)]
        place += TEXTS
        ids, mask = torch.zeros(TEXTS, TOKENS, dtype=torch.long), torch.zeros(TEXTS, TOKENS, dtype=torch.long)
        for row, (question, answer) in enumerate(rows):
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            tokens = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][:TOKENS])
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        yield ids, mask
