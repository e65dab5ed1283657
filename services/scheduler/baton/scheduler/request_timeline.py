"""When things happened to a request: its stages, their parts, and their spans."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from baton.core.clock import Clock
from baton.core.errors import BatonError
from baton.core.output import DecodeTimings, TokenBatch
from baton.core.placement import Placement
from baton.core.request import Part, Stage, StageLog
from baton.core.stages import StageName, TrackName
from baton.core.timeline import Slice, Slices, Track
from baton.rpc.telemetry import Telemetry
from baton.wire.prefill import FirstToken, PrefillDone, PrefillStarted

if TYPE_CHECKING:
    from opentelemetry.trace import Span


class RequestTimeline:
    """One request's stages and tracks over all its attempts, relative to its arrival."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.stages = StageLog(clock.now())
        self._tracks: dict[tuple[TrackName, str], Slices] = {}
        """By name and worker id."""

    @property
    def tracks(self) -> tuple[Track, ...]:
        """What the stages consisted of, up to now."""
        return tuple(
            Track(name, worker_id, tuple(slices))
            for (name, worker_id), slices in self._tracks.items()
        )

    def now_s(self) -> float:
        """Seconds since the request's arrival."""
        return self.stages.since_arrival(self._clock.now())

    def mark(self, name: StageName, *, worker_id: str = "", num_tokens: int = 0) -> None:
        """Ends the present stage. Does nothing after the first token."""
        self.stages.mark(name, self._clock.now(), worker_id=worker_id, num_tokens=num_tokens)

    def split(self, parts: Sequence[Part], worker_id: str) -> None:
        """Ends the present interval as the parts that a worker reported; RELAY is the rest."""
        self.stages.split(parts, StageName.RELAY, self._clock.now(), worker_id=worker_id)

    def first_token(self, name: StageName) -> None:
        """Ends the last stage before the first token; later calls do nothing."""
        self.stages.first_token(name, self._clock.now())

    def decoded(self, worker_id: str, num_tokens: int) -> None:
        """Ends the decode stage: from the first token, or from the worker's first step if later."""
        ends = [
            stage.start_s + stage.duration_s
            for stage in self.stages.stages
            if stage.name == StageName.FIRST_DECODE
        ]
        start_s = max([self.stages.ttft_s or 0.0, *ends])
        duration_s = max(0.0, self.now_s() - start_s)
        self.stages.add(
            Stage(StageName.DECODE, start_s, duration_s, worker_id=worker_id, num_tokens=num_tokens)
        )

    def extend(
        self, name: TrackName, worker_id: str, parts: Sequence[Slice], origin_s: float
    ) -> None:
        """Adds parts of a stage, whose times are relative to `origin_s`."""
        if parts:
            slices = self._tracks.setdefault((name, worker_id), Slices())
            for part in parts:
                slices.add(part.shifted(origin_s))


class AttemptTimeline:
    """Puts what one attempt's workers report on the request's timeline.

    A worker's times are relative to a message that the scheduler saw too: no clocks are compared.
    """

    def __init__(self, timeline: RequestTimeline, placement: Placement) -> None:
        self._timeline = timeline
        self._decode_id = placement.decode.worker_id
        self._prefill_id = placement.prefill.worker_id if placement.prefill else ""
        self._reserved_at_s = 0.0
        self._first_token_at_s = 0.0
        self._step_at_s: float | None = None

    def reserved(self) -> None:
        """Notes that Reserve was answered; a prefill starts at once."""
        self._timeline.mark(StageName.RESERVE, worker_id=self._decode_id)
        self._reserved_at_s = self._timeline.now_s()

    def prefilled(self, started: PrefillStarted, first: FirstToken, num_tokens: int) -> None:
        """Notes that a prefill worker computed the prompt."""
        self._first_token_at_s = self._timeline.now_s()
        parts = [
            Part(StageName.QUEUE, started.queue_s),
            Part(StageName.PREFILL, first.compute_s, num_tokens - started.cached_tokens),
        ]
        self._timeline.split(parts, self._prefill_id)
        origin_s = self._reserved_at_s + started.queue_s
        self._timeline.extend(TrackName.PREFILL_CHUNK, self._prefill_id, first.chunks, origin_s)

    def prefilled_locally(self, timings: DecodeTimings, num_tokens: int) -> None:
        """Notes that the decode worker computed the prompt itself."""
        parts = [
            Part(StageName.QUEUE, timings.wait_for_kv_s + timings.queue_s),
            Part(StageName.PREFILL, timings.first_step_s, num_tokens),
        ]
        self._timeline.split(parts, self._decode_id)

    def handed_off(self, done: PrefillDone) -> None:
        """Notes that the decode worker has all of the prompt's KV."""
        start_s = max(0.0, self._first_token_at_s + done.exposed_s - done.transfer_s)
        self._timeline.stages.add(
            Stage(
                StageName.HANDOFF,
                start_s,
                done.transfer_s,
                worker_id=self._decode_id,
                num_bytes=done.num_bytes,
                idle_s=done.idle_s,
            )
        )

    def first_decoded(self, batch: TokenBatch) -> None:
        """Notes the decode worker's first tokens after a hand-off."""
        if timings := batch.timings:
            spent_s = timings.queue_s + timings.first_step_s
            start_s = max(0.0, self._timeline.now_s() - spent_s)
            num_tokens = len(batch.token_ids)
            self._timeline.stages.add(
                Stage(
                    StageName.FIRST_DECODE,
                    start_s,
                    spent_s,
                    worker_id=self._decode_id,
                    num_tokens=num_tokens,
                )
            )

    def stepped(self, batch: TokenBatch) -> None:
        """Notes tokens from the decode worker."""
        now_s = self._timeline.now_s()
        if timings := batch.timings:
            self._timeline.extend(
                TrackName.KV_CHUNK, self._decode_id, timings.kv_chunks, self._reserved_at_s
            )
            if self._prefill_id:
                self._step_at_s = max(0.0, now_s - timings.first_step_s)
        # A local prefill's first step is the prompt's computation: a stage by itself.
        if self._step_at_s is not None and batch.token_ids:
            step = Slice(
                self._step_at_s,
                now_s,
                num_tokens=len(batch.token_ids),
                draft_tokens=batch.draft_tokens,
                accepted_tokens=batch.accepted_tokens,
            )
            self._timeline.extend(TrackName.DECODE_STEP, self._decode_id, (step,), 0.0)
        self._step_at_s = now_s


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
