"""What `/metrics` says, in Prometheus' format."""

import time
from collections import deque

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_LATE_S = 60  # within which answers ended of late
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)


class Metrics:
    """Counts of one service."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.waiting = Gauge("herd_requests_waiting", "Answers that have not begun.", registry=registry)
        self.running = Gauge("herd_requests_running", "Answers that are being given.", registry=registry)
        self.kv_bytes = Gauge(
            "herd_kv_bytes", "Keys and values set aside, besides those of contexts.", registry=registry
        )
        self.kv_limit = Gauge("herd_kv_bytes_limit", "Keys and values that may be set aside.", registry=registry)
        self.context_tokens = Gauge("herd_context_tokens", "Tokens of all contexts.", registry=registry)
        self.replicas = Gauge("herd_replicas", "Replicas that answer, and that should.", ["state"], registry=registry)
        self._answers = Counter("herd_answers", "Answers, by how they ended.", ["finish"], registry=registry)
        self._prompt = Counter("herd_prompt_tokens", "Tokens of prompts.", registry=registry)
        self._cached = Counter("herd_cached_tokens", "Tokens of prompts that had been seen before.", registry=registry)
        self._generated = Counter("herd_generated_tokens", "Tokens of answers.", registry=registry)
        self._first = Histogram(
            "herd_time_to_first_token_seconds",
            "From the request to its first token.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._whole = Histogram(
            "herd_request_seconds", "From the request to its last token.", buckets=_SECONDS, registry=registry
        )
        self._ends: deque[float] = deque(maxlen=64)  # when the last answers ended
        self._refused = Counter("herd_refused", "Requests refused, by status.", ["status"], registry=registry)

    def said(self, tokens: int) -> None:
        """Count tokens of answers."""
        self._generated.inc(tokens)

    def ended(self, prompt: int, cached: int, finish: str | None) -> None:
        """Count an answer; finish None: it ended by an error."""
        self._answers.labels(finish or "error").inc()
        self._ends.append(time.monotonic())
        self._prompt.inc(prompt)
        self._cached.inc(cached)

    def seconds_each(self) -> float | None:
        """Between the ends of two answers of late; None if hardly any ended."""
        now = time.monotonic()
        late = [end for end in tuple(self._ends) if now - end < _LATE_S]
        return (now - late[0]) / (len(late) - 1) if len(late) > 1 else None

    def took(self, first: float | None, whole: float) -> None:
        """Seconds to the first and last token of an answer."""
        if first is not None:
            self._first.observe(first)
        self._whole.observe(whole)

    def refused(self, status: int) -> None:
        """Count a request that was answered with an error."""
        self._refused.labels(str(status)).inc()

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self._registry)
