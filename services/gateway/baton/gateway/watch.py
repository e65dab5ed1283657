"""What is measured of one generation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import MappingProxyType

from opentelemetry.trace import Span

from baton.client import Completion
from baton.rpc.metrics import Metrics

TTFT_BUCKETS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
)  # fmt: skip
"""Source: OpenTelemetry's GenAI conventions, gen_ai.server.time_to_first_token."""
_OPERATIONS = MappingProxyType({"cmpl": "text_completion", "chatcmpl": "chat"})


class GenerationMetrics:
    """What is counted over all generations."""

    def __init__(self, metrics: Metrics) -> None:
        self.ttft_s = metrics.histogram(
            "gateway_time_to_first_token_seconds",
            "Time from a request's arrival to its first token",
            ("model",),
            TTFT_BUCKETS_S,
        )


class Watch:
    """Looks at one generation and tells its span and the metrics."""

    def __init__(self, metrics: GenerationMetrics, span: Span | None, started_s: float) -> None:
        self._metrics = metrics
        self._span = span
        self._started_s = started_s
        self._has_token = False

    def starts(self, prefix: str, model: str, *, is_stream: bool) -> None:
        """The request was understood."""
        self._set({
            "gen_ai.operation.name": _OPERATIONS[prefix],
            "gen_ai.provider.name": "baton",
            "gen_ai.request.model": model,
            "gen_ai.request.stream": is_stream,
        })

    def token(self, model: str) -> None:
        """There are tokens; the first call counts."""
        if not self._has_token:
            self._has_token = True
            self._metrics.ttft_s.labels(model).observe(time.monotonic() - self._started_s)

    def ended(self, answers: Sequence[Completion]) -> None:
        """All is over, well or not."""
        self._set({
            "gen_ai.response.model": answers[0].model,
            "gen_ai.response.finish_reasons": [answer.finish_reason for answer in answers],
            "gen_ai.usage.input_tokens": sum(answer.usage.prompt_tokens for answer in answers),
            "gen_ai.usage.output_tokens": sum(answer.usage.completion_tokens for answer in answers),
        })

    def _set(self, attributes: dict[str, str | bool | int | list[str]]) -> None:
        if self._span is not None:
            for key, value in attributes.items():
                self._span.set_attribute(key, value)
