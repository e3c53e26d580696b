"""Cases of kind "compiler": the C++ compiler is not there, or fails in one way or another.

The text is then the plain model's, which runs uncompiled, and one warning says what to install.

Not handled: a compiler that compiles a few lines and fails later.
"""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import torch._inductor.config as inductor

import river_compile
from tests.support.families import REWRITTEN, make
from tests.support.lowerings import INDUCTOR
from tools.soak.cases import Case, Failure
from tools.soak.text import padded

KERNELS = {"auto": "auto", "inductor": INDUCTOR}
_VERSION = 'case "$1" in -v|--version) echo version 1; exit;; esac\n'
COMPILERS = {
    "missing": "",
    "fails": "exit 1\n",
    "fails after its version": f"{_VERSION}echo error: out of licences >&2\nexit 1\n",
    "writes nothing": _VERSION,
    "dies": f"{_VERSION}kill -9 $$\n",
}


def draw(rng: random.Random) -> Case:
    return {
        "compiler": rng.choice([*COMPILERS]),
        "family": rng.choice(REWRITTEN),
        "quality": rng.choice(("exact", "fast")),
        "kernels": rng.choice([*KERNELS]),
        "seed": rng.randrange(1000),
        "lengths": [rng.choice((1, 5, 9)) for _ in range(rng.choice((1, 2)))],
    }


def run(case: Case, folder: Path) -> str:
    """Generate twice with such a compiler, and compares with the plain model."""
    compiler = folder / "c++"
    if script := COMPILERS[case["compiler"]]:
        compiler.write_text(f"#!/bin/sh\n{script}")
        compiler.chmod(0o755)
    torch._dynamo.reset()
    plain, ours = (make(case["family"], seed=case["seed"], layers=2) for _ in range(2))
    ids, mask = padded(case["lengths"], case["seed"])
    arguments = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "disable_compile": True}
    expected = plain.generate(ids, **arguments)
    river_compile.accelerate(ours, case["quality"], kernels=KERNELS[case["kernels"]])
    with (
        inductor.patch({"cpp.cxx": (None, str(compiler))}),
        mock.patch.dict(os.environ, RIVER_COMPILE_HOME=str(folder)),
        warnings.catch_warnings(record=True) as said,
    ):
        warnings.simplefilter("always")
        texts = [ours.generate(ids, **arguments) for _ in range(2)]
    if not all(torch.equal(text, expected) for text in texts):
        raise Failure("the text is not the plain model's")
    told = [str(w.message) for w in said if issubclass(w.category, river_compile.RiverWarning)]
    if len(told) != 1 or "install" not in told[0]:
        raise Failure(f"{len(told)} warnings instead of one that says what to install: {told}")
    return "passed"


def smaller(case: Case) -> Iterator[Case]:
    if len(case["lengths"]) > 1:
        yield {**case, "lengths": case["lengths"][:1]}
    if case["quality"] != "exact":
        yield {**case, "quality": "exact"}
    if case["kernels"] != "auto":
        yield {**case, "kernels": "auto"}
