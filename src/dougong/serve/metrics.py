"""What `/metrics` tells, in Prometheus' words. No text and no key is ever a label."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_STEPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """The counters of one server, in a registry of their own."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        made: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("dougong_requests", "Requests answered", ["route", "status"], **made)
        self.left = Counter("dougong_clients_left", "Replies whose client left or took nothing", **made)
        self.prompt_tokens = Counter("dougong_prompt_tokens", "Tokens read", ["model"], **made)
        self.tokens = Counter("dougong_tokens", "Tokens written", ["model"], **made)
        self.first = Histogram("dougong_first_token_seconds", "From a request to its first token", ["model"],
                               buckets=_SECONDS, **made)
        self.whole = Histogram("dougong_reply_seconds", "From a request to its last token", ["model"],
                               buckets=_SECONDS, **made)
        self.step = Histogram("dougong_step_seconds", "One step of the scheduler", ["model"], buckets=_STEPS, **made)
        self._gauges = {name: Gauge(f"dougong_{name}", what, ["model"], **made) for name, what in (
            ("running", "Texts being written"), ("waiting", "Texts that wait for a row"),
            ("cached_tokens", "Tokens in the cache"), ("free_blocks", "Cache blocks that are free"),
            ("active", "Texts that clients wait for"))}

    def watch(self, model: str, runner: Any) -> None:
        """Reads a runner's state whenever the metrics are asked for."""
        for name, gauge in self._gauges.items():
            of = runner if name == "active" else runner.scheduler
            gauge.labels(model).set_function(lambda of=of, name=name: float(getattr(of, name, 0)))

    def text(self) -> bytes:
        return generate_latest(self.registry)
