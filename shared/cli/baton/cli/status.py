"""`baton status`: every process, its state and load, and its KV blocks by state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from baton.cli.peers import ask_all
from baton.cli.plan import NATS_ROLE
from baton.cli.ports import is_listening
from baton.cli.rundir import RunDirectory, SystemState
from baton.cli.target import NoSystem, scheduler_address
from baton.client import BatonError, Client, ClusterStatus
from baton.core.cluster import ServiceStatus
from baton.core.roles import Role

_CALL_TIMEOUT_S = 3.0
_STATE_STYLES = {"ready": "green", "starting": "yellow", "draining": "yellow", "lost": "bold red"}
_BLOCK_STATES = (
    *("free", "reserved", "filling", "ready"),
    *("in_use", "held", "cached", "quarantined"),
)
_ALWAYS_SHOWN = frozenset({"free", "in_use", "held", "cached"})
_ROLE_ORDER: tuple[str, ...] = (
    Role.GATEWAY,
    Role.SCHEDULER,
    Role.TOKENIZER,
    Role.PREFILL,
    Role.DECODE,
    Role.CACHE,
)


def cluster_status(address: str, run: RunDirectory) -> ClusterStatus:
    """The scheduler's view, or, when it does not answer, each local process's own answer.

    Raises:
        NoSystem: neither answers.
    """
    target = scheduler_address(address, run)
    try:
        with Client(target, timeout_s=_CALL_TIMEOUT_S) as client:
            return client.status()
    except BatonError as error:
        state = run.running()
        if address or state is None:
            raise NoSystem(
                f"the scheduler at {target} does not answer ({error.message}): is the address"
                " right, and does it run?"
            ) from error
        return _asked_directly(state)


def to_document(status: ClusterStatus) -> dict[str, Any]:
    """The status as `baton status --json` prints it."""
    return {
        "bus_connected": status.bus_connected,
        "requests_by_state": dict(status.requests_by_state),
        "services": [_service_document(service) for service in _in_order(status)],
    }


def print_status(console: Console, status: ClusterStatus) -> None:
    """The status as tables."""
    services = _in_order(status)
    parts: list[RenderableType] = [_services_table(services)]
    workers = [service for service in services if service.kv_blocks]
    if workers:
        parts += [Text(), _blocks_table(workers)]
    requests = ", ".join(
        f"{count} {name}" for name, count in sorted(status.requests_by_state.items()) if count
    )
    models = sorted({worker.model for worker in workers if worker.model})
    bus = "connected" if status.bus_connected else "not connected (requests go on without it)"
    facts = f"model: {', '.join(models) or 'none'}  requests: {requests or 'none'}  bus: {bus}"
    parts += [Text(), Text(facts, style="dim")]
    console.print(Group(*parts))


def _asked_directly(state: SystemState) -> ClusterStatus:
    addresses = [
        (process.role, process.address)
        for process in state.processes
        if process.role != NATS_ROLE and process.address
    ]
    bus = state.process(NATS_ROLE)
    return ClusterStatus(
        services=tuple(ask_all(addresses, _CALL_TIMEOUT_S)),
        bus_connected=bus is not None and is_listening(int(bus.address.rpartition(":")[2])),
    )


def _in_order(status: ClusterStatus) -> list[ServiceStatus]:
    ranks = {role: rank for rank, role in enumerate(_ROLE_ORDER)}
    return sorted(
        status.services,
        key=lambda service: (ranks.get(service.role, len(ranks)), service.worker_id),
    )


def _services_table(services: list[ServiceStatus]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("service", "state", "address"):
        table.add_column(name, no_wrap=True)
    for name in ("running", "waiting", "up"):
        table.add_column(name, justify="right")
    for service in services:
        state = service.state.value
        table.add_row(
            service.worker_id or service.role,
            Text(state, style=_STATE_STYLES.get(state, "")),
            service.address,
            str(service.num_requests_running),
            str(service.num_requests_waiting),
            f"{service.uptime_s:.0f} s",
        )
    return table


def _blocks_table(workers: list[ServiceStatus]) -> Table:
    names = [
        name
        for name in _BLOCK_STATES
        if name in _ALWAYS_SHOWN or any(worker.kv_blocks.get(name) for worker in workers)
    ]
    table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
    table.add_column("KV blocks", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("total", justify="right")
    for worker in workers:
        counts = worker.kv_blocks
        cells = [_count(counts, name) for name in names]
        table.add_row(worker.worker_id, *cells, Text(str(sum(counts.values()))))
    return table


def _count(counts: Mapping[str, int], name: str) -> Text:
    count = counts.get(name, 0)
    return Text(str(count), style="" if count else "dim")


def _service_document(service: ServiceStatus) -> dict[str, Any]:
    return {
        "worker_id": service.worker_id,
        "role": service.role,
        "address": service.address,
        "state": service.state.value,
        "model": service.model,
        "kv_blocks": dict(service.kv_blocks),
        "num_requests_running": service.num_requests_running,
        "num_requests_waiting": service.num_requests_waiting,
        "uptime_s": round(service.uptime_s, 3),
        "pid": service.pid,
        "metrics_address": service.metrics_address,
        "stats": dict(service.stats),
        "version": service.version,
        "cores": list(service.cores),
    }
