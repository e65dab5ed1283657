"""What processes announce on the bus: status with measured speeds, and changes of prefix caches."""

from __future__ import annotations

import math
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from baton.core.cluster import Announcement, WorkerRates
from baton.core.errors import InvalidRequest
from baton.v1 import control_pb2
from baton.wire.cluster import MAX_NAME_CHARS, status_from_pb, status_to_pb
from baton.wire.layout import hashes_from_pb, in_range
from baton.wire.timing import duration_from_pb, duration_to_pb

MAX_LEASE_S = 300.0


@dataclass(frozen=True, slots=True)
class KvEvent:
    """A change of a worker's prefix cache. Mirrors baton.v1.KvEvent."""

    worker_id: str
    sequence: int
    """Counts from 1 without gaps, per boot."""
    stored: tuple[bytes, ...]
    removed: tuple[bytes, ...]


def rates_to_pb(rates: WorkerRates) -> control_pb2.WorkerRates:
    """The wire's form."""
    return control_pb2.WorkerRates(
        prefill_tokens_per_s=rates.prefill_tokens_per_s,
        decode_step_s=rates.decode_step_s,
        queued_prefill_tokens=rates.queued_prefill_tokens,
        push_bytes_per_s=rates.push_bytes_per_s,
        max_num_seqs=rates.max_num_seqs,
    )


def rates_from_pb(pb: control_pb2.WorkerRates) -> WorkerRates:
    """Measured speeds.

    Raises:
        InvalidRequest: one is negative or not a finite number.
    """
    return WorkerRates(
        prefill_tokens_per_s=_rate("prefill_tokens_per_s", pb.prefill_tokens_per_s),
        decode_step_s=_rate("decode_step_s", pb.decode_step_s),
        queued_prefill_tokens=pb.queued_prefill_tokens,
        push_bytes_per_s=_rate("push_bytes_per_s", pb.push_bytes_per_s),
        max_num_seqs=pb.max_num_seqs,
    )


def announcement_to_bytes(announcement: Announcement) -> bytes:
    """A serialized baton.v1.Announcement."""
    return control_pb2.Announcement(
        status=status_to_pb(announcement.status),
        lease=duration_to_pb(announcement.lease_s),
        leaving=announcement.leaving,
        rates=rates_to_pb(announcement.rates),
    ).SerializeToString()


def announcement_from_bytes(data: bytes) -> Announcement:
    """The announcement.

    Raises:
        InvalidRequest: not an announcement, or a value in it is out of range.
    """
    pb = control_pb2.Announcement()
    try:
        pb.ParseFromString(data)
    except DecodeError as error:
        raise InvalidRequest("announcement must be a baton.v1.Announcement") from error
    return Announcement(
        status=status_from_pb(pb.status),
        lease_s=duration_from_pb(pb.lease, "lease", max_s=MAX_LEASE_S),
        rates=rates_from_pb(pb.rates),
        leaving=pb.leaving,
    )


def kv_event_to_bytes(event: KvEvent) -> bytes:
    """A serialized baton.v1.KvEvent."""
    return control_pb2.KvEvent(
        worker_id=event.worker_id,
        sequence=event.sequence,
        stored=event.stored,
        removed=event.removed,
    ).SerializeToString()


def kv_event_from_bytes(data: bytes) -> KvEvent:
    """The event.

    Raises:
        InvalidRequest: not an event, no worker id, a sequence below 1, or a hash of a wrong size.
    """
    pb = control_pb2.KvEvent()
    try:
        pb.ParseFromString(data)
    except DecodeError as error:
        raise InvalidRequest("event must be a baton.v1.KvEvent") from error
    in_range("worker_id's length", len(pb.worker_id), 1, MAX_NAME_CHARS)
    in_range("sequence", pb.sequence, 1, 1 << 63)
    return KvEvent(
        worker_id=pb.worker_id,
        sequence=pb.sequence,
        stored=hashes_from_pb("stored", pb.stored),
        removed=hashes_from_pb("removed", pb.removed),
    )


def _rate(field: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0.0):
        raise InvalidRequest(f"rates.{field} must be a finite number >= 0, got {value:g}")
    return value
