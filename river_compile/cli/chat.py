"""``river chat MODEL``: a conversation in which every token shows where it came from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from river_compile.cli.output import AsJson, Threads, show, use_threads

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from river_compile.cli.painting import Painter

HELP = "/stats  speed and sources    /report  what became of the model    /reset  begin anew    /exit  (or Ctrl-D)"


def chat(
    model: Annotated[str, typer.Argument(help="A model folder, smollm2 or gemma3-270m.")] = "smollm2",
    quality: Annotated[str, typer.Option(help="exact, strict, calibrated or fast.")] = "exact",
    calibration: Annotated[Path | None, typer.Option(help="For calibrated: a file of `river calibrate`.")] = None,
    artifact: Annotated[Path | None, typer.Option(help="Twins of `river pack`.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Ask this and end; may be repeated.")] = None,
    system: Annotated[str, typer.Option(help="The system's message.")] = "",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="Above 0: sample.")] = 0.0,
    dtype: Annotated[str, typer.Option(help="Of the weights.")] = "bfloat16",
    threads: Threads = 0,
    as_json: AsJson = False,
) -> None:
    """Talks with a model. Green tokens were drafted by the river, cyan ones copied from the text before.

    With `--quality fast` the colour tells how many blocks a token ran through.
    """
    from river_compile.api.accelerate import accelerate
    from river_compile.cli.models import load, quiet

    use_threads(threads)
    quiet()
    network, tokenizer = load(model, dtype)
    more = {} if artifact is None else {"artifact": artifact}
    accelerate(network, quality, calibration, **more)
    talk = Conversation(network, tokenizer, quality in ("exact", "strict"), system, max_new_tokens, temperature)
    asked = prompt if prompt is not None else _lines(as_json)
    turns = []
    for text in asked:
        if text.startswith("/"):
            if not talk.command(text):
                break
            continue
        painter = talk.answer(text, quiet=as_json)
        turns.append(
            {
                "user": text,
                "assistant": painter.text,
                "tokens": [{"text": piece, "source": source} for piece, source in painter.tokens],
                "tokens_per_s": painter.tokens_per_s,
            }
        )
    if as_json:
        show("chat", {"model": model, "quality": quality, "turns": turns}, True, lambda console: None)


def _lines(as_json: bool) -> Any:
    """Yields what a person types, or the lines of standard input."""
    if as_json or not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    from rich.console import Console

    console = Console(highlight=False)
    console.print(f"[dim]{HELP}[/]")
    while True:
        try:
            text = console.input("[bold]> [/]").strip()
        except EOFError:
            return
        if text:
            yield text


def _compiled_so_far(model: PreTrainedModel) -> int:
    from river_compile.model_record import find_record

    record = find_record(model)
    return 0 if record is None else record.prepared


class Conversation:
    """Asks a model turn by turn.

    Args:
        model: an accelerated model.
        tokenizer: with a chat template, or every turn stands for itself.
        by_cycle: whether exact mode generates.
        system: the system's message, empty for none.
        max_new_tokens, temperature: of an answer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        by_cycle: bool,
        system: str,
        max_new_tokens: int,
        temperature: float,
    ) -> None:
        from rich.console import Console

        self._model, self._tokenizer, self._by_cycle = model, tokenizer, by_cycle
        self._first = [{"role": "system", "content": system}] if system else []
        self._messages: list[dict[str, str]] = [*self._first]
        self._options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            self._options["temperature"] = temperature
        self._console = Console(highlight=False, soft_wrap=True)
        self._latest: Painter | None = None
        self._compiled = False  # something was, for the latest answer

    def answer(self, text: str, quiet: bool = False) -> Painter:
        """Answers a message, streaming it to the terminal."""
        import torch

        from river_compile.cli.painting import Painter

        self._messages.append({"role": "user", "content": text})
        ids = self._encode(text)
        tokenizer = self._tokenizer
        painter = Painter(
            decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
            write=lambda piece, style: None if quiet else self._console.print(piece, style=style, end="", markup=False),
            by_cycle=self._by_cycle,
            blocks=self._model.config.get_text_config().num_hidden_layers,
        )
        before = _compiled_so_far(self._model)
        with painter.watching():
            self._model.generate(ids, attention_mask=torch.ones_like(ids), streamer=painter, **self._options)
        if not quiet:
            self._console.print()
        self._messages.append({"role": "assistant", "content": painter.text})
        self._latest, self._compiled = painter, _compiled_so_far(self._model) > before
        return painter

    def command(self, text: str) -> bool:
        """Does what a command says; returns False for the end."""
        from river_compile.reporting.report import report

        if text in ("/exit", "/quit"):
            return False
        if text == "/reset":
            self._messages = [*self._first]
        elif text == "/report":
            self._console.print(str(report(self._model)), markup=False)
        elif text == "/stats":
            self._console.print(self.stats(), markup=False)
        else:
            self._console.print(HELP, markup=False)
        return True

    def stats(self) -> str:
        """Returns the latest answer's speed, and where its tokens came from."""
        if self._latest is None:
            return "nothing was answered yet"
        speed = self._latest.tokens_per_s
        with_it = ", compiling included" if self._compiled else ""
        rate = "" if speed is None else f", {speed:.1f} tokens/s{with_it}"
        sources = ", ".join(f"{source} {count}" for source, count in self._latest.sources.items())
        return f"{len(self._latest.tokens)} tokens{rate}: {sources}"

    def _encode(self, text: str) -> Any:
        from river_compile.cli.models import encode

        if not self._tokenizer.chat_template:
            return encode(self._tokenizer, text)
        return self._tokenizer.apply_chat_template(
            self._messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
