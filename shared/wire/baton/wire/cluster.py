"""The state and load of a process on the wire."""

from __future__ import annotations

import math
from types import MappingProxyType

from baton.core.cluster import ServiceState, ServiceStatus
from baton.core.errors import InvalidRequest
from baton.core.roles import Role
from baton.v1 import inference_pb2
from baton.wire.fields import as_message, as_value
from baton.wire.layout import fingerprint_from_pb, fingerprint_to_pb
from baton.wire.timing import duration_from_pb, seconds_from_pb

MAX_NAME_CHARS = 256
_STATES = MappingProxyType({state.value: state for state in ServiceState})
_MAX_MODEL_LEN_STAT = "max_model_len_tokens"
"""On the wire, the longest context is one of the stats."""


def status_to_pb(status: ServiceStatus) -> inference_pb2.ServiceStatus:
    """The wire's form."""
    stats = dict(status.stats)
    if status.max_model_len_tokens:
        stats[_MAX_MODEL_LEN_STAT] = status.max_model_len_tokens
    return as_message(
        inference_pb2.ServiceStatus,
        status,
        state=status.state.value,
        # On the wire, a tokenizer's models stand in one text.
        model=status.model or ",".join(status.models),
        stats=stats,
        fingerprint=fingerprint_to_pb(status.fingerprint) if status.fingerprint else None,
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
    return as_value(
        ServiceStatus,
        pb,
        state=_STATES.get(pb.state, ServiceState.STARTING),
        models=tuple(pb.model.split(",")) if is_tokenizer and pb.model else (),
        max_model_len_tokens=int(max_len) if math.isfinite(max_len) and max_len > 0.0 else 0,
        fingerprint=fingerprint_from_pb(pb.fingerprint) if pb.HasField("fingerprint") else None,
        uptime_s=seconds_from_pb(pb.uptime),
        store_id=pb.store_id[:MAX_NAME_CHARS],
    )
