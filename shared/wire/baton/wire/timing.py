"""Durations and slices of stages on the wire."""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.duration_pb2 import Duration

from baton.core.errors import InvalidRequest
from baton.core.timeline import MAX_SLICES, Slice
from baton.v1 import common_pb2

MAX_DURATION_S = 365 * 24 * 3600.0


def duration_to_pb(seconds: float) -> Duration:
    """A duration on the wire, to the nanosecond; below 0 (a clock's noise) becomes 0."""
    nanos = round(max(0.0, seconds) * 1e9)
    return Duration(seconds=nanos // 1_000_000_000, nanos=nanos % 1_000_000_000)


def duration_from_pb(
    pb: Duration, field: str = "duration", *, max_s: float = MAX_DURATION_S
) -> float:
    """Seconds.

    Raises:
        InvalidRequest: it is negative or longer than `max_s`, a year if not said otherwise.
    """
    seconds = pb.seconds + pb.nanos / 1e9
    if not 0.0 <= seconds <= max_s:
        raise InvalidRequest(f"{field} must be in [0, {max_s:.0f}] s, got {seconds:g} s")
    return seconds


def seconds_from_pb(pb: Duration) -> float:
    """Seconds, not checked."""
    return pb.seconds + pb.nanos / 1e9


def slice_to_pb(part: Slice) -> common_pb2.StageSlice:
    """The wire's form."""
    return common_pb2.StageSlice(
        start=duration_to_pb(part.start_s),
        duration=duration_to_pb(part.end_s - part.start_s),
        parts=part.num_parts,
        tokens=part.num_tokens,
        bytes=part.num_bytes,
        draft_tokens=part.draft_tokens,
        accepted_tokens=part.accepted_tokens,
    )


def slices_from_pb(field: str, slices: Iterable[common_pb2.StageSlice]) -> tuple[Slice, ...]:
    """The slices of one stage.

    Raises:
        InvalidRequest: they are too many, or one has no proper times.
    """
    found = tuple(_slice_from_pb(field, pb) for pb in slices)
    if len(found) > MAX_SLICES:
        raise InvalidRequest(f"{field} must have at most {MAX_SLICES} entries, got {len(found)}")
    return found


def _slice_from_pb(field: str, pb: common_pb2.StageSlice) -> Slice:
    start_s = duration_from_pb(pb.start, field)
    return Slice(
        start_s=start_s,
        end_s=start_s + duration_from_pb(pb.duration, field),
        num_parts=pb.parts,
        num_tokens=pb.tokens,
        num_bytes=pb.bytes,
        draft_tokens=pb.draft_tokens,
        accepted_tokens=pb.accepted_tokens,
    )
