"""Wrong values end each command with one line before a model is loaded; streams that are closed end none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import transformers

from river_compile.cli import app, shared
from tests.cli.test_cli import Typed, river
from tests.support.layout import ROOT


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        *(((command, "{tiny}", "--dtype", "int4"), "--dtype 'int4' is not known; use one of bfloat16,") for command in (
            "check", "chat", "tune", "explain", "serve",
        )),
        (("bench", "-m", "{tiny}", "--dtype", ""), "--dtype '' is not known"),
        (("bench", "-m", "any", "-n", "1"), "-n 1"),
        (("bench", "-m", "any", "-o", "xml"), "-o xml is not known; use one of md, json"),
        (("bench", "-m", "any", "--row", "quick"), "--row quick is not known here; use one of eager, inductor,"),
        (("bench", "-m", "any", "--row", "calibrated"), "--row calibrated needs --calibration FILE"),
        (("check", "nowhere"), "model='nowhere' is neither a folder with a config.json nor a name on the hub"),
        (("check", "smollm2"), "or `python -m tools.demo_models smollm2` fetches a small model and prints its folder"),
        (("chat", "smollm2", "--threads", "-1"), "--threads -1 is not allowed"),
        (("quantize", "{tiny}", "-o", "never", "--dtype", "float64"), "--dtype 'float64' is not known"),
        (("chat", "{tiny}", "--threads", "99999999999999"), "is not allowed; give at most 1024"),
        (("chat", "{tiny}", "--temperature", "-1"), "--temperature -1.0 is not allowed; give 0 (greedy) or more"),
        (("chat", "{tiny}", "--temperature", "nan"), "--temperature nan is not allowed"),
        (("check", "{tiny}", "--bandwidth", "-1"), "--bandwidth -1.0 is not allowed; give GB/s"),
        (("check", "{tiny}", "--bandwidth", "inf"), "--bandwidth inf is not allowed"),
        (("check", "x" * 5000), "is neither a folder with a config.json nor a name on the hub"),
        (("check", "a/\0b"), "is neither a folder with a config.json nor a name on the hub"),
        (("explain", "{tiny}", "-o", "{tiny}"), "cannot be written: Is a directory; name another file"),
        (("explain", "{tiny}", "-o", "{tiny}/config.json/x"), "cannot be written: "),
        (("tune", "{tiny}", "--kl", "1", "-o", "/dev/null/rule.json"), "cannot be written: "),
    ],
)  # fmt: skip
def test_a_wrong_value_is_one_line_before_a_model_is_loaded(arguments, says, tiny, capsys, monkeypatch):
    monkeypatch.setattr(shared, "load", None)
    printed = river(capsys, *(argument.replace("{tiny}", tiny) for argument in arguments), code=1)
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert says in printed.err
    assert len(printed.err) < 600
    assert printed.out == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("bench", "-m", "{tiny}", "-p", "99999"), "-p 99999 -n 128 takes 99999 tokens (-n continues "),
        (("chat", "{tiny}", "--prompt", "\udcff"), "the user's message is no text in UTF-8: "),
        (("chat", "{tiny}", "--prompt", "x" * 3000), "tokens, and the model's context 2048. Shorten the message"),
    ],
)
def test_what_a_model_cannot_take_is_one_line(arguments, says, tiny, capsys):
    printed = river(capsys, *(argument.replace("{tiny}", tiny) for argument in arguments), code=1)
    assert says in printed.err
    assert printed.err.count("\n") == 1


def test_an_answer_ends_where_the_context_does_and_the_conversation_goes_on(tmp_path, tiny, capsys, monkeypatch):
    """GPT-2 has no embedding of a later position."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    size = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 40, "vocab_size": len(tokenizer)}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**size, eos_token_id=None)).save_pretrained(tmp_path)
    monkeypatch.setattr("sys.stdin", Typed(f"{'x' * 40}\n/reset\nhello\n/stats\n"))
    printed = river(capsys, "chat", tmp_path, "--dtype", "float32")
    assert "error: the conversation has " in printed.err
    prompt = "user: hello\nassistant: "
    assert f"{40 - len(prompt)} tokens" in printed.out


def test_commands_run_without_standard_streams(tiny, capsys, monkeypatch):
    """As a service starts them: Python's sys.stdin and sys.stdout are None then."""
    monkeypatch.setattr("sys.stdin", None)
    assert river(capsys, "chat", tiny).err == ""
    monkeypatch.setattr("sys.stdout", None)
    assert app.main(["cache", "--json"]) == 0


def test_a_terminal_of_no_width_shows_the_page(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "0")
    monkeypatch.setenv("RIVER_COMPILE_CACHE_DIR", str(tmp_path))
    assert str(tmp_path) in river(capsys, "cache").out.replace("\n", "")


def test_a_process_whose_streams_are_closed_ends_well(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RIVER_COMPILE_CACHE_DIR": str(tmp_path)}
    command = f"{sys.executable} -m river_compile cache --json <&- >&-"
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
