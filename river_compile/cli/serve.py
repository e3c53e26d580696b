"""``river serve MODEL``: an OpenAI-compatible server that answers several clients at the same time.

The server itself is :mod:`river_compile.cli.serving.server`. Not handled: several models, or one that clients choose.
"""

from __future__ import annotations

import errno
import functools
import re
import signal
import socket
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
    megabytes,
    show,
    use_threads,
)

if TYPE_CHECKING:
    from rich.console import Console

_KEY = "Key that clients must send; better in RIVER_COMPILE_API_KEY, because other users see arguments."


def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    max_num_seqs: Annotated[int, typer.Option(help="Maximum number of requests that generate at the same time.")] = 8,
    queue: Annotated[int, typer.Option(help="Maximum number of waiting requests; later ones get status 429.")] = 32,
    api_key: Annotated[str | None, typer.Option(help=_KEY, envvar="RIVER_COMPILE_API_KEY")] = None,
    quality: Quality = None,
    strict: Strict = False,
    calibration: Calibration = None,
    twins: Twins = None,
    assistant: Assistant = None,
    prefix_cache: PrefixCache = True,
    dtype: Dtype = "bfloat16",
    threads: Threads = 0,
    as_json: AsJson = False,
) -> None:
    """Serve a model over the OpenAI API until interrupted.

    SIGTERM stops new requests and lets running answers end. `--json` prints the address when the server listens.
    """
    from river_compile.cli.shared import config_of, load_assistant, quiet, resolve

    if max_num_seqs < 1:
        raise ValueError(f"--max-num-seqs {max_num_seqs} is not allowed; give 1 or more")
    if queue < 0:
        raise ValueError(f"--queue {queue} is not allowed; give 0 (no request waits) or more")
    if api_key is not None and not re.fullmatch(r"[!-~]+", api_key):
        raise ValueError("--api-key is empty, or has spaces or letters beyond ASCII; give printable ASCII characters")
    _check_address(host, port)
    use_threads(threads)
    quiet()
    folder = resolve(model)
    config_of(folder)
    acceleration = {"quality": quality, "strict": strict, "calibration": calibration, "twins": twins}
    acceleration |= {"prefix_cache": prefix_cache}
    acceleration |= load_assistant(assistant, dtype, _device())
    quality = quality or ("exact" if calibration is None else "fast")
    url = f"http://{host}:{port}/v1"
    result = {"model": model, "quality": quality, "url": url}
    server = make_server(folder, host, port, dtype, max_num_seqs, queue, api_key, **acceleration)
    result |= {"kv_bytes_per_token": server.kv_bytes_per_token, "context": server.context}
    show("serve", result, as_json, lambda console: _page(console, result, max_num_seqs))
    signal.signal(signal.SIGTERM, functools.partial(_stop, server))
    try:
        server.wait()
    finally:
        server.close()
    if not server.started:
        raise ValueError(f"the server could not listen at {url}; its log above says why")


def _page(console: Console, result: dict[str, Any], max_num_seqs: int) -> None:
    console.print(f"serving [bold]{result['model']}[/] ({result['quality']}) at {result['url']}")
    token, context = result["kv_bytes_per_token"], result["context"]
    if token:
        most = f", {megabytes(token * context)} at the context of {context:,} tokens" if context else ""
        clients = "1 client" if max_num_seqs == 1 else f"each of {max_num_seqs} clients"
        console.print(f"KV cache: {token / 1e3:.1f} kB a token of {clients}{most}")


def _stop(server: Any, *_: object) -> None:
    """Take no more requests, and end the server's thread when the running ones have ended."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends the process immediately
    server.stop()


def _check_address(host: str, port: int) -> None:
    """Raise a ValueError if the server could not listen there, before it loads a model."""
    try:
        for family, kind, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind) as tried:
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                tried.bind(address)
    except OSError as error:
        if isinstance(error, socket.gaierror) or error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise ValueError(f"--host {host} --port {port}: {error.strerror}; name another") from error


def make_server(
    folder: str,
    host: str,
    port: int,
    dtype: str,
    max_num_seqs: int = 8,
    queue: int = 32,
    api_key: str | None = None,
    **acceleration: Any,
) -> Any:
    """Start a server in a thread, with these arguments of `accelerate`; return it."""
    try:
        from river_compile.cli.serving.server import Server
    except ImportError as error:
        from river_compile.errors import OptionError

        fix = 'In the clone, run pip install ".[serve]"'
        raise OptionError(f"river serve requires more packages ({error}). {fix}", id="RC005") from None
    return Server(folder, host, port, dtype, _device(), max_num_seqs, queue, acceleration, api_key)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
