"""Asks processes directly: where no scheduler answers, or to check what it says."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from baton.client.connection import Connection, default_tls
from baton.core.cluster import ServiceStatus
from baton.core.errors import BatonError
from baton.wire.probes import ask_path, ask_process

CALL_TIMEOUT_S = 3.0
MAX_CONCURRENT_CALLS = 16
_PATH_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class DirectAnswer:
    """A process's answer about itself."""

    status: ServiceStatus
    clock_offset_s: float | None
    """Its wall clock minus this process's; None where it does not say."""
    clock_error_s: float
    """How far off that can be: half of the time that the answer took."""


@dataclass(frozen=True, slots=True)
class MeasuredPath:
    """The path of KV from a prefill worker to a decode worker."""

    prefill_id: str
    decode_id: str
    bytes_per_s: float = 0.0
    round_trip_s: float = 0.0
    error: str = ""
    """Why it could not be measured."""


def ask_all(expected: Sequence[ServiceStatus]) -> list[DirectAnswer | None]:
    """Asks all at once; None for a process that does not answer, or has given way to another."""
    with ThreadPoolExecutor(MAX_CONCURRENT_CALLS) as pool:
        return list(pool.map(_ask, expected))


def measure_path(prefill: ServiceStatus, decode: ServiceStatus, num_bytes: int) -> MeasuredPath:
    """Makes a prefill worker send `num_bytes` to a decode worker."""
    ids, address = (prefill.worker_id, decode.worker_id), prefill.address
    with Connection(address, _PATH_TIMEOUT_S, tls=default_tls()).channel() as channel:
        try:
            path = ask_path(channel, address, decode.worker_id, num_bytes, _PATH_TIMEOUT_S)
        except BatonError as error:
            return MeasuredPath(*ids, error=f"{error.reason.name}: {error.message}")
    return MeasuredPath(*ids, path.num_bytes / max(1e-9, path.transfer_s), path.round_trip_s)


def _ask(expected: ServiceStatus) -> DirectAnswer | None:
    address = expected.address
    with Connection(address, CALL_TIMEOUT_S, tls=default_tls()).channel() as channel:
        try:
            ask_process(channel, address, CALL_TIMEOUT_S)  # connects
            asked_at_s = time.time()
            status, now_s = ask_process(channel, address, CALL_TIMEOUT_S)
            took_s = max(0.0, time.time() - asked_at_s)
        except BatonError:
            return None
    # Another worker may have got the address of one that is gone.
    if expected.worker_id and status.worker_id != expected.worker_id:
        return None
    offset_s = None if now_s is None else now_s - (asked_at_s + took_s / 2)
    return DirectAnswer(status, offset_s, took_s / 2)
