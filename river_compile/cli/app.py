"""The `river` command: the list of its commands, and the handling of their errors.

Nothing here or at the top of a command's module imports torch, so that ``river --help`` is there at once; a command
imports what it needs when it runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from river_compile import __version__
from river_compile.cli import bench, cache, calibrate, chat, check, doctor, explain, pack, serve
from river_compile.cli.output import FAILED, error_line

EPILOG = """Exit codes: **0** done; **1** it failed, with one line that says why; **2** wrong usage; **3** the answer is
no (`check`: nothing would be rewritten; `doctor`: something is wrong); **130** interrupted."""

app = typer.Typer(
    name="river",
    help="Faster generation with Hugging Face decoders: the plain model's text, drafted by 4-bit twins.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _tell_version(asked: bool) -> None:
    if asked:
        print(f"river {__version__}")
        raise typer.Exit


@app.callback()
def _river(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_tell_version, is_eager=True)
    ] = False,
) -> None:
    pass


app.command("check")(check.check)
app.command("doctor")(doctor.doctor)
app.command("bench")(bench.bench)
app.command("chat")(chat.chat)
app.command("pack")(pack.pack)
app.command("calibrate")(calibrate.calibrate)
app.command("explain")(explain.explain)
app.command("cache")(cache.cache)
app.command("serve")(serve.serve)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
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
