"""A request while it is in the scheduler, and what counts it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from baton.core.errors import BatonError, DeadlineExceeded
from baton.core.placement import SHARED_PROMPT, Placement
from baton.core.request import RequestState, StageLog
from baton.core.sampling import FinishReason, SamplingParams
from baton.core.timeline import Slices
from baton.rpc.metrics import Metrics
from baton.rpc.telemetry import Telemetry
from baton.scheduler.messages import GenerateJob, PlacementTaken, WorkOrder

if TYPE_CHECKING:
    from opentelemetry.trace import Span

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


class LiveRequest:
    """One accepted request's state, clock, stages and output so far."""

    def __init__(
        self, job: GenerateJob, clock: Callable[[], float], timeout_s: float, model: str
    ) -> None:
        self.job = job
        self.model = model
        self.clock = clock
        now = clock()
        self.deadline_s = now + timeout_s
        self.timeout_s = timeout_s
        self.state = RequestState(job.request_id, now)
        self.stages = StageLog(now)
        self.sampling: SamplingParams = job.sampling
        """With seed and max_tokens filled in once the prompt is known."""
        self.prompt_ids: tuple[int, ...] = ()
        self.output_ids: list[int] = list(job.output_ids)
        """Tokens that went to the caller: what a fail-over continues from."""
        self.digest = job.output_digest
        """Fingerprint of what computes the output; empty before that is known."""
        self.draft_tokens = 0
        self.accepted_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.trace_id = ""
        self.placement: PlacementTaken | None = None
        self.tracks: dict[tuple[str, str], Slices] = {}
        """What the stages consisted of, relative to the arrival, by name and worker id."""
        self.origin: LiveRequest | None = None
        """Running request with the same prompt; None once its KV was asked for."""
        self.has_prompt = asyncio.Event()
        """Set when the prompt's KV is at `home`, or will be nowhere."""
        self.home = ""
        """Decode worker that has the prompt's KV."""
        self.attempts = 0
        """Tries that got a placement and did not end for lack of room."""

    @property
    def request_id(self) -> str:
        """Id of the request."""
        return self.job.request_id

    def remaining_s(self) -> float:
        """Time left.

        Raises:
            DeadlineExceeded: none.
        """
        left_s = self.deadline_s - self.clock()
        if left_s <= 0:
            raise self.late()
        return left_s

    def late(self) -> DeadlineExceeded:
        """The error of a request whose time is over."""
        return DeadlineExceeded(
            f"the request did not finish within {self.timeout_s:.1f} s; it had produced"
            f" {len(self.output_ids)} tokens"
        )

    @property
    def is_complete(self) -> bool:
        """True when the limit was reached, though the worker may have died before it said so."""
        most = self.sampling.max_tokens
        return most is not None and len(self.output_ids) >= most

    @property
    def pinned_digest(self) -> bytes:
        """Fingerprint that the next attempt's workers must have; empty for any."""
        return self.digest if self.output_ids else b""

    def prompt_computed(self, worker_id: str) -> None:
        """The prompt's KV is at a decode worker: requests that share it may go there."""
        self.home = worker_id
        self.has_prompt.set()

    def order(self, placement: Placement) -> WorkOrder:
        """What the present attempt asks of its workers."""
        fingerprint = placement.decode.status.fingerprint
        if fingerprint is not None and not self.pinned_digest:
            self.digest = fingerprint.digest()
        return WorkOrder(
            request_id=self.request_id,
            attempt=self.state.attempt,
            token_ids=(*self.prompt_ids, *self.output_ids),
            num_output_tokens=len(self.output_ids),
            sampling=self.sampling,
            fingerprint=fingerprint,
            priority=self.job.priority,
            cache_salt=self.job.cache_salt,
            fork_of=self.job.fork_of if placement.reason == SHARED_PROMPT else "",
        )


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
