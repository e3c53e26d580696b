"""``river chat MODEL``: a conversation that shows the source of every token."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from river_compile.cli.shared import (
    AsJson,
    Assistant,
    Calibration,
    Dtype,
    Model,
    PrefixCache,
    Quality,
    Strict,
    Threads,
    Twins,
    context_of,
    error_line,
    show,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from river_compile.cli.painter import Painter

HELP = "/stats  speed and sources    /report  the model's report    /reset  new conversation    /exit  (or Ctrl-D)"


def chat(
    model: Model,
    quality: Quality = None,
    strict: Strict = False,
    calibration: Calibration = None,
    twins: Twins = None,
    assistant: Assistant = None,
    prefix_cache: PrefixCache = True,
    prompt: Annotated[list[str] | None, typer.Option(help="Answer this message, then exit; may be repeated.")] = None,
    system: Annotated[str, typer.Option(help="System message.")] = "",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Maximum new tokens per answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="Sampling temperature (0: greedy).")] = 0.0,
    dtype: Dtype = "bfloat16",
    threads: Threads = 0,
    as_json: AsJson = False,
) -> None:
    """Chat with a model. Green tokens were drafted by twins, blue by an assistant, cyan ones copied from the context.

    With `--quality fast` the color shows how many layers a token ran through.
    """
    from river_compile.api.accelerate import accelerate
    from river_compile.cli.shared import load_assistant, start

    if not 0 <= temperature < math.inf:
        raise ValueError(f"--temperature {temperature} is not allowed; give 0 (greedy) or more")
    network, tokenizer = start(model, dtype, threads, as_it_comes=True)
    more = {**load_assistant(assistant, dtype), "prefix_cache": prefix_cache}
    accelerate(network, quality, strict=strict, calibration=calibration, twins=twins, **more)
    quality = quality or ("exact" if calibration is None else "fast")
    options = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0, "temperature": temperature or None}
    person = prompt is None and not as_json and sys.stdin.isatty()
    talk = Conversation(network, tokenizer, quality == "exact", system, person, **options)
    turns = []
    for text in prompt if prompt is not None else _lines(person):
        if text.startswith("/"):
            if not talk.command(text):
                break
            continue
        try:
            painter = talk.answer(text, quiet=as_json)
        except ValueError as error:
            if not person:
                raise
            print(f"error: {error_line(error)}", file=sys.stderr)
            continue
        tokens = [{"text": piece, "source": source} for piece, source in painter.tokens]
        turn = {"user": text, "assistant": painter.text, "tokens": tokens, "tokens_per_s": painter.tokens_per_s}
        turns.append(turn)
    if as_json:
        show("chat", {"model": model, "quality": quality, "turns": turns}, True, lambda console: None)


def _lines(person: bool) -> Any:
    """Yield messages from the terminal, or the lines of standard input."""
    if not person:
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    from rich.console import Console

    console = Console(highlight=False)
    console.print(f"[dim]{HELP}    Ctrl-C  end an answer[/]")
    while True:
        try:
            text = console.input("[bold]> [/]").strip()
        except EOFError:
            return
        if text:
            yield text


def _compiled_so_far(model: PreTrainedModel) -> int:
    from river_compile.building.graph_record import Graphs
    from river_compile.record import find_record

    record = find_record(model)
    return 0 if record is None else record.of(Graphs).prepared


class Conversation:
    """Asks an accelerated model turn by turn. Without a chat template a turn does not see the earlier ones."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        by_cycle: bool,  # exact mode generates
        system: str,  # message, empty for none
        goes_on: bool = False,  # an interrupt ends the answer, not the conversation
        **options: Any,  # of generate
    ) -> None:
        from rich.console import Console

        self._model, self._tokenizer, self._by_cycle, self._options = model, tokenizer, by_cycle, options
        self._goes_on = goes_on
        self._first = [{"role": "system", "content": system}] if system else []
        self._messages: list[dict[str, str]] = [*self._first]
        self._console = Console(highlight=False, soft_wrap=True)
        self._latest: Painter | None = None
        self._compiled = False  # something was, for the latest answer

    def answer(self, text: str, quiet: bool = False) -> Painter:
        """Answer a message and stream the answer to the terminal."""
        import torch

        from river_compile.cli.painter import Painter
        from river_compile.cli.shared import encode_chat

        messages = [*self._messages, {"role": "user", "content": text}]
        ids = encode_chat(self._tokenizer, messages)
        limits = self._limits(ids.shape[1])
        self._messages = messages
        tokenizer = self._tokenizer
        painter = Painter(
            decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
            write=lambda piece, style: None if quiet else self._console.print(piece, style=style, end="", markup=False),
            by_cycle=self._by_cycle,
            blocks=self._model.config.get_text_config().num_hidden_layers,
        )
        before = _compiled_so_far(self._model)
        with painter.watching():
            try:
                self._model.generate(ids, attention_mask=torch.ones_like(ids), streamer=painter, **limits)
            except KeyboardInterrupt:
                if not self._goes_on:
                    raise
                painter.end()
        if not quiet:
            self._console.print()
        self._messages.append({"role": "assistant", "content": painter.text})
        self._latest, self._compiled = painter, _compiled_so_far(self._model) > before
        return painter

    def _limits(self, length: int) -> dict[str, Any]:
        """Return the options for a prompt of this length, whose answer ends with the model's context."""
        context = context_of(self._model)
        if context is None:
            return self._options
        if length >= context:
            raise ValueError(
                f"the conversation has {length} tokens, and the model's context {context}. "
                "Shorten the message; in a conversation, /reset begins a new one"
            )
        return {**self._options, "max_new_tokens": min(self._options["max_new_tokens"], context - length)}

    def command(self, text: str) -> bool:
        """Run a command; return False to end the conversation."""
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
        """Return the last answer's speed and the sources of its tokens."""
        if self._latest is None:
            return "no answer yet"
        speed = self._latest.tokens_per_s
        with_it = ", compiling included" if self._compiled else ""
        rate = "" if speed is None else f", {speed:.1f} tokens/s{with_it}"
        sources = ", ".join(f"{source} {count}" for source, count in self._latest.sources.items())
        return f"{len(self._latest.tokens)} tokens{rate}: {sources}"
