"""What `baton doctor` looks at: each process, its metrics, and the paths between workers."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from baton.cli.direct import (
    CALL_TIMEOUT_S,
    MAX_CONCURRENT_CALLS,
    DirectAnswer,
    MeasuredPath,
    ask_all,
    measure_path,
)
from baton.cli.leftovers import living
from baton.cli.plan import NATS_ROLE
from baton.cli.ports import is_listening
from baton.cli.rundir import run_directory
from baton.cli.status import cluster_status
from baton.core.cluster import ServiceState, ServiceStatus
from baton.core.roles import Role

_SAMPLE = re.compile(r'^(baton_kv_blocks|baton_bus_connected)(?:\{state="(\w+)"\})? (\S+)$', re.M)


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


def examine(address: str, num_probe_bytes: int) -> Examination:
    """Looks at a system.

    Raises:
        NoSystem: there is none to look at.
    """
    cluster = cluster_status(address)
    services = cluster.services
    first = ask_all(services)
    with ThreadPoolExecutor(MAX_CONCURRENT_CALLS) as pool:
        scrapes = list(pool.map(_scrape, services))
    paths = _measure_paths(services, first, num_probe_bytes)
    subjects = map(Subject, services, first, ask_all(services), scrapes)
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


def _scrape(service: ServiceStatus) -> Scrape | None:
    if not service.metrics_address or service.state is ServiceState.LOST:
        return None
    try:
        url = f"http://{service.metrics_address}/metrics"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=CALL_TIMEOUT_S) as response:
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
        measure_path(prefill, decode, num_bytes)
        for prefill in up
        for decode in up
        if (prefill.role, decode.role) == (Role.PREFILL, Role.DECODE)
        and prefill.model == decode.model
    ]
