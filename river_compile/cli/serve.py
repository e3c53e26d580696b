"""``river serve MODEL``: transformers' own OpenAI-compatible server with an accelerated model under it.

Everything that speaks HTTP is `transformers serve`: requests take turns on one thread, a client that goes away ends its
generation. One class of it is replaced while it starts: the one that loads models.

Not handled: `--continuous-batching`, whose scheduler does not call `generate`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from river_compile.cli.output import (
    Artifact,
    AsJson,
    Calibration,
    Dtype,
    Model,
    Quality,
    Threads,
    needs,
    show,
    use_threads,
)


def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "localhost",
    port: Annotated[int, typer.Option(help="Port to listen at.")] = 8000,
    quality: Quality = "exact",
    calibration: Calibration = None,
    artifact: Artifact = None,
    dtype: Dtype = "bfloat16",
    threads: Threads = 0,
    as_json: AsJson = False,
) -> None:
    """Serves a model to OpenAI clients, until it is interrupted. `--json` prints where, once it listens."""
    from river_compile.cli.models import config_of, quiet, resolve

    use_threads(threads)
    quiet()
    folder = resolve(model)
    config_of(folder)
    more = {} if artifact is None else {"artifact": artifact}
    url = f"http://{host}:{port}/v1"
    result = {"model": model, "quality": quality, "url": url}
    with accelerating(quality=quality, calibration=calibration, **more):
        server = make_server(str(folder), host, port, dtype)
    show("serve", result, as_json, lambda console: console.print(f"serving [bold]{model}[/] ({quality}) at {url}"))
    try:
        server._thread.join()
    finally:
        server.kill_server()


@contextlib.contextmanager
def accelerating(**arguments: Any) -> Iterator[None]:
    """Inside, `transformers serve` loads models that are accelerated with these arguments.

    Raises:
        ValueError: this release of transformers has no such server, or what it needs is not installed.
    """
    with needs("serve"):
        from transformers.cli.serving import model_manager

    from river_compile.api.accelerate import accelerate
    from river_compile.cli.models import loading

    class Manager(model_manager.ModelManager):
        def _load_processor(self, name: str, *args: Any, **kwargs: Any) -> Any:
            with loading(name):
                return super()._load_processor(name, *args, **kwargs)

        def _load_model(self, name: str, *args: Any, **kwargs: Any) -> Any:
            with loading(name):
                model = super()._load_model(name, *args, **kwargs)
            return accelerate(model, **arguments)

    theirs = model_manager.ModelManager
    model_manager.ModelManager = Manager
    try:
        yield
    finally:
        model_manager.ModelManager = theirs


def make_server(folder: str, host: str, port: int, dtype: str) -> Any:
    """Starts `transformers serve` in a thread; returns it.

    Raises:
        ValueError: what it needs is not installed, or the model cannot be loaded.
    """
    import torch
    from transformers.cli.serve import Serve

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with needs("serve"):
        return Serve(force_model=folder, host=host, port=port, dtype=dtype, device=device, non_blocking=True)
