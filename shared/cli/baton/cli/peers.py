"""Asks processes about themselves, where no scheduler answers or its view needs a check."""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc

from baton.client.connection import Connection, default_tls
from baton.core.cluster import ServiceState, ServiceStatus
from baton.core.errors import BatonError
from baton.wire.probes import ask_path, ask_process

_MAX_CONCURRENT_CALLS = 16


@dataclass(frozen=True, slots=True)
class OwnWord:
    """A process's answer about itself."""

    status: ServiceStatus
    clock_offset_s: float | None
    """Its wall clock minus this process's; None where it does not say."""
    clock_error_s: float
    """How far off that can be: half of the time that the answer took."""


@dataclass(frozen=True, slots=True)
class PathFigures:
    """Speed of the path from a prefill to a decode worker."""

    bytes_per_s: float
    round_trip_s: float


def ask(address: str, timeout_s: float) -> OwnWord | None:
    """What a process says about itself; None when it does not answer."""
    with _channel(address, timeout_s) as channel:
        try:
            ask_process(channel, address, timeout_s)  # connects
            asked_at_s = time.time()
            status, now_s = ask_process(channel, address, timeout_s)
            took_s = max(0.0, time.time() - asked_at_s)
        except BatonError:
            return None
    offset_s = None if now_s is None else now_s - (asked_at_s + took_s / 2)
    return OwnWord(status, offset_s, took_s / 2)


def ask_all(addresses: Iterable[tuple[str, str]], timeout_s: float) -> list[ServiceStatus]:
    """The status of each (role, address), at once; "lost" for those that do not answer."""
    pairs = list(addresses)
    with ThreadPoolExecutor(_MAX_CONCURRENT_CALLS) as pool:
        words = pool.map(lambda pair: ask(pair[1], timeout_s), pairs)
        return [
            word.status if word else ServiceStatus("", role, address, state=ServiceState.LOST)
            for (role, address), word in zip(pairs, words, strict=True)
        ]


def measure_path(
    prefill_address: str, decode_worker_id: str, num_bytes: int, timeout_s: float
) -> PathFigures | str:
    """Measures the path between two workers; the reason where that fails."""
    with _channel(prefill_address, timeout_s) as channel:
        try:
            path = ask_path(channel, prefill_address, decode_worker_id, num_bytes, timeout_s)
        except BatonError as error:
            return f"{error.reason.name}: {error.message}"
    return PathFigures(path.num_bytes / max(1e-9, path.transfer_s), path.round_trip_s)


def _channel(address: str, timeout_s: float) -> grpc.Channel:
    return Connection(address, timeout_s, tls=default_tls()).channel()
