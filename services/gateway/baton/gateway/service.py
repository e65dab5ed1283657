"""The gateway's process: an HTTP server, and a member of the cluster like any other service."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from baton.client import Tls
from baton.gateway.app import Gateway, make_app
from baton.gateway.schedulers import Schedulers
from baton.gateway.server import HttpServer
from baton.gateway.settings import GatewaySettings
from baton.rpc.runtime import Runtime, ServiceSnapshot

logger = logging.getLogger(__name__)


class GatewayService:
    """Implements rpc.runtime.Service."""

    def __init__(self, runtime: Runtime[GatewaySettings]) -> None:
        settings = runtime.settings
        self._schedulers = Schedulers(
            settings.scheduler,
            runtime.members,
            settings.request_timeout_s,
            _tls(settings),
            settings.plain_gateway_key,
        )
        self._gateway = Gateway(settings, self._schedulers, runtime.metrics)
        app = make_app(self._gateway, runtime.telemetry, runtime.metrics, runtime.rng)
        address = (settings.http_host, settings.http_port)
        self._http = HttpServer(app, *address, settings.max_connections)

    def register(self, server: Any) -> list[str]:
        """Registers none: the gateway serves only health and control over gRPC."""
        del server
        return []

    async def start(self) -> None:
        """Starts serving HTTP."""
        address = await self._http.start()
        logger.info("serving http", extra={"http_address": address})

    def snapshot(self) -> ServiceSnapshot:
        """The number of running requests."""
        return ServiceSnapshot(num_running=self._gateway.num_running)

    async def drain(self, grace_s: float) -> None:
        """Waits for running requests to end."""
        self._gateway.is_draining = True
        await self._http.drain(grace_s)

    async def stop(self) -> None:
        """Cancels running requests, and closes the clients."""
        await self._http.stop()
        await self._schedulers.close()

    def kv_snapshot(self) -> tuple[int, list[bytes]]:
        """Empty: the gateway holds no KV."""
        return 0, []


def _tls(settings: GatewaySettings) -> Tls | None:
    paths = (settings.tls_ca, settings.tls_cert, settings.tls_key)
    ca, cert, key = (Path(path).read_bytes() if path else None for path in paths)
    return Tls(ca=ca, cert=cert, key=key) if settings.tls.is_set else None
