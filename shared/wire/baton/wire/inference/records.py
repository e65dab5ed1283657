"""What a scheduler remembers of its latest requests: times and counts, never a text."""

from __future__ import annotations

from dataclasses import dataclass

from baton.core.request import Stage
from baton.core.timeline import Track
from baton.v1 import inference_pb2
from baton.wire.inference.chunks import PlacementTaken, placement_from_pb, placement_to_pb
from baton.wire.timing import (
    duration_to_pb,
    seconds_from_pb,
    slice_to_pb,
    slices_from_pb,
    stage_from_pb,
    stage_to_pb,
)


@dataclass(frozen=True, slots=True)
class RecordQuery:
    """Which requests to list."""

    request_id: str = ""
    """Only this one, with its tracks; empty for the latest ones, without."""
    limit: int = 0
    """Most requests to list; 0 for all that are remembered."""
    tenant: str = ""
    """Only this tenant's, for gateways, which tell tenants apart themselves."""


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
    placement: PlacementTaken | None
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


def query_to_pb(query: RecordQuery) -> inference_pb2.ListRequestsRequest:
    """The wire's form."""
    return inference_pb2.ListRequestsRequest(
        request_id=query.request_id, limit=query.limit, tenant=query.tenant
    )


def query_from_pb(pb: inference_pb2.ListRequestsRequest) -> RecordQuery:
    """Which requests to list; not checked."""
    return RecordQuery(pb.request_id, pb.limit, pb.tenant)


def requests_to_pb(found: RequestList) -> inference_pb2.ListRequestsResponse:
    """The wire's form."""
    return inference_pb2.ListRequestsResponse(
        requests=[_record_to_pb(record) for record in found.requests],
        prompt_tokens=found.prompt_tokens,
        output_tokens=found.output_tokens,
    )


def requests_from_pb(pb: inference_pb2.ListRequestsResponse) -> RequestList:
    """The records."""
    return RequestList(
        requests=tuple(_record_from_pb(entry) for entry in pb.requests),
        prompt_tokens=pb.prompt_tokens,
        output_tokens=pb.output_tokens,
    )


def _record_to_pb(record: RequestRecord) -> inference_pb2.RequestRecord:
    return inference_pb2.RequestRecord(
        request_id=record.request_id,
        trace_id=record.trace_id,
        model=record.model,
        state=record.state,
        outcome=record.outcome,
        age=duration_to_pb(record.age_s),
        elapsed=duration_to_pb(record.elapsed_s),
        ttft=None if record.ttft_s is None else duration_to_pb(record.ttft_s),
        prompt_tokens=record.prompt_tokens,
        output_tokens=record.output_tokens,
        draft_tokens=record.draft_tokens,
        accepted_tokens=record.accepted_tokens,
        placement=placement_to_pb(record.placement) if record.placement else None,
        stages=[stage_to_pb(stage) for stage in record.stages],
        tracks=[
            inference_pb2.Track(
                name=track.name,
                worker_id=track.worker_id,
                slices=[slice_to_pb(part) for part in track.slices],
            )
            for track in record.tracks
        ],
    )


def _record_from_pb(pb: inference_pb2.RequestRecord) -> RequestRecord:
    return RequestRecord(
        request_id=pb.request_id,
        trace_id=pb.trace_id,
        model=pb.model,
        state=pb.state,
        outcome=pb.outcome,
        age_s=seconds_from_pb(pb.age),
        elapsed_s=seconds_from_pb(pb.elapsed),
        ttft_s=seconds_from_pb(pb.ttft) if pb.HasField("ttft") else None,
        prompt_tokens=pb.prompt_tokens,
        output_tokens=pb.output_tokens,
        draft_tokens=pb.draft_tokens,
        accepted_tokens=pb.accepted_tokens,
        placement=placement_from_pb(pb.placement) if pb.HasField("placement") else None,
        stages=tuple(stage_from_pb(stage) for stage in pb.stages),
        tracks=tuple(
            Track(track.name, track.worker_id, slices_from_pb("track.slices", track.slices))
            for track in pb.tracks
        ),
    )
