"""Pages and public docstrings: their Python and commands run; `path/to/model` and `MODEL` are tiny models.

The blocks of a page run in order in one namespace, which begins with what the quickstart's first block defines. Blocks
and commands that cannot run here are in one table, each with its reason; a `river` command among them is parsed.

Not handled: blocks without a language that are no commands (pictures, outputs, other programs' configurations).
"""

from __future__ import annotations

import functools
import inspect
import io
import re
import shlex
import textwrap
import warnings
from typing import NamedTuple

import pytest
import torch
import transformers
import typer.main
from markdown_it import MarkdownIt

import river_compile
from river_compile.cli import app
from tests.support.commands import compile_by_operator
from tests.support.layout import ROOT
from tests.support.tokenizers import byte_tokenizer
from tools.families.mxfp4 import write_gpt_oss

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("docs/guides/*.md"))]
PROGRAMS = ("river", "python", "pip", "make", "vllm", "taskset", "numactl")
SLOW = ("docs/modes.md", "docs/startup.md", "docs/guides/moe.md")  # tuning, calibration, a second kind of model

# What does not run here: a part of the block or command, and why.
NOT_RUN = {
    "torchrun --nproc-per-node 2": "two processes and the package accelerate; tests/runtime/test_tensor_parallel.py",
    "from openai import": "the package openai and a server; tests/cli/test_serve.py",
    "import intel_extension_for_pytorch": "the package that it replaces",
    "from langchain_openai": "a server; tests/cli/test_serve_tools.py",
    "GgufConfig(": "a GGUF file; tests/tools/test_gguf.py",
    "from langchain_core": "LangChain; tests/examples/test_langchain.py",
    "pip install": "installs a package; tests/tools builds and installs the wheel",
    "make demo": "fetches a model",
    "river chat HuggingFaceTB": "fetches a model",
    "make test": "runs this test",
    "river bench": "minutes at its default sizes; tests/cli/test_cli.py runs shorter ones",
    "river serve": "runs until it is interrupted; tests/cli/test_serve.py",
    "python -m river_compile.evaluation": "the package lm_eval and a data set; tests/evaluation",
    "python -m benchmarks.kernels": "a GPU",
    "python -m benchmarks.tasks": "hours with a real model; tests/benchmarks",
    "python -m tools.kernels.tune": "a GPU, or minutes; tests/tools/kernels",
    "vllm serve": "the package vllm",
}

# Names whose example takes minutes here; the same calls stand on a page, which runs.
EXAMPLES_OF_PAGES = {"tune_exit": "docs/modes.md", "ExitRule": "docs/modes.md"}

BEFORE = """
import torch, river_compile
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("path/to/model")
model = AutoModelForCausalLM.from_pretrained("path/to/model", dtype=torch.bfloat16)
inputs = tokenizer("The sky is", return_tensors="pt")
texts = [f"{i} is a number, and {i + 1} comes after it, as it does after every number." for i in range(60)]
"""


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str

    @property
    def why_not(self) -> str | None:
        """Returns why it does not run, None if it does."""
        return next((reason for part, reason in NOT_RUN.items() if part in self.text), None)


@functools.cache
def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        for token in MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8")):
            if token.type == "fence" and token.map is not None:
                name = page.relative_to(ROOT).as_posix()
                found.append(Block(name, token.map[0] + 2, token.info, token.content))
    return found


def commands() -> list[Block]:
    """Returns the commands of all blocks, each once."""
    found: dict[str, Block] = {}
    for block in blocks():
        for line in block.text.replace("\\\n", " ").splitlines():
            if block.language in ("", "bash") and line.startswith(tuple(f"{program} " for program in PROGRAMS)):
                command = shlex.join(shlex.split(line, comments=True))
                found.setdefault(command, block._replace(language="bash", text=command))
    return [*found.values()]


def python_pages() -> list[object]:
    names = dict.fromkeys(block.page for block in blocks() if block.language == "python" and not block.why_not)
    return [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in names]


@pytest.fixture
def at_a_model(tmp_path, monkeypatch):
    """The working folder holds the models that pages name, with weights of 16 bits."""
    tokenizer = byte_tokenizer()
    size = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "eos_token_id": None, "pad_token_id": 0,
        "max_position_embeddings": 2048,
    }  # fmt: skip
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    for folder, config in (
        ("path/to/model", transformers.LlamaConfig(**size)),
        ("path/to/small", transformers.LlamaConfig(**size)),
        ("path/to/Qwen3-30B-A3B", transformers.Qwen3MoeConfig(**size, **experts)),
    ):
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
    gpt_oss = transformers.GptOssConfig(**{**size, "num_local_experts": 4, "num_experts_per_tok": 2})
    write_gpt_oss(tmp_path / "path/to/gpt-oss-20b", gpt_oss)
    tokenizer.save_pretrained(tmp_path / "path/to/gpt-oss-20b")
    (tmp_path / "HuggingFaceTB").mkdir()
    for name in ("MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct"):  # (a folder goes before a name on the hub)
        (tmp_path / name).symlink_to(tmp_path / "path/to/model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    compile_by_operator(monkeypatch)


@pytest.mark.usefixtures("at_a_model", "fresh_dynamo")
@pytest.mark.parametrize("page", python_pages())
def test_python_of_a_page_runs(page, capsys):
    names: dict[str, object] = {}
    exec(BEFORE, names)
    for block in blocks():
        if (block.page, block.language) == (page, "python") and not block.why_not:
            # (Errors name the page and its line.)
            exec(compile("\n" * (block.line - 1) + block.text, str(ROOT / page), "exec"), names)
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    assert "never ran" not in printed.out
    assert "nothing to report" not in printed.out


@pytest.mark.usefixtures("at_a_model", "fresh_dynamo")
@pytest.mark.parametrize("command", [command for command in commands() if not command.why_not], ids=lambda c: c.text)
def test_a_command_of_a_page_runs(command, capsys):
    program, *arguments = shlex.split(command.text)
    assert program == "river", "a new program has to run here or be in the table"
    assert app.main(arguments) == 0, capsys.readouterr().err


def example_of(name: str) -> str:
    """Returns the indented Python of a public name's docstring: what stands before its first section."""
    value = getattr(river_compile, name)
    text = inspect.getdoc(value if inspect.isclass(value) or inspect.isfunction(value) else type(value)) or ""
    before = re.split(r"^(?:Args|Attributes|Returns|Raises|Yields):$", text, flags=re.MULTILINE)[0]
    return textwrap.dedent("\n".join(line for line in before.splitlines() if line.startswith("    ")))


@pytest.mark.usefixtures("at_a_model", "fresh_dynamo")
@pytest.mark.parametrize("name", [name for name in river_compile.__all__ if name not in EXAMPLES_OF_PAGES])
def test_the_example_in_a_public_docstring_runs(name):
    example = example_of(name)
    assert example, f"river_compile.{name} has no example"
    names: dict[str, object] = {"warnings": warnings}
    exec(BEFORE, names)
    exec("river_compile.accelerate(model, background_packing=False)", names)
    with warnings.catch_warnings():
        exec(compile(example, name, "exec"), names)


@pytest.mark.parametrize(("name", "page"), EXAMPLES_OF_PAGES.items())
def test_a_long_example_in_a_docstring_calls_what_a_page_calls(name, page):
    calls = re.findall(r"river_compile\.\w+\(", example_of(name))
    text = "".join(block.text for block in blocks() if block.page == page)
    assert calls
    assert not [call for call in calls if call not in text]


def refusal_of(words: list[str]) -> str:
    """Returns why `river` would not take a command line, empty if it would."""
    root = typer.main.get_command(app.app)
    try:
        with typer.Context(root, info_name="river") as context:
            command = root.get_command(context, words[0])
            if command is None:
                return f"there is no river {words[0]}"
            command.make_context(words[0], words[1:], parent=context)
    except Exception as error:  # of click, which typer may bring itself
        return str(getattr(error, "message", error))
    return ""


def test_commands_that_do_not_run_here_are_parsed():
    refused = {}
    for command in commands():
        words = shlex.split(command.text)
        if "river" in words and words[0] != "python" and command.why_not:
            refused[command.text] = refusal_of(words[words.index("river") + 1 :])
    assert len(refused) > 4
    assert not any(refused.values()), refused
    assert "No such option: --quality-of" in refusal_of(["chat", "MODEL", "--quality-of", "fast"])
    assert "valid integer" in refusal_of(["serve", "MODEL", "--port", "x"])


def test_the_options_of_commands_in_the_text_are_theirs():
    """Of inline code such as `river quantize MODEL -o DIR`, where values may be missing."""
    root = typer.main.get_command(app.app)
    unknown = []
    for page in PAGES:
        for words in (code.split() for code in re.findall(r"`river ([a-z][^`]*)`", page.read_text(encoding="utf-8"))):
            command = root.commands.get(words[0])
            known = {option for parameter in command.params for option in parameter.opts} if command else set()
            options = [word.split("=")[0] for word in words[1:] if re.match(r"--?[a-z]", word)]
            if command is None or not known.issuperset(options):
                unknown.append(f"{page.relative_to(ROOT)}: river {' '.join(words)}")
    assert not unknown, "\n".join(unknown)


def test_the_table_has_no_idle_entry():
    texts = [block.text for block in (*blocks(), *commands())]
    assert [part for part in NOT_RUN if not any(part in text for text in texts)] == []
