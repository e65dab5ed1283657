"""Blocking questions of the command line to one process: its status, its path to a peer."""

from __future__ import annotations

import grpc

from baton.core.cluster import ServiceStatus
from baton.v1 import control_pb2, control_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from baton.wire.cluster import shown_status_from_pb
from baton.wire.errors import CallErrors
from baton.wire.fields import as_value
from baton.wire.prefill import PathMeasurement


def ask_process(
    channel: grpc.Channel, address: str, timeout_s: float
) -> tuple[ServiceStatus, float | None]:
    """A process's status, and the seconds since the epoch on its own clock, if it says them.

    Raises:
        BatonError: the process does not answer.
    """
    stub = control_pb2_grpc.ControlServiceStub(channel)
    with CallErrors(address):
        pb = stub.GetStatus(control_pb2.GetStatusRequest(), timeout=timeout_s)
    now_s = pb.now.ToNanoseconds() / 1e9 if pb.HasField("now") else None
    return shown_status_from_pb(pb.status), now_s


def ask_path(
    channel: grpc.Channel, address: str, decode_worker_id: str, num_bytes: int, timeout_s: float
) -> PathMeasurement:
    """Makes the prefill worker at `address` send bytes to a decode worker.

    Raises:
        BatonError: the prefill worker does not answer, or cannot reach the other.
    """
    stub = prefill_pb2_grpc.PrefillServiceStub(channel)
    request = prefill_pb2.MeasurePathRequest(decode_worker_id=decode_worker_id, num_bytes=num_bytes)
    with CallErrors(address):
        pb = stub.MeasurePath(request, timeout=timeout_s)
    return as_value(PathMeasurement, pb)
