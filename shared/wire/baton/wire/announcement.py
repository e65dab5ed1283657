"""What processes announce on the bus: status with measured speeds, and changes of prefix caches."""

from __future__ import annotations

import math
from dataclasses import dataclass

from baton.core.cluster import Announcement, WorkerRates
from baton.core.errors import InvalidRequest
from baton.v1 import control_pb2
from baton.wire.cluster import MAX_NAME_CHARS, status_from_pb, status_to_pb
from baton.wire.fields import as_message, as_value, parsed
from baton.wire.layout import hashes_from_pb, in_range
from baton.wire.timing import duration_from_pb

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
    return as_message(control_pb2.WorkerRates, rates)


def rates_from_pb(pb: control_pb2.WorkerRates) -> WorkerRates:
    """Measured speeds.

    Raises:
        InvalidRequest: one is negative or not a finite number.
    """
    for name in ("prefill_tokens_per_s", "decode_step_s", "push_bytes_per_s"):
        value = getattr(pb, name)
        if not (math.isfinite(value) and value >= 0.0):
            raise InvalidRequest(f"rates.{name} must be a finite number >= 0, got {value:g}")
    return as_value(WorkerRates, pb)


def announcement_to_bytes(announcement: Announcement) -> bytes:
    """A serialized baton.v1.Announcement."""
    return as_message(
        control_pb2.Announcement,
        announcement,
        status=status_to_pb(announcement.status),
        rates=rates_to_pb(announcement.rates),
    ).SerializeToString()


def announcement_from_bytes(data: bytes) -> Announcement:
    """The announcement.

    Raises:
        InvalidRequest: not an announcement, or a value in it is out of range.
    """
    pb = parsed(control_pb2.Announcement, data, "announcement")
    return Announcement(
        status=status_from_pb(pb.status),
        lease_s=duration_from_pb(pb.lease, "lease", max_s=MAX_LEASE_S),
        rates=rates_from_pb(pb.rates),
        leaving=pb.leaving,
    )


def kv_event_to_bytes(event: KvEvent) -> bytes:
    """A serialized baton.v1.KvEvent."""
    return as_message(control_pb2.KvEvent, event).SerializeToString()


def kv_event_from_bytes(data: bytes) -> KvEvent:
    """The event.

    Raises:
        InvalidRequest: not an event, no worker id, a sequence below 1, or a hash of a wrong size.
    """
    pb = parsed(control_pb2.KvEvent, data, "event")
    in_range("worker_id's length", len(pb.worker_id), 1, MAX_NAME_CHARS)
    in_range("sequence", pb.sequence, 1, 1 << 63)
    hashes_from_pb("stored", pb.stored)
    hashes_from_pb("removed", pb.removed)
    return as_value(KvEvent, pb)
