"""The rows of `benchmarks.decode` that run a Hugging Face model, inside their worker process."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from benchmarks import common
from benchmarks.decode_rows import ACCELERATED, BOTH, FULL_DEPTH, SMALL
from river_compile.cli import shared
from tools import demo_models

_PLAIN = ("eager", "inductor")


class TorchRunner:
    """Generates with a model, with the cache that is usual for it, or a static one for a context's longest prompt."""

    # An assistant drafts as the job's "drafts" say.
    def __init__(self, model: Any, job: dict, assistant: Any = None) -> None:
        self.model, self.job, self._assistant, self._slots = model, job, assistant, 0

    def prepare(self, prompts: Sequence[Sequence[int]]) -> dict:
        """Compile, and warm up with each prompt; return the seconds from there to the first two new tokens."""
        start = time.perf_counter()
        layers = self.model.config.num_hidden_layers
        options = {k: layers if v == FULL_DEPTH else v for k, v in self.job["options"].items()}
        if self.job["backend"] == "inductor" and self.job["device"] == "cuda":
            options["triton.cudagraphs"] = True  # what mode="reduce-overhead" is
        if self.job.get("drafts") == SMALL:
            options["assistant_model"] = self._assistant
        if self.job["backend"] in ACCELERATED:
            import river_compile

            quality = ACCELERATED[self.job["backend"]]
            river_compile.accelerate(self.model, quality, background_packing=False, **options)
        elif self.job["backend"] != "eager":
            import torch._dynamo

            torch._dynamo.config.recompile_limit = 64  # a prompt's length and a cache's are a graph each
            backend = "river" if self.job["backend"] == "torch_compile" else self.job["backend"]
            self.model.compile(backend=backend, options=options)
        setup = time.perf_counter() - start
        first, second = self._generate(prompts[0], stop_after=2).times
        for number, prompt in enumerate(prompts):
            self._generate(prompt, None if number == 0 else 2)
        return {"first_token_s": setup + first, "second_token_s": setup + second}

    def generate(self, ids: Sequence[int], new_tokens: int) -> dict:
        """Generate after a prompt; return the new tokens, of a batch its first row's, and the seconds to each.

        Of exact mode also how many tokens each source drafted, and how many of the new ones came from it.
        """
        assert new_tokens == self.job["new_tokens"]
        if self.job["backend"] != "exact":
            made = self._generate(ids)
            return {"tokens": list(made.tokens), "times": list(made.times)}
        from river_compile.runtime.stats import CycleRecord, cycles

        seen: list[CycleRecord] = []
        with cycles.added(seen.append):
            made = self._generate(ids)
        return {
            "tokens": list(made.tokens),
            "times": list(made.times),
            "drafted": Counter(source for cycle in seen for source in cycle.drafted),
            "emitted": Counter(source for cycle in seen for source in cycle.emitted),
        }

    def facts(self, prompt: Sequence[int]) -> dict:
        """Return what one more generation tells, and the peak memory before it."""
        found: dict[str, Any] = {"peak_rss_bytes": common.peak_rss_bytes(), "outside_ms": None, "target_bits": None}
        found["mean_depth"] = float(self.model.config.num_hidden_layers)
        if self.job["device"] == "cuda":
            import torch

            found["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
            found["graph_skips"] = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
        if self.job["backend"] not in _PLAIN:
            import river_compile
            from river_compile.runtime.state import on_step

            inside: list[float] = []
            with river_compile.trace() as trace, on_step(lambda _, record: inside.append(record.seconds)):
                times = self._generate(prompt).times
            steps = inside[1:]  # (the prompt's is the first)
            found["outside_ms"] = 1e3 * (times[-1] - times[0] - sum(steps)) / (len(times) - 1)
            found["target_bits"] = target_bits(self.model, self.job["options"])
            if self.job["device"] == "cuda":
                found["captures"] = sum(graph.captures.made for graph in river_compile.report(self.model).graphs)
            if self.job["backend"] != "exact":
                found["mean_depth"] = trace.mean_depth
        return found

    def _generate(self, ids: Sequence[int], stop_after: int | None = None):
        import torch

        from river_compile.reporting.timing import generate

        static, new_tokens = self.job["backend"] in ("inductor", "torch_compile"), self.job["new_tokens"]
        prompt = torch.tensor([ids], device=self.job["device"]).repeat(self.job["batch"], 1)
        if not static:
            more = {"assistant_model": self._assistant} if self.job.get("drafts") == BOTH else {}
            return generate(self.model, prompt, new_tokens, static_cache=False, stop_after=stop_after, **more)
        slots = min(size for size in self.job["slots"] if size >= len(ids) + new_tokens)
        if slots != self._slots:
            vars(self.model).pop("_cache", None)  # transformers keeps a larger one, and attends to all of it
            self._slots = slots
        return generate(self.model, prompt, slots - len(ids), stop_after=stop_after or new_tokens)


def target_bits(model: Any, options: dict) -> int | None:
    """Return the bits of the weights that a model's full-depth passes read, by River's report; None if none ran."""
    import river_compile

    graphs: Any = river_compile.report(model).to_dict()["graphs"]
    if options.get("exit_depth") == 0 or all(graph["refusal"] for graph in graphs):
        return None
    return 12 if any(graph["lossless_bytes"] for graph in graphs if graph["kind"] != "prefill") else 16


_runners: list[TorchRunner] = []  # of a worker, one


def _prepare(prompts: list[list[int]], **job: Any) -> dict:
    import torch

    shared.quiet()
    torch.set_num_threads(job["threads"])
    folders = [job["folder"], *filter(None, [job.get("assistant")])]
    models = [demo_models.load(folder, dtype=job["dtype"])[0].to(job["device"]) for folder in folders]
    _runners.append(TorchRunner(models[0], job | {"first": prompts[0]}, *models[1:]))
    return _runners[0].prepare(prompts)


def serve() -> None:
    """Be the worker of a row."""

    def generate(ids: list[int], new_tokens: int) -> dict:
        return _runners[0].generate(ids, new_tokens)

    def facts() -> dict:
        return _runners[0].facts(_runners[0].job["first"])

    common.serve({"prepare": _prepare, "generate": generate, "facts": facts})
