"""Spans of a request's stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from baton.core.errors import BatonError
from baton.core.placement import Placement
from baton.rpc.telemetry import Telemetry

if TYPE_CHECKING:
    from opentelemetry.trace import Span


@dataclass(frozen=True, slots=True)
class StageSpans:
    """Makes spans of stages, as children of the request's RPC span."""

    telemetry: Telemetry

    @contextmanager
    def stage(
        self, name: str, attributes: Mapping[str, str | int | float | bool]
    ) -> Iterator[Span]:
        """A span that is current within; an error is noted on it."""
        outer = self.telemetry.current_context()
        span = self.telemetry.start_span(name, attributes=attributes)
        self.telemetry.set_current(self.telemetry.context_of(span))
        try:
            yield span
        except BatonError as error:
            span.set_attribute("error.type", error.reason.name)
            raise
        finally:
            self.telemetry.set_current(outer)
            span.end()


def placement_attributes(placement: Placement) -> Mapping[str, str | int | float]:
    """What a placement was decided on, for a span."""
    return {
        "baton.decision": placement.decision,
        "baton.reason": placement.reason,
        "baton.num_candidates": placement.num_candidates,
        "baton.decode_worker_id": placement.decode.worker_id,
        "baton.prefill_worker_id": (placement.prefill or placement.decode).worker_id,
        "baton.decode_cached_tokens": placement.decode_cached_tokens,
        "baton.prefill_cached_tokens": placement.prefill_cached_tokens,
        "baton.predicted_ttft_s": placement.predicted_ttft_s,
    }
