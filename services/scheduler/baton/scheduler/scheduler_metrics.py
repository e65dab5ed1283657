"""The scheduler's metrics."""

from __future__ import annotations

from baton.rpc.metrics import Metrics

_TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 60)
_ITL_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)
_E2E_BUCKETS_S = (0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300, 600)


class SchedulerMetrics:
    """The scheduler's own metrics."""

    def __init__(self, metrics: Metrics) -> None:
        self.requests = metrics.counter("requests", "Requests that ended", ("status",))
        self.decisions = metrics.counter(
            "disagg_decisions", "Where prompts were computed, and why", ("decision", "reason")
        )
        self.retries = metrics.counter(
            "retries", "Attempts that failed and were repeated", ("stage",)
        )
        self.num_prompt_tokens = 0
        """Taken in, since the start."""
        self.num_output_tokens = 0
        """Sent to callers, since the start."""
        self._prompt_tokens = metrics.counter("prompt_tokens", "Prompt tokens taken in")
        self._generation_tokens = metrics.counter("generation_tokens", "Tokens sent to callers")
        self.ttft_s = metrics.histogram(
            "time_to_first_token_seconds",
            "From a request's arrival to its first token's text",
            buckets=_TTFT_BUCKETS_S,
        )
        self.itl_s = metrics.histogram(
            "inter_token_latency_seconds", "Between output tokens", buckets=_ITL_BUCKETS_S
        )
        self.e2e_s = metrics.histogram(
            "e2e_request_latency_seconds",
            "From a request's arrival to its end",
            buckets=_E2E_BUCKETS_S,
        )

    def took_in(self, num_tokens: int) -> None:
        """Counts a prompt."""
        self.num_prompt_tokens += num_tokens
        self._prompt_tokens.inc(num_tokens)

    def sent(self, num_tokens: int) -> None:
        """Counts output."""
        self.num_output_tokens += num_tokens
        self._generation_tokens.inc(num_tokens)
