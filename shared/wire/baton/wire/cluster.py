"""The state and load of a process on the wire."""

from __future__ import annotations

import math
from types import MappingProxyType

from baton.core.cluster import ServiceState, ServiceStatus
from baton.core.errors import InvalidRequest
from baton.core.roles import Role
from baton.v1 import inference_pb2
from baton.wire.layout import fingerprint_from_pb, fingerprint_to_pb
from baton.wire.timing import duration_from_pb, duration_to_pb, seconds_from_pb

MAX_NAME_CHARS = 256
_STATES = MappingProxyType({state.value: state for state in ServiceState})
_MAX_MODEL_LEN_STAT = "max_model_len_tokens"
"""On the wire, the longest context is one of the stats."""


def status_to_pb(status: ServiceStatus) -> inference_pb2.ServiceStatus:
    """The wire's form."""
    stats = dict(status.stats)
    if status.max_model_len_tokens:
        stats[_MAX_MODEL_LEN_STAT] = status.max_model_len_tokens
    return inference_pb2.ServiceStatus(
        worker_id=status.worker_id,
        role=status.role,
        address=status.address,
        state=status.state.value,
        # On the wire, a tokenizer's models stand in one text.
        model=status.model or ",".join(status.models),
        kv_blocks=status.kv_blocks,
        num_requests_running=status.num_requests_running,
        num_requests_waiting=status.num_requests_waiting,
        uptime=duration_to_pb(status.uptime_s),
        pid=status.pid,
        metrics_address=status.metrics_address,
        stats=stats,
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
    max_len = pb.stats.get(_MAX_MODEL_LEN_STAT, 0.0)
    is_tokenizer = pb.role == Role.TOKENIZER
    return ServiceStatus(
        worker_id=pb.worker_id,
        role=pb.role,
        address=pb.address,
        state=_STATES.get(pb.state, ServiceState.STARTING),
        model=pb.model,
        models=tuple(pb.model.split(",")) if is_tokenizer and pb.model else (),
        max_model_len_tokens=int(max_len) if math.isfinite(max_len) and max_len > 0.0 else 0,
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
