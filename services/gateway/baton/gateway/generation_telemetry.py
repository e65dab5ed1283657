"""Metrics and span attributes of generations."""

from __future__ import annotations

import time
from collections.abc import Sequence

from opentelemetry.trace import Span

from baton.client import Completion
from baton.rpc.metrics import Metrics

TTFT_BUCKETS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
)  # fmt: skip
"""Source: OpenTelemetry's GenAI conventions, gen_ai.server.time_to_first_token."""


class GenerationMetrics:
    """Metrics over all generations."""

    def __init__(self, metrics: Metrics) -> None:
        self.ttft_s = metrics.histogram(
            "gateway_time_to_first_token_seconds",
            "Time from a request's arrival to its first token",
            ("model",),
            TTFT_BUCKETS_S,
        )


class GenerationTelemetry:
    """Records one generation in its span and in the metrics."""

    def __init__(self, metrics: GenerationMetrics, span: Span | None, started_s: float) -> None:
        self._metrics = metrics
        self._span = span
        self._started_s = started_s
        self._has_token = False

    def started(self, operation: str, model: str, *, is_stream: bool) -> None:
        """The request is valid; `operation` is a name of OpenTelemetry's GenAI conventions."""
        self._set({
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "baton",
            "gen_ai.request.model": model,
            "gen_ai.request.stream": is_stream,
        })

    def has_token(self, model: str) -> None:
        """A token arrived; only the first call counts."""
        if not self._has_token:
            self._has_token = True
            self._metrics.ttft_s.labels(model).observe(time.monotonic() - self._started_s)

    def ended(self, answers: Sequence[Completion]) -> None:
        """The generation ended, in success or failure."""
        self._set({
            "gen_ai.response.model": answers[0].model,
            "gen_ai.response.finish_reasons": [answer.finish_reason for answer in answers],
            "gen_ai.usage.input_tokens": sum(answer.usage.prompt_tokens for answer in answers),
            "gen_ai.usage.output_tokens": sum(answer.usage.completion_tokens for answer in answers),
        })

    def _set(self, attributes: dict[str, str | bool | int | list[str]]) -> None:
        if self._span is not None:
            self._span.set_attributes(attributes)
