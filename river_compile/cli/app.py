"""The `river` command: the list of its commands, and how errors end them.

Neither this module nor the top of a command's module imports torch, so ``river --help`` answers immediately.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from river_compile.cli import bench, chat, commands, explain, explain_error, serve
from river_compile.cli.shared import FAILED, error_line
from river_compile.version import __version__

EPILOG = """Exit codes: **0** done; **1** it failed, with one line that says why; **2** wrong usage; **3** the answer is
no (`check`: unsupported; `doctor`: something is broken); **130** interrupted."""

app = typer.Typer(
    name="river",
    help="Faster generation with Hugging Face decoders: 4-bit twins draft, your weights verify.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"river {__version__}")
        raise typer.Exit


@app.callback()
def _river(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


for command in (
    commands.check,
    commands.doctor,
    bench.bench,
    chat.chat,
    commands.quantize,
    commands.tune,
    explain.explain,
    explain_error.explain_error,
    commands.cache,
    serve.serve,
):
    app.command(command.__name__.replace("_", "-"))(command)


def _open_streams() -> None:
    """Open standard streams that the caller closed, so that nothing prints into a file with the number of one."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (it stays open)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    _open_streams()
    if os.environ.get("COLUMNS") == "0":  # of a terminal without a size; rich would print nothing
        del os.environ["COLUMNS"]
    try:
        app(args=None if arguments is None else list(arguments), prog_name="river")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else FAILED
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error_line(error)}", file=sys.stderr)
        return FAILED
    return 0
