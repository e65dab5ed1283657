"""`baton status`: every process, its state and load, and its KV blocks by state."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from baton.client import ClusterStatus
from baton.core.blocks import BlockState
from baton.core.cluster import ServiceState, ServiceStatus
from baton.core.roles import Role

_STATE_STYLES = {
    ServiceState.READY: "green",
    ServiceState.STARTING: "yellow",
    ServiceState.DRAINING: "yellow",
    ServiceState.LOST: "bold red",
}
_ALWAYS_SHOWN = {BlockState.FREE, BlockState.IN_USE, BlockState.HELD, BlockState.CACHED}
_ROLE_ORDER = [*dict.fromkeys((Role.GATEWAY, Role.SCHEDULER, *Role))]


def to_document(status: ClusterStatus) -> dict[str, Any]:
    """The status as `baton status --json` prints it."""
    return {
        "bus_connected": status.bus_connected,
        "requests_by_state": dict(status.requests_by_state),
        "services": [_service_document(service) for service in _in_order(status)],
    }


def print_status(console: Console, status: ClusterStatus) -> None:
    """Prints the status as tables."""
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


def _in_order(status: ClusterStatus) -> list[ServiceStatus]:
    ranks: dict[str, int] = {role: rank for rank, role in enumerate(_ROLE_ORDER)}
    return sorted(
        status.services,
        key=lambda service: (ranks.get(service.role, len(ranks)), service.worker_id),
    )


def _services_table(services: list[ServiceStatus]) -> Table:
    texts = [Column(name, no_wrap=True) for name in ("service", "state", "address")]
    numbers = [Column(name, justify="right") for name in ("running", "waiting", "up")]
    table = Table(*texts, *numbers, box=None, pad_edge=False, header_style="bold")
    for service in services:
        table.add_row(
            Text(service.worker_id or service.role),
            Text(service.state.value, style=_STATE_STYLES[service.state]),
            Text(service.address),
            str(service.num_requests_running),
            str(service.num_requests_waiting),
            f"{service.uptime_s:.0f} s",
        )
    return table


def _blocks_table(workers: list[ServiceStatus]) -> Table:
    names = [
        state.value
        for state in BlockState
        if state in _ALWAYS_SHOWN or any(worker.kv_blocks.get(state.value) for worker in workers)
    ]
    numbers = [Column(name, justify="right") for name in (*names, "total")]
    first = Column("KV blocks", no_wrap=True)
    table = Table(first, *numbers, box=None, pad_edge=False, header_style="bold")
    for worker in workers:
        counts = [worker.kv_blocks.get(name, 0) for name in names]
        cells = [Text(str(count), style="" if count else "dim") for count in counts]
        table.add_row(Text(worker.worker_id), *cells, str(sum(worker.kv_blocks.values())))
    return table


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
