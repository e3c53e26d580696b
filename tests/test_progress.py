"""The bar of a start: what a terminal sees, and that nothing else sees it."""

from __future__ import annotations

import io
from contextlib import redirect_stderr

import torch

import river_compile
from river_compile.kernels.native import load
from river_compile.lowering import lower
from river_compile.progress import stage_reached, stage_shown
from tests.support.families import make, prompt


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_innermost_stage_is_shown_and_goes_with_the_first():
    with redirect_stderr(Terminal()) as terminal, stage_shown("tracing"):
        with stage_shown("packing"):
            stage_reached(0.5)
            assert "river: packing" in terminal.getvalue().split("\r")[-1]
        assert "river: tracing" in terminal.getvalue().split("\r")[-1]
    assert terminal.getvalue().split("\r")[-1].strip() == ""


def test_without_a_terminal_nothing_is_shown(capsys):
    with stage_shown("tracing"):
        stage_reached(0.5)
    assert capsys.readouterr() == ("", "")


def test_without_a_terminal_a_long_start_writes_a_line_every_ten_seconds(capsys, monkeypatch):
    now = 100.0
    monkeypatch.setattr("river_compile.progress.time.monotonic", lambda: now)
    with stage_shown("tracing"), stage_shown("packing"):
        for number in range(1, 26):
            now += 1
            stage_reached(number / 25)
    assert capsys.readouterr().err == "river: packing, 40% after 10 s\nriver: packing, 80% after 20 s\n"


def test_a_first_compilation_of_the_kernels_is_shown(monkeypatch):
    """Three looks at libraries that are not there yet; without one, nothing is shown."""
    looks = [False, False, False, True]
    monkeypatch.setattr(load, "built", lambda seconds: looks.pop(0))
    with redirect_stderr(Terminal()) as terminal:
        lower.load_native()
    assert "river: compiling the C++ kernels, once per machine" in terminal.getvalue()
    assert not looks
    monkeypatch.undo()
    with redirect_stderr(Terminal()) as terminal:
        lower.load_native()
    assert terminal.getvalue() == ""


def test_what_an_accelerated_model_waits_for_is_shown():
    model, ids = make("llama", layers=2), prompt()
    river_compile.accelerate(model, compile_cache=False)
    with redirect_stderr(Terminal()) as terminal:
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=3)
    shown = terminal.getvalue()
    for stage in ("tracing", "rewriting", "reading own text", "packing", "compiling"):
        assert f"river: {stage}" in shown, stage
