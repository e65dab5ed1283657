"""What processes say about themselves: for when there is no scheduler to ask, or no trust."""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc

from baton.client.connection import Connection, default_tls
from baton.core.cluster import ServiceState, ServiceStatus
from baton.v1 import (
    control_pb2,
    control_pb2_grpc,
    prefill_pb2,
    prefill_pb2_grpc,
)
from baton.wire.cluster import shown_status_from_pb
from baton.wire.timing import seconds_from_pb

_MAX_CONCURRENT_CALLS = 16


@dataclass(frozen=True, slots=True)
class OwnWord:
    """A process's answer about itself."""

    status: ServiceStatus
    clock_offset_s: float | None
    """Its wall clock minus this process's; None where it does not tell."""
    clock_error_s: float
    """How far off that can be: half of the time that the answer took."""


@dataclass(frozen=True, slots=True)
class PathFigures:
    """What the way from a prefill to a decode worker is like."""

    bytes_per_s: float
    round_trip_s: float


def ask(address: str, timeout_s: float) -> OwnWord | None:
    """What a process says about itself; None when it does not answer."""
    with _channel(address, timeout_s) as channel:
        stub = control_pb2_grpc.ControlServiceStub(channel)
        try:
            stub.GetStatus(control_pb2.GetStatusRequest(), timeout=timeout_s)  # connects
            asked_at_s = time.time()
            answer = stub.GetStatus(control_pb2.GetStatusRequest(), timeout=timeout_s)
            took_s = max(0.0, time.time() - asked_at_s)
        except grpc.RpcError:
            return None
    offset_s = None
    if answer.HasField("now"):
        offset_s = answer.now.ToNanoseconds() / 1e9 - (asked_at_s + took_s / 2)
    return OwnWord(shown_status_from_pb(answer.status), offset_s, took_s / 2)


def ask_status(address: str, timeout_s: float) -> ServiceStatus | None:
    """A process's own status; None when it does not answer."""
    word = ask(address, timeout_s)
    return word.status if word is not None else None


def ask_all(addresses: Iterable[tuple[str, str]], timeout_s: float) -> list[ServiceStatus]:
    """The status of each (role, address), at once; "lost" for those that do not answer."""
    pairs = list(addresses)
    with ThreadPoolExecutor(_MAX_CONCURRENT_CALLS) as pool:
        answers = pool.map(lambda pair: ask_status(pair[1], timeout_s), pairs)
        return [
            answer
            or ServiceStatus(worker_id="", role=role, address=address, state=ServiceState.LOST)
            for (role, address), answer in zip(pairs, answers, strict=True)
        ]


def measure_path(
    prefill_address: str, decode_worker_id: str, num_bytes: int, timeout_s: float
) -> PathFigures | str:
    """Has a prefill worker send bytes to a decode worker; the reason where that fails."""
    request = prefill_pb2.MeasurePathRequest(decode_worker_id=decode_worker_id, num_bytes=num_bytes)
    with _channel(prefill_address, timeout_s) as channel:
        stub = prefill_pb2_grpc.PrefillServiceStub(channel)
        try:
            answer = stub.MeasurePath(request, timeout=timeout_s)
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    transfer_s, round_trip_s = seconds_from_pb(answer.transfer), seconds_from_pb(answer.round_trip)
    return PathFigures(answer.num_bytes / max(1e-9, transfer_s), round_trip_s)


def _channel(address: str, timeout_s: float) -> grpc.Channel:
    return Connection(address, timeout_s, tls=default_tls()).channel()
