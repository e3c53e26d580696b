"""``river serve MODEL``: an OpenAI-compatible server that answers several clients at once.

Everything that speaks HTTP is transformers' (`transformers serve`); `serving.py` has what stands under it here.

Not handled: several models; a model that the server's clients choose.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from river_compile.cli.output import (
    AsJson,
    Calibration,
    Dtype,
    Model,
    Quality,
    Threads,
    Twins,
    show,
    use_threads,
)


def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "localhost",
    port: Annotated[int, typer.Option(help="Port to listen at.")] = 8000,
    rows: Annotated[int, typer.Option(help="Requests that generate at once.")] = 8,
    queue: Annotated[int, typer.Option(help="Requests more that may wait; those after them get 429.")] = 32,
    quality: Quality = "exact",
    calibration: Calibration = None,
    artifact: Twins = None,
    dtype: Dtype = "bfloat16",
    threads: Threads = 0,
    as_json: AsJson = False,
) -> None:
    """Serves a model to OpenAI clients, until it is interrupted. `--json` prints where, once it listens."""
    from river_compile.cli.models import config_of, quiet, resolve

    if rows < 1:
        raise ValueError(f"--rows {rows} is not allowed; give 1 or more")
    if queue < 0:
        raise ValueError(f"--queue {queue} is not allowed; give 0 (nobody waits) or more")
    use_threads(threads)
    quiet()
    folder = resolve(model)
    config_of(folder)
    more = {} if artifact is None else {"artifact": artifact}
    url = f"http://{host}:{port}/v1"
    result = {"model": model, "quality": quality, "url": url}
    server = make_server(folder, host, port, dtype, rows, queue, quality=quality, calibration=calibration, **more)
    show("serve", result, as_json, lambda console: console.print(f"serving [bold]{model}[/] ({quality}) at {url}"))
    try:
        server._thread.join()
    finally:
        server.kill_server()


def make_server(
    folder: str, host: str, port: int, dtype: str, rows: int = 8, queue: int = 32, **acceleration: Any
) -> Any:
    """Starts a server in a thread; returns it.

    Args:
        folder: the model's.
        host, port: where to listen.
        dtype: of the weights.
        rows: requests that generate at once.
        queue: requests more that may wait.
        acceleration: arguments of `accelerate`.

    Raises:
        ValueError: what it needs is not installed, or the model cannot be loaded.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        from river_compile.cli import serving
    except ImportError as error:
        raise ValueError(f'this needs more packages: pip install "river-compile[serve]" ({error})') from None
    return serving.start(folder, host, port, dtype, device, rows, queue, acceleration)
