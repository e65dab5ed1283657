"""What a running system says: its scheduler, each process, their metrics, the paths of KV."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from baton.cli.leftovers import living
from baton.cli.plan import NATS_ROLE
from baton.cli.ports import is_listening
from baton.cli.rundir import SystemState, run_directory
from baton.cli.target import NoSystem, scheduler_address
from baton.client import BatonError, Client, ClusterStatus
from baton.client.connection import Connection, default_tls
from baton.core.cluster import ServiceState, ServiceStatus
from baton.core.roles import Role
from baton.wire.probes import ask_path, ask_process

_CALL_TIMEOUT_S = 3.0
_PATH_TIMEOUT_S = 30.0
_MAX_CONCURRENT_CALLS = 16
_SAMPLE = re.compile(r'^(baton_kv_blocks|baton_bus_connected)(?:\{state="(\w+)"\})? (\S+)$', re.M)


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


@dataclass(frozen=True, slots=True)
class Scrape:
    """What a process's Prometheus endpoint says."""

    kv_blocks: Mapping[str, int]
    is_bus_connected: bool | None


@dataclass(frozen=True, slots=True)
class Subject:
    """One process."""

    known: ServiceStatus
    """As the scheduler sees it."""
    own: DirectAnswer | None
    """None: it does not answer."""
    later: DirectAnswer | None
    """The same, asked again at the end."""
    scrape: Scrape | None
    """None: its metrics cannot be read."""


@dataclass(frozen=True, slots=True)
class Examination:
    """All that was seen."""

    is_bus_connected: bool
    """As the scheduler sees it."""
    subjects: tuple[Subject, ...] = ()
    paths: tuple[MeasuredPath, ...] = ()
    is_broker_listening: bool | None = None
    """Of the system that runs here; None without one, or where it uses a broker elsewhere."""
    leftover_pids: tuple[int, ...] = ()
    """Processes of a run here whose supervisor is gone."""


def cluster_status(address: str) -> ClusterStatus:
    """The scheduler's view, or, when it does not answer, each local process's own answer.

    Raises:
        NoSystem: neither answers.
    """
    target = scheduler_address(address)
    try:
        with Client(target, timeout_s=_CALL_TIMEOUT_S) as client:
            return client.status()
    except BatonError as error:
        state = run_directory().running()
        if address or state is None:
            raise NoSystem(
                f"the scheduler at {target} does not answer ({error.message}): is the address"
                " right, and does it run?"
            ) from error
        return _asked_directly(state)


def examine(address: str, num_probe_bytes: int) -> Examination:
    """Looks at a system.

    Raises:
        NoSystem: there is none to look at.
    """
    cluster = cluster_status(address)
    services = cluster.services
    first = _ask_all(services)
    with ThreadPoolExecutor(_MAX_CONCURRENT_CALLS) as pool:
        scrapes = list(pool.map(_scrape, services))
    paths = _measure_paths(services, first, num_probe_bytes)
    subjects = map(Subject, services, first, _ask_all(services), scrapes)
    state = None if address else run_directory().running()
    broker = state.process(NATS_ROLE) if state else None
    return Examination(
        is_bus_connected=cluster.bus_connected,
        subjects=tuple(subjects),
        paths=tuple(paths),
        is_broker_listening=is_listening(broker.address) if broker else None,
        leftover_pids=leftovers(),
    )


def leftovers() -> tuple[int, ...]:
    """Processes of the local system that outlived its supervisor."""
    run = run_directory()
    state = None if run.is_locked() else run.load()
    return tuple(living(state)) if state else ()


def parse_scrape(text: str) -> Scrape:
    """The figures of a Prometheus page that the doctor compares."""
    samples = [(name, label, float(value)) for name, label, value in _SAMPLE.findall(text)]
    buses = [value for name, _, value in samples if name == "baton_bus_connected"]
    return Scrape(
        kv_blocks={label: int(value) for name, label, value in samples if label},
        is_bus_connected=bool(buses[0]) if buses else None,
    )


def _asked_directly(state: SystemState) -> ClusterStatus:
    unknown = [
        ServiceStatus("", process.role, process.address, state=ServiceState.LOST)
        for process in state.processes
        if process.role != NATS_ROLE and process.address
    ]
    answers = zip(unknown, _ask_all(unknown), strict=True)
    bus = state.process(NATS_ROLE)
    return ClusterStatus(
        services=tuple(answer.status if answer else lost for lost, answer in answers),
        bus_connected=bus is not None and is_listening(bus.address),
    )


def _ask_all(expected: Sequence[ServiceStatus]) -> list[DirectAnswer | None]:
    """Asks all at once; None for a process that does not answer, or has given way to another."""
    with ThreadPoolExecutor(_MAX_CONCURRENT_CALLS) as pool:
        return list(pool.map(_ask, expected))


def _ask(expected: ServiceStatus) -> DirectAnswer | None:
    address = expected.address
    with Connection(address, _CALL_TIMEOUT_S, tls=default_tls()).channel() as channel:
        try:
            ask_process(channel, address, _CALL_TIMEOUT_S)  # connects
            asked_at_s = time.time()
            status, now_s = ask_process(channel, address, _CALL_TIMEOUT_S)
            took_s = max(0.0, time.time() - asked_at_s)
        except BatonError:
            return None
    # Another worker may have got the address of one that is gone.
    if expected.worker_id and status.worker_id != expected.worker_id:
        return None
    offset_s = None if now_s is None else now_s - (asked_at_s + took_s / 2)
    return DirectAnswer(status, offset_s, took_s / 2)


def _scrape(service: ServiceStatus) -> Scrape | None:
    if not service.metrics_address or service.state is ServiceState.LOST:
        return None
    try:
        url = f"http://{service.metrics_address}/metrics"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=_CALL_TIMEOUT_S) as response:
            text = response.read().decode("utf-8", errors="replace")
    except (OSError, ValueError):
        return None
    return parse_scrape(text)


def _measure_paths(
    services: Sequence[ServiceStatus], answers: Sequence[DirectAnswer | None], num_bytes: int
) -> list[MeasuredPath]:
    """Measures one path after another: together they would measure each other."""
    up = [service for service, answer in zip(services, answers, strict=True) if answer]
    return [
        _measure_path(prefill, decode, num_bytes)
        for prefill in up
        for decode in up
        if (prefill.role, decode.role) == (Role.PREFILL, Role.DECODE)
        and prefill.model == decode.model
    ]


def _measure_path(prefill: ServiceStatus, decode: ServiceStatus, num_bytes: int) -> MeasuredPath:
    """Makes a prefill worker send `num_bytes` to a decode worker."""
    ids, address = (prefill.worker_id, decode.worker_id), prefill.address
    with Connection(address, _PATH_TIMEOUT_S, tls=default_tls()).channel() as channel:
        try:
            path = ask_path(channel, address, decode.worker_id, num_bytes, _PATH_TIMEOUT_S)
        except BatonError as error:
            return MeasuredPath(*ids, error=f"{error.reason.name}: {error.message}")
    return MeasuredPath(*ids, path.num_bytes / max(1e-9, path.transfer_s), path.round_trip_s)
