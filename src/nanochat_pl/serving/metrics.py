"""Figures for Prometheus: names and buckets of vLLM, with the prefix ``nanochat_``."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from nanochat_pl.serving.pool import Generation, Pool

_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1),
    *(2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
_BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_REQUEST = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
_LABELS = ("model_name", "engine")  # the model, and the number of the worker
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000)
_GAUGES = {
    "num_requests_running": ("running", "Requests that are generated."),
    "num_requests_waiting": ("waiting", "Requests that wait for a slot."),
    "kv_cache_usage_perc": ("cache_usage", "Share of the cache in use, 0 to 1."),
}
_COUNTERS = {
    "prompt_tokens": ("prompt_tokens", "Tokens of prompts."),
    "generation_tokens": ("generated_tokens", "Tokens that were generated."),
    "prefix_cache_queries": ("prompt_tokens", "Tokens of prompts that were looked up in the cache."),
    "prefix_cache_hits": ("cached_tokens", "Tokens of prompts that were in the cache."),
}


class _Intervals:
    """A histogram of the seconds between tokens. That of prometheus_client takes one at a time."""

    def __init__(self) -> None:
        self.seconds, self._counts = 0.0, [0] * (len(_BETWEEN_TOKENS) + 1)

    def add(self, seconds: float, count: int) -> None:
        """So many tokens in so many seconds."""
        self.seconds += seconds
        self._counts[bisect_left(_BETWEEN_TOKENS, seconds / count)] += count

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bounds, each with the number of intervals up to it."""
        bounds = [floatToGoString(each) for each in (*_BETWEEN_TOKENS, math.inf)]
        return list(zip(bounds, map(float, accumulate(self._counts)), strict=True))


class Metrics:
    """What is counted and timed of all requests.

    Args:
        pool: whose workers' figures are added.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool, self._last = pool, dict[Generation, tuple[float, int]]()  # when it was heard of, and its tokens
        self.registry = CollectorRegistry()
        self.registry.register(self)

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"nanochat_{name}", what, _LABELS, registry=self.registry, buckets=buckets)

        self._first = histogram("time_to_first_token_seconds", "From the request to the first token.", _FIRST_TOKEN)
        self._between: dict[tuple[str, str], _Intervals] = {}
        self._whole = histogram("e2e_request_latency_seconds", "From the request to its end.", _REQUEST)
        self._prompt = histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._answer = histogram("request_generation_tokens", "Tokens of an answer.", _TOKENS)
        self._success = Counter(
            "nanochat_request_success",
            "Requests that came to their end.",
            [*_LABELS, "finished_reason"],
            registry=self.registry,
        )

    def observe(self, generation: Generation, update: Mapping[str, Any]) -> None:
        """Take an update of a request down."""
        now, labels = time.monotonic(), (generation.model, str(generation.worker))
        before, tokens = self._last.get(generation), update.get("completion_tokens", 0)
        if before is None:
            self._first.labels(*labels).observe(now - generation.began)
            self._prompt.labels(*labels).observe(update.get("prompt_tokens", 0))
        elif tokens > before[1]:
            self._between.setdefault(labels, _Intervals()).add(now - before[0], tokens - before[1])
        self._last[generation] = now, tokens
        if "finish" in update:
            self._whole.labels(*labels).observe(now - generation.began)
            self._answer.labels(*labels).observe(update["completion_tokens"])
            self._success.labels(*labels, update["finish"]).inc()
            del self._last[generation]

    def forget(self, generation: Generation) -> None:
        """A request has ended before its end."""
        self._last.pop(generation, None)

    def collect(self) -> Iterator[Metric]:
        """The workers' own figures, for the registry."""
        for kind, names in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, (key, what) in names.items():
                family = kind(f"nanochat_{name}", what, labels=_LABELS)
                for worker in self._pool.workers:
                    family.add_metric([worker.model, str(worker.number)], worker.stats.get(key, 0))
                yield family
        between = HistogramMetricFamily("nanochat_inter_token_latency_seconds", "Between two tokens.", labels=_LABELS)
        for labels, intervals in self._between.items():
            between.add_metric(labels, intervals.buckets(), intervals.seconds)
        yield between

    def text(self) -> bytes:
        """All of it, in the form that Prometheus reads."""
        return generate_latest(self.registry)
