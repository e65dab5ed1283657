"""The console's data: the cluster and the latest requests, collected from all schedulers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict

from baton.client import AsyncClient, BatonError, ClusterStatus, RequestList, RequestNotFound
from baton.core.cluster import ServiceStatus
from baton.gateway.answer_format import Json
from baton.gateway.schedulers import Schedulers

logger = logging.getLogger(__name__)
MAX_REQUESTS = 64
_TIMEOUT_S = 3.0


class ConsoleFeed:
    """Collects from all schedulers, as JSON."""

    def __init__(self, schedulers: Schedulers) -> None:
        self._schedulers = schedulers

    async def now(self, tenant: str) -> Json:
        """The cluster and the tenant's latest requests.

        Raises:
            BatonError: no scheduler answers.
        """
        clients = await self._schedulers.clients()
        status, lists = await asyncio.gather(
            _status(clients),
            asyncio.gather(*(_requests(client, tenant) for client in clients)),
        )
        records = sorted(
            (record for found in lists for record in found.requests), key=lambda r: r.age_s
        )
        return {
            "clock_s": time.monotonic(),
            "bus_connected": status.bus_connected,
            "services": [_service(service) for service in status.services],
            "requests": [asdict(record) for record in records[:MAX_REQUESTS]],
            "prompt_tokens": sum(found.prompt_tokens for found in lists),
            "output_tokens": sum(found.output_tokens for found in lists),
        }

    async def request(self, request_id: str, tenant: str) -> Json:
        """One request of the tenant, with its timeline.

        Raises:
            RequestNotFound: no scheduler that answers remembers the request.
        """
        for client in await self._schedulers.clients():
            try:
                record = await client.request(request_id, tenant=tenant, timeout_s=_TIMEOUT_S)
            except BatonError as error:
                if not isinstance(error, RequestNotFound):
                    logger.info("a scheduler does not answer", extra={"error": error.message})
                continue
            return asdict(record)
        raise RequestNotFound(f"request {request_id!r} is not among those remembered")


async def _status(clients: Sequence[AsyncClient]) -> ClusterStatus:
    """The cluster as the first scheduler that answers sees it."""
    for client in clients[:-1]:
        with suppress(BatonError):
            return await client.status(timeout_s=_TIMEOUT_S)
    return await clients[-1].status(timeout_s=_TIMEOUT_S)


async def _requests(client: AsyncClient, tenant: str) -> RequestList:
    """The requests of one scheduler; none if it does not answer, so as not to hide the others."""
    try:
        return await client.requests(limit=MAX_REQUESTS, tenant=tenant, timeout_s=_TIMEOUT_S)
    except BatonError:
        return RequestList((), 0, 0)


def _service(status: ServiceStatus) -> Json:
    return {
        "worker_id": status.worker_id,
        "role": status.role,
        "state": status.state.value,
        "address": status.address,
        "model": status.model,
        "running": status.num_requests_running,
        "waiting": status.num_requests_waiting,
        "uptime_s": status.uptime_s,
        "version": status.version,
        "kv_blocks": dict(status.kv_blocks),
        "stats": dict(status.stats),
    }
