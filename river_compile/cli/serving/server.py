"""Starts the server in a thread: the model is loaded, accelerated, and has generated before it listens."""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
import uvicorn
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import Modality

from river_compile.api.accelerate import accelerate
from river_compile.api.mxfp4 import keeping_mxfp4
from river_compile.cli.serving import app, prompts
from river_compile.cli.serving.batches import State
from river_compile.cli.shared import loading
from river_compile.decoding.continuous import ContinuousBatch
from river_compile.decoding.kv_cache import bytes_per_token

_WARM_UP = 8  # tokens of a prompt, and after it


class Models(ModelManager):
    """Loads a model and accelerates it; it has generated, so that no client waits for its tracing."""

    def __init__(self, acceleration: dict[str, Any], max_num_seqs: int, **theirs: Any) -> None:
        self.acceleration, self.limit = acceleration, max_num_seqs
        super().__init__(**theirs)

    def _load_processor(self, name: str, *args: Any, **kwargs: Any) -> Any:
        with loading(name):
            return super()._load_processor(name, *args, **kwargs)

    def _load_model(self, name: str, *args: Any, **kwargs: Any) -> Any:
        elsewhere = None if torch.device(self.device).type == "cpu" else self.device
        with loading(name), keeping_mxfp4({"dtype": self.dtype, "device_map": elsewhere}):
            model = super()._load_model(name, *args, **kwargs)
        accelerate(model, **self.acceleration)
        prompt = torch.ones((1, _WARM_UP), dtype=torch.long, device=model.device)
        with ContinuousBatch(model, self.limit) as batch:
            length = {"max_new_tokens": _WARM_UP, "min_new_tokens": _WARM_UP}
            call = functools.partial(model.generate, prompt, do_sample=False, **length)
            for ended in [batch.submit(call) for _ in range(min(self.limit, 2))]:  # one row, and several
                ended.result()
        return model


class Server:
    """A server that runs in a thread.

    Args:
        folder: of the model, or its name on the hub.
        host: that it listens on.
        port: the same.
        dtype: of the weights, by name.
        device: of the model.
        max_num_seqs: requests that generate at the same time.
        queue: more requests that may wait.
        acceleration: arguments of `accelerate`.
        api_key: that clients must send; None: they need none.

    Raises:
        ValueError: the model cannot be loaded.
    """

    def __init__(
        self,
        folder: str,
        host: str,
        port: int,
        dtype: str,
        device: str,
        max_num_seqs: int,
        queue: int,
        acceleration: dict[str, Any],
        api_key: str | None,
    ) -> None:
        self._models = Models(acceleration, max_num_seqs, force_model=folder, dtype=dtype, device=device)
        (loaded,) = self._models.loaded_models.values()
        model, processor = loaded.model, loaded.processor
        prompts.bound(processor, model)
        self.kv_bytes_per_token = bytes_per_token(model)
        self.context = prompts.context_of(model)
        self.state = State(model, max_num_seqs, queue)
        only_text = self._models.get_model_modality(model, processor) is Modality.LLM
        served = app.build(self._models, self.state, prompts.most_bytes(model, only_text), host, api_key)
        self._uvicorn = uvicorn.Server(uvicorn.Config(served, host=host, port=port, log_level="info"))
        self._thread = threading.Thread(target=self._uvicorn.run, name="river server")
        self._thread.start()

    @property
    def started(self) -> bool:
        """Whether it listens, or has."""
        return self._uvicorn.started

    def stop(self) -> None:
        """Take no more requests, and end when the running ones have ended; return immediately."""
        self._uvicorn.should_exit = True

    def wait(self, timeout: float | None = None) -> None:
        """Wait until it has ended."""
        self._thread.join(timeout)

    def close(self) -> None:
        """End all answers, and the server."""
        self.state.shutdown()
        self._models.shutdown()
        self.stop()
        self.wait(2)
