"""What the scheduler remembers of its latest requests, as values of the SDK."""

from __future__ import annotations

from dataclasses import dataclass

from baton.client.messages import placement_from, seconds_from, stage_from
from baton.client.types import Placement
from baton.core.request import Stage
from baton.core.timeline import Slice, Track
from baton.v1 import common_pb2, inference_pb2


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """Where a request's time went; never its prompt or output."""

    request_id: str
    trace_id: str
    model: str
    state: str
    outcome: str
    """How it ended, such as `stop`, `length` or an error's reason; empty while it runs."""
    age_s: float
    """Since it arrived."""
    elapsed_s: float
    """From its arrival to its end, or to now while it runs."""
    ttft_s: float | None
    prompt_tokens: int
    output_tokens: int
    draft_tokens: int
    accepted_tokens: int
    placement: Placement | None
    stages: tuple[Stage, ...]
    tracks: tuple[Track, ...]
    """Only when one request was asked for."""


@dataclass(frozen=True, slots=True)
class RequestList:
    """The latest requests of a scheduler, and what it counted since it started."""

    requests: tuple[RequestRecord, ...]
    """The one that arrived last first."""
    prompt_tokens: int
    output_tokens: int


def list_requests_request(
    request_id: str, limit: int, tenant: str
) -> inference_pb2.ListRequestsRequest:
    """The request for records."""
    return inference_pb2.ListRequestsRequest(request_id=request_id, limit=limit, tenant=tenant)


def requests_from(message: inference_pb2.ListRequestsResponse) -> RequestList:
    """The records."""
    return RequestList(
        requests=tuple(_record(entry) for entry in message.requests),
        prompt_tokens=message.prompt_tokens,
        output_tokens=message.output_tokens,
    )


def _record(record: inference_pb2.RequestRecord) -> RequestRecord:
    return RequestRecord(
        request_id=record.request_id,
        trace_id=record.trace_id,
        model=record.model,
        state=record.state,
        outcome=record.outcome,
        age_s=seconds_from(record.age),
        elapsed_s=seconds_from(record.elapsed),
        ttft_s=seconds_from(record.ttft) if record.HasField("ttft") else None,
        prompt_tokens=record.prompt_tokens,
        output_tokens=record.output_tokens,
        draft_tokens=record.draft_tokens,
        accepted_tokens=record.accepted_tokens,
        placement=placement_from(record.placement) if record.HasField("placement") else None,
        stages=tuple(stage_from(stage) for stage in record.stages),
        tracks=tuple(
            Track(track.name, track.worker_id, tuple(_slice(part) for part in track.slices))
            for track in record.tracks
        ),
    )


def _slice(part: common_pb2.StageSlice) -> Slice:
    start_s = seconds_from(part.start)
    return Slice(
        start_s=start_s,
        end_s=start_s + seconds_from(part.duration),
        num_parts=part.parts,
        num_tokens=part.tokens,
        num_bytes=part.bytes,
        draft_tokens=part.draft_tokens,
        accepted_tokens=part.accepted_tokens,
    )
