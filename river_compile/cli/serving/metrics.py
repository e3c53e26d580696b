"""A server's metrics, in Prometheus' format; names are vLLM's after "river:" where it has one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.responses import Response

from river_compile.decoding.continuous import BatchCounters

# Fields of a batch's counters: name of the metric after "river:", and meaning.
_COUNTERS = {
    "calls": ("finished_requests", "Generate calls that have ended, successfully or not."),
    "drafted": ("spec_decode_num_draft_tokens", "Drafted tokens."),
    "accepted": ("spec_decode_num_accepted_tokens", "Accepted draft tokens."),
    "prompt_tokens": ("prompt_tokens", "Prompt tokens."),
    "prompt_tokens_kept": ("prefix_cache_hits", "Prompt tokens found in the prefix cache."),
    "busy_seconds": ("busy_seconds", "Time with at least one running request."),
}
_GAUGES = {
    "rows_in_use": ("num_requests_running", "Requests that generate now."),
    "queued": ("num_requests_waiting", "Requests that wait."),
}
_FIRST_TOKEN = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 15, 30, 60)


class Metrics:
    """A server's metrics in Prometheus' format; those of the batch are read when they are scraped."""

    def __init__(self, max_num_seqs: int, counters: Callable[[], BatchCounters]) -> None:
        self.limit, self.counters = max_num_seqs, counters
        self.registry = CollectorRegistry()  # the package's global one would mix the servers of a process
        labels = ("path", "status")
        self.requests = Counter(
            "river:http_requests", "HTTP requests by path and status.", labels, registry=self.registry
        )
        meaning = "Generated tokens; their rate is the throughput."
        self.tokens = Counter("river:generation_tokens", meaning, registry=self.registry)
        self.first_token = Histogram(
            "river:time_to_first_token_seconds",
            "Time from a request to its first token, waiting included.",
            buckets=_FIRST_TOKEN,
            registry=self.registry,
        )
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of the batch (the registry's interface)."""
        counters = self.counters()
        yield GaugeMetricFamily("river:max_num_seqs", "Requests that may generate at the same time.", value=self.limit)
        for names, family in ((_GAUGES, GaugeMetricFamily), (_COUNTERS, CounterMetricFamily)):
            for field, (name, meaning) in names.items():
                yield family(f"river:{name}", meaning, value=getattr(counters, field))

    def page(self) -> Response:
        """Return all of them."""
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)
