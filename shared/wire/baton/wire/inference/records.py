"""A scheduler's records of its latest requests: times and counts, never a text."""

from __future__ import annotations

from dataclasses import dataclass

from baton.core.request import Stage
from baton.core.timeline import Track
from baton.v1 import inference_pb2 as pb2
from baton.wire.fields import as_message, as_value
from baton.wire.inference.chunks import (
    PlacementTaken,
    placement_from_pb,
    placement_to_pb,
    stage_from_pb,
    stage_to_pb,
)
from baton.wire.timing import seconds_from_pb, slice_to_pb, slices_from_pb


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


def query_to_pb(query: RecordQuery) -> pb2.ListRequestsRequest:
    """The wire's form."""
    return as_message(pb2.ListRequestsRequest, query)


def query_from_pb(pb: pb2.ListRequestsRequest) -> RecordQuery:
    """Which requests to list; not checked."""
    return as_value(RecordQuery, pb)


def requests_to_pb(found: RequestList) -> pb2.ListRequestsResponse:
    """The wire's form."""
    requests = [_record_to_pb(record) for record in found.requests]
    return as_message(pb2.ListRequestsResponse, found, requests=requests)


def requests_from_pb(pb: pb2.ListRequestsResponse) -> RequestList:
    """The records."""
    return as_value(RequestList, pb, requests=tuple(_record_from_pb(one) for one in pb.requests))


def _record_to_pb(record: RequestRecord) -> pb2.RequestRecord:
    return as_message(
        pb2.RequestRecord,
        record,
        placement=placement_to_pb(record.placement) if record.placement else None,
        stages=[stage_to_pb(stage) for stage in record.stages],
        tracks=[
            as_message(pb2.Track, track, slices=[slice_to_pb(part) for part in track.slices])
            for track in record.tracks
        ],
    )


def _record_from_pb(pb: pb2.RequestRecord) -> RequestRecord:
    return as_value(
        RequestRecord,
        pb,
        age_s=seconds_from_pb(pb.age),
        elapsed_s=seconds_from_pb(pb.elapsed),
        ttft_s=seconds_from_pb(pb.ttft) if pb.HasField("ttft") else None,
        placement=placement_from_pb(pb.placement) if pb.HasField("placement") else None,
        stages=tuple(stage_from_pb(stage) for stage in pb.stages),
        tracks=tuple(
            Track(track.name, track.worker_id, slices_from_pb("track.slices", track.slices))
            for track in pb.tracks
        ),
    )
