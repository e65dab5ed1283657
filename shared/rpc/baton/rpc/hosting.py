"""One service inside its process: served, announced, measured, drained.

`process` makes the parts; this runs them in the right order.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from baton.core.cluster import Announcement, ServiceState, ServiceStatus
from baton.core.errors import BatonError
from baton.rpc.logs import log_failure
from baton.rpc.membership import Announcer
from baton.rpc.runtime import Runtime, Service, ServiceSnapshot
from baton.rpc.settings import parse_cores
from baton.rpc.tasks import Tasks
from baton.rpc.version import VERSION
from baton.wire.control import add_control

logger = logging.getLogger(__name__)

_STOP_GRACE_S = 1.0
_STOP_TIMEOUT_S = 10.0
_LOOP_CHECK_S = 0.25
_SCRAPE_TIMEOUT_S = 1.0
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Hosting:
    """Runs a service from its start to its end."""

    def __init__(
        self,
        runtime: Runtime[Any],
        service: Service,
        server: grpc.aio.Server,
        probe_server: grpc.aio.Server | None,
    ) -> None:
        """Takes servers that are bound and not started."""
        self._runtime = runtime
        self._settings = runtime.settings
        self._clock = runtime.clock
        self._lifecycle = runtime.lifecycle
        self._service = service
        self._server = server
        self._probe_server = probe_server
        self._announcer = Announcer(
            runtime.bus,
            self.describe,
            observe=runtime.members.observe,
            interval_s=runtime.settings.announce_interval_s,
            clock=runtime.clock,
        )
        self._loop = asyncio.get_running_loop()
        self._started_at_s = self._clock.now()
        self._snapshot = ServiceSnapshot()
        self._has_loaded = False
        self._is_leaving = False
        self._is_cut_short = asyncio.Event()
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._names: list[str] = [""]
        self._tasks = Tasks("process", self._lifecycle.fail)

    def cut_short(self) -> None:
        """Ends a drain at once."""
        self._is_cut_short.set()

    def describe(self) -> Announcement:
        """State and load now."""
        snapshot = self._take_snapshot()
        runtime, lifecycle = self._runtime, self._lifecycle
        stats = dict(snapshot.stats)
        if lifecycle.state is ServiceState.STARTING:
            stats["loading_fraction"] = lifecycle.loading_fraction
        return Announcement(
            status=ServiceStatus(
                worker_id=runtime.worker_id,
                role=runtime.role,
                address=runtime.address,
                state=lifecycle.state,
                model=snapshot.model,
                models=snapshot.models,
                max_model_len_tokens=snapshot.max_model_len_tokens,
                fingerprint=snapshot.fingerprint,
                kv_blocks=snapshot.kv_blocks,
                num_requests_running=snapshot.num_running,
                num_requests_waiting=snapshot.num_waiting,
                uptime_s=self._clock.now() - self._started_at_s,
                pid=os.getpid(),
                metrics_address=runtime.metrics_address,
                stats=stats,
                version=VERSION,
                cores=parse_cores(self._settings.cores),
                store_id=snapshot.store_id,
            ),
            lease_s=self._settings.lease_s,
            rates=snapshot.rates,
            leaving=self._is_leaving,
        )

    def kv_snapshot(self) -> tuple[int, list[bytes]]:
        """See wire.control.ControlServer; empty while the service loads."""
        return self._service.kv_snapshot() if self._has_loaded else (0, [])

    def request_stop(self, grace_s: float | None) -> None:
        """See wire.control.ControlServer."""
        self._runtime.request_stop(grace_s=grace_s)

    async def run(self, on_ready: Callable[[dict[str, object]], None]) -> None:
        """Serves until a stop is requested, drains, and stops. Sets the lifecycle's exit code."""
        await self._serve()
        self._tasks.spawn(self._measure_delay(), "measure delay")
        await self._announcer.start(self._lifecycle.fail)
        try:
            if await self._load():
                await self._become_ready(on_ready)
                await self._lifecycle.stop_requested.wait()
        finally:
            await self._wind_down()
            await self._tasks.stop()

    async def _serve(self) -> None:
        served = [*self._service.register(self._server), add_control(self._server, self)]
        self._names.extend(served)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        await self._set_health(_NOT_SERVING)
        reflection.enable_server_reflection(
            [*served, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server
        )
        self._register_gauges()
        await self._server.start()
        if self._probe_server is not None:
            health_pb2_grpc.add_HealthServicer_to_server(self._health, self._probe_server)
            await self._probe_server.start()
        logger.info("listening", extra={"address": self._runtime.address})

    async def _load(self) -> bool:
        """Starts the service; False when it failed or a stop came first."""
        starting = self._loop.create_task(self._service.start())
        stopping = self._loop.create_task(self._lifecycle.stop_requested.wait())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not starting.done():
            starting.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.wait({starting}, timeout=_STOP_TIMEOUT_S)
            return False
        error = starting.exception()
        if error is not None:
            self._lifecycle.exit_code = 1
        if isinstance(error, BatonError | OSError):
            logger.critical("cannot start", extra={"error": str(error)})
        elif error is not None:
            logger.critical("start failed", exc_info=error)
        return error is None

    async def _become_ready(self, on_ready: Callable[[dict[str, object]], None]) -> None:
        # What loading left lives as long as the process. Unfrozen, each full collection would walk
        # it again: 0.1 to 0.2 s in a worker, with every stream standing still.
        gc.collect()
        gc.freeze()
        self._has_loaded = True
        self._lifecycle.state = ServiceState.READY
        await self._set_health(_SERVING)
        await self._announcer.announce()
        facts: dict[str, object] = {
            "address": self._runtime.address,
            "metrics_address": self._runtime.metrics_address,
            "pid": os.getpid(),
            "load_s": round(self._clock.now() - self._started_at_s, 3),
        }
        logger.info("ready", extra=facts)
        on_ready({"role": self._runtime.role, "worker_id": self._runtime.worker_id, **facts})

    async def _wind_down(self) -> None:
        self._lifecycle.state = ServiceState.DRAINING
        await self._health.enter_graceful_shutdown()
        await self._announcer.announce()
        if self._has_loaded:
            await self._drain()
        await self._server.stop(_STOP_GRACE_S)
        if self._probe_server is not None:
            await self._probe_server.stop(0.0)
        await self._bounded("stop", self._service.stop(), _STOP_TIMEOUT_S)
        self._is_leaving = True
        await self._announcer.stop()

    async def _drain(self) -> None:
        grace_s = self._lifecycle.grace_s
        if grace_s is None:
            grace_s = self._settings.drain_grace_s
        logger.info("draining", extra={"grace_s": grace_s})
        draining = self._loop.create_task(
            self._bounded("drain", self._service.drain(grace_s), grace_s + _STOP_GRACE_S)
        )
        cut_short = self._loop.create_task(self._is_cut_short.wait())
        await asyncio.wait({draining, cut_short}, return_when=asyncio.FIRST_COMPLETED)
        for task in (draining, cut_short):
            task.cancel()
        await asyncio.gather(draining, cut_short, return_exceptions=True)

    async def _bounded(self, name: str, work: Any, timeout_s: float) -> None:
        """Awaits a part of the end: neither an error nor a delay there may prevent the rest."""
        try:
            async with self._clock.timeout(timeout_s):
                await work
        except TimeoutError:
            logger.warning("took too long; going on", extra={"step": name, "timeout_s": timeout_s})
        except Exception as error:  # noqa: BLE001 - what follows must run
            log_failure(logger, "step failed; going on", error, step=name)
            self._lifecycle.exit_code = self._lifecycle.exit_code or 1

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in self._names:
            await self._health.set(name, status)

    def _take_snapshot(self) -> ServiceSnapshot:
        """The service's load, or the last known one where there is none to have."""
        if self._has_loaded and not self._is_leaving:
            try:
                self._snapshot = self._service.snapshot()
            except Exception as error:  # noqa: BLE001 - a status without load is better than none
                log_failure(logger, "snapshot failed", error)
        return self._snapshot

    def _register_gauges(self) -> None:
        metrics, bus = self._runtime.metrics, self._runtime.bus
        metrics.gauge_at_scrape(
            "kv_blocks", "KV blocks by state", "state", lambda: self._scrape().kv_blocks
        )
        metrics.gauge_at_scrape(
            "num_requests_running",
            "Requests being computed",
            "",
            lambda: {"": self._scrape().num_running},
        )
        metrics.gauge_at_scrape(
            "num_requests_waiting", "Requests waiting", "", lambda: {"": self._scrape().num_waiting}
        )
        metrics.gauge_at_scrape(
            "bus_connected", "1 while NATS is connected", "", lambda: {"": bus.is_connected}
        )
        metrics.gauge_at_scrape("members", "Ready members by role", "role", self._count_members)

    def _scrape(self) -> ServiceSnapshot:
        """The service's load, from a scrape's thread."""

        async def take() -> ServiceSnapshot:
            return self._take_snapshot()

        try:
            future = asyncio.run_coroutine_threadsafe(take(), self._loop)
            return future.result(_SCRAPE_TIMEOUT_S)
        except (TimeoutError, RuntimeError):  # a loop that is busy, or closed
            return self._snapshot

    def _count_members(self) -> Mapping[str, float]:
        counts: dict[str, float] = {}
        for member in self._runtime.members.view():
            if member.status.state is ServiceState.READY:
                counts[member.status.role] = counts.get(member.status.role, 0) + 1
        return counts

    async def _measure_delay(self) -> None:
        delay_s = self._runtime.metrics.event_loop_delay_s
        while True:
            wake_at_s = self._clock.now() + _LOOP_CHECK_S
            await self._clock.sleep(_LOOP_CHECK_S)
            delay_s.observe(max(0.0, self._clock.now() - wake_at_s))
