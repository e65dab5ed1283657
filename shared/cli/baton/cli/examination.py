"""What `baton doctor` looks at: each process, its metrics, and the paths between workers."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from baton.cli.leftovers import living
from baton.cli.peers import OwnWord, PathFigures, ask, measure_path
from baton.cli.plan import NATS_ROLE
from baton.cli.ports import is_listening
from baton.cli.rundir import RunDirectory
from baton.cli.status import cluster_status
from baton.core.cluster import ServiceState, ServiceStatus
from baton.core.roles import Role

_CALL_TIMEOUT_S = 3.0
_PROBE_TIMEOUT_S = 30.0
_MAX_CONCURRENT_CALLS = 16
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
    own: OwnWord | None
    """None: it does not answer."""
    later: OwnWord | None
    """The same, asked again at the end."""
    scrape: Scrape | None
    """None: its metrics cannot be read."""


@dataclass(frozen=True, slots=True)
class MeasuredPath:
    """The path of KV from one worker to another."""

    prefill_id: str
    decode_id: str
    result: PathFigures | str
    """A reason where it could not be measured."""


@dataclass(frozen=True, slots=True)
class Examination:
    """All that was seen."""

    is_bus_connected: bool
    """As the scheduler sees it."""
    subjects: tuple[Subject, ...] = ()
    paths: tuple[MeasuredPath, ...] = ()
    is_broker_listening: bool | None = None
    """Of the system that runs here; None without one, or where it has no broker of its own."""
    leftover_pids: tuple[int, ...] = ()
    """Processes of a run here whose supervisor is gone."""


def examine(address: str, run: RunDirectory, num_probe_bytes: int) -> Examination:
    """Looks at a system.

    Raises:
        NoSystem: there is none to look at.
    """
    cluster = cluster_status(address, run)
    services = list(cluster.services)
    with ThreadPoolExecutor(_MAX_CONCURRENT_CALLS) as pool:
        first = list(pool.map(_ask, services))
        scrapes = list(pool.map(_scrape, services))
        paths = _measure_paths(services, first, num_probe_bytes)
        later = list(pool.map(_ask, services))
    subjects = map(Subject, services, first, later, scrapes)
    state = run.running() if not address else None
    broker = state.process(NATS_ROLE) if state else None
    return Examination(
        is_bus_connected=cluster.bus_connected,
        subjects=tuple(subjects),
        paths=tuple(paths),
        is_broker_listening=is_listening(int(broker.address.rpartition(":")[2]))
        if broker
        else None,
        leftover_pids=leftovers(run),
    )


def leftovers(run: RunDirectory) -> tuple[int, ...]:
    """Processes of the run directory's last system that outlived its supervisor."""
    state = None if run.is_locked() else run.load()
    return tuple(living(state)) if state else ()


def _ask(service: ServiceStatus) -> OwnWord | None:
    word = ask(service.address, _CALL_TIMEOUT_S)
    # Another worker may have got the address of one that is gone.
    if word is None or (service.worker_id and word.status.worker_id != service.worker_id):
        return None
    return word


def _scrape(service: ServiceStatus) -> Scrape | None:
    if not service.metrics_address or service.state is ServiceState.LOST:
        return None
    try:
        url = f"http://{service.metrics_address}/metrics"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=_CALL_TIMEOUT_S) as response:
            text = response.read().decode("utf-8", errors="replace")
    except (OSError, ValueError, urllib.error.URLError):
        return None
    return parse_scrape(text)


def parse_scrape(text: str) -> Scrape:
    """The figures of a Prometheus page that the doctor compares."""
    samples = [(name, label, float(value)) for name, label, value in _SAMPLE.findall(text)]
    buses = [value for name, _, value in samples if name == "baton_bus_connected"]
    return Scrape(
        kv_blocks={label: int(value) for name, label, value in samples if label},
        is_bus_connected=bool(buses[0]) if buses else None,
    )


def _measure_paths(
    services: Iterable[ServiceStatus], words: Iterable[OwnWord | None], num_bytes: int
) -> list[MeasuredPath]:
    """One after the other: together they would measure each other."""
    up = [service for service, word in zip(services, words, strict=True) if word is not None]
    return [
        MeasuredPath(
            prefill.worker_id,
            decode.worker_id,
            measure_path(prefill.address, decode.worker_id, num_bytes, _PROBE_TIMEOUT_S),
        )
        for prefill in up
        for decode in up
        if (prefill.role, decode.role) == (Role.PREFILL, Role.DECODE)
        and prefill.model == decode.model
    ]
