"""Stages and their slices between protobuf and core's values."""

from __future__ import annotations

from collections.abc import Iterable

from baton.core.errors import InvalidRequest
from baton.core.request import Stage
from baton.core.timeline import MAX_SLICES, Slice
from baton.rpc.convert import duration_from_pb, duration_to_pb
from baton.v1 import common_pb2


def stage_to_pb(stage: Stage) -> common_pb2.StageTiming:
    """The wire's form."""
    return common_pb2.StageTiming(
        stage=stage.name,
        start=duration_to_pb(stage.start_s),
        duration=duration_to_pb(stage.duration_s),
        before_first_token=stage.before_first_token,
        worker_id=stage.worker_id,
        bytes=stage.num_bytes,
        idle=duration_to_pb(stage.idle_s),
        tokens=stage.num_tokens,
    )


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
