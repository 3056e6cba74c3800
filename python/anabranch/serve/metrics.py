"""Prometheus metrics, under the names that vLLM gives their like, with our own beside them."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from anabranch.records.result import Result

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """One server's."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        name = "anabranch:{}".format
        self.running = Gauge(name("num_requests_running"), "Prompts under way", registry=registry)
        self.waiting = Gauge(name("num_requests_waiting"), "Prompts that wait to begin", registry=registry)
        self.threads = Gauge(name("num_threads_running"), "Threads under way", registry=registry)
        self.cache = Gauge(name("kv_cache_usage_perc"), "Share of KV pages in use, 0 to 1", registry=registry)
        self.prompt_tokens = Counter(name("prompt_tokens"), "Tokens of prompts", registry=registry)
        self.generation_tokens = Counter(name("generation_tokens"), "Tokens written", registry=registry)
        self.queries = Counter(name("prefix_cache_queries"), "Prompt tokens looked up", registry=registry)
        self.hits = Counter(name("prefix_cache_hits"), "Prompt tokens found", registry=registry)
        self.forks = Counter(name("forks"), "Blocks of threads", registry=registry)
        self.pages_copied = Gauge(name("pages_copied"), "Pages copied on write so far", registry=registry)
        self.critical = Counter(name("critical_path_tokens"), "Tokens on critical paths", registry=registry)
        self.success = Counter(name("request_success"), "Answers", ["finished_reason"], registry=registry)
        self.failed = Counter(name("request_failure"), "Requests that got an error", ["status"], registry=registry)
        self.first = Histogram(
            name("time_to_first_token_seconds"), "Until the first token", registry=registry, buckets=_SECONDS
        )
        self.between = Histogram(
            name("inter_token_latency_seconds"), "Between a thread's tokens", registry=registry, buckets=_SECONDS
        )
        self.whole = Histogram(
            name("e2e_request_latency_seconds"), "Until the answer", registry=registry, buckets=_SECONDS
        )

    def answered(self, result: Result, reason: str) -> None:
        """Count one prompt's answer."""
        metrics = result.metrics
        self.success.labels(reason).inc()
        self.prompt_tokens.inc(metrics.prompt_tokens)
        self.generation_tokens.inc(metrics.total_tokens)
        self.queries.inc(metrics.prompt_tokens)
        self.hits.inc(metrics.cached_tokens)
        self.forks.inc(metrics.num_forks)
        self.critical.inc(metrics.critical_path_tokens)

    def text(self) -> bytes:
        """As Prometheus reads them."""
        return generate_latest(self._registry)
