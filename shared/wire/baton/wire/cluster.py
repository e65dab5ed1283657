"""What processes announce: status, measured speeds, changes of a prefix cache."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType

from google.protobuf.message import DecodeError

from baton.core.cluster import Announcement, ServiceState, ServiceStatus, WorkerRates
from baton.core.errors import InvalidRequest
from baton.v1 import control_pb2, inference_pb2
from baton.wire.layout import fingerprint_from_pb, fingerprint_to_pb, hashes_from_pb, in_range
from baton.wire.timing import duration_from_pb, duration_to_pb, seconds_from_pb

MAX_NAME_CHARS = 256
MAX_LEASE_S = 300.0
_STATES = MappingProxyType({state.value: state for state in ServiceState})


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


def status_to_pb(status: ServiceStatus) -> inference_pb2.ServiceStatus:
    """The wire's form."""
    return inference_pb2.ServiceStatus(
        worker_id=status.worker_id,
        role=status.role,
        address=status.address,
        state=status.state.value,
        model=status.model,
        kv_blocks=status.kv_blocks,
        num_requests_running=status.num_requests_running,
        num_requests_waiting=status.num_requests_waiting,
        uptime=duration_to_pb(status.uptime_s),
        pid=status.pid,
        metrics_address=status.metrics_address,
        stats=status.stats,
        version=status.version,
        fingerprint=fingerprint_to_pb(status.fingerprint) if status.fingerprint else None,
        cores=status.cores,
        store_id=status.store_id,
    )


def status_from_pb(pb: inference_pb2.ServiceStatus) -> ServiceStatus:
    """A process's state and load.

    Raises:
        InvalidRequest: it has no id, role or address, or its state is not known.
    """
    for name, text in (("worker_id", pb.worker_id), ("role", pb.role), ("address", pb.address)):
        if not 0 < len(text) <= MAX_NAME_CHARS:
            raise InvalidRequest(f"status.{name} must have 1 to {MAX_NAME_CHARS} characters")
    if pb.state not in _STATES:
        raise InvalidRequest(f"status.state must be one of {', '.join(_STATES)}")
    duration_from_pb(pb.uptime, "status.uptime")
    return _status_from_pb(pb)


def shown_status_from_pb(pb: inference_pb2.ServiceStatus) -> ServiceStatus:
    """A process's state and load, for display: nothing that a newer peer sends is refused."""
    try:
        return _status_from_pb(pb)
    except InvalidRequest:
        rest = inference_pb2.ServiceStatus()
        rest.CopyFrom(pb)
        rest.ClearField("fingerprint")
        return _status_from_pb(rest)


def _status_from_pb(pb: inference_pb2.ServiceStatus) -> ServiceStatus:
    return ServiceStatus(
        worker_id=pb.worker_id,
        role=pb.role,
        address=pb.address,
        state=_STATES.get(pb.state, ServiceState.STARTING),
        model=pb.model,
        fingerprint=fingerprint_from_pb(pb.fingerprint) if pb.HasField("fingerprint") else None,
        kv_blocks=MappingProxyType(dict(pb.kv_blocks)),
        num_requests_running=pb.num_requests_running,
        num_requests_waiting=pb.num_requests_waiting,
        uptime_s=seconds_from_pb(pb.uptime),
        pid=pb.pid,
        metrics_address=pb.metrics_address,
        stats=MappingProxyType(dict(pb.stats)),
        version=pb.version,
        cores=tuple(pb.cores),
        store_id=pb.store_id[:MAX_NAME_CHARS],
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
