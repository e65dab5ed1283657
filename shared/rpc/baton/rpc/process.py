"""The life of a service's process: from settings to a clean exit.

`main` is all that a service's `__main__` calls. The process serves health, reflection and
ControlService from its first moment, its own services once loaded, and on SIGTERM or SIGINT lets
running work end before it goes.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random
from typing import NoReturn, TypeVar, cast

from baton.core.ids import make_id
from baton.rpc.bus import Bus
from baton.rpc.hosting import Hosting
from baton.rpc.interceptors import ServerInterceptor
from baton.rpc.logs import setup_logging
from baton.rpc.membership import MembershipView
from baton.rpc.metrics import Metrics
from baton.rpc.runtime import Lifecycle, Runtime, Service, ServiceSnapshot
from baton.rpc.server import (
    advertised_host,
    create_probe_server,
    create_server,
    join_address,
    listen,
)
from baton.rpc.settings import ServiceSettings, load_settings, parse_cores, parse_peers
from baton.rpc.telemetry import Telemetry
from baton.rpc.version import VERSION
from baton.wire.channel import ChannelPool
from baton.wire.clock import SystemClock
from baton.wire.control import RpcControl

__all__ = ["Runtime", "Service", "ServiceSnapshot", "main", "run"]

logger = logging.getLogger(__name__)

S = TypeVar("S", bound=ServiceSettings)
Build = Callable[[Runtime[S]], Service]
READY_FILE_VARIABLE = "BATON_READY_FILE"
_EXIT_TIMEOUT_S = 5.0
_DOUBLE_SIGNAL_S = 1.0


def main(settings_cls: type[S], build: Build[S] | str) -> NoReturn:
    """Runs a service until a stop is requested, then exits the process.

    `build` may be "module:function": it is then imported after the process has been bound to its
    cores, so that libraries which size their thread pools on import see the right number.
    """
    settings = load_settings(settings_cls, sys.argv[1:])
    cores = parse_cores(settings.cores)
    if cores:
        os.sched_setaffinity(0, cores)
    exit_code = asyncio.run(_run_and_leave(settings, _resolve(build)))
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is closed. Finalising an interpreter that has torch loaded takes up to seconds.
    os._exit(exit_code)


async def _run_and_leave(settings: S, build: Build[S]) -> int:
    exit_code = await run(settings, build)
    # A thread that does not end must not keep a process alive that has said goodbye; asyncio and
    # the interpreter would wait for it without a limit.
    watchdog = threading.Timer(_EXIT_TIMEOUT_S, os._exit, [exit_code])
    watchdog.daemon = True
    watchdog.start()
    return exit_code


def _resolve(build: Build[S] | str) -> Build[S]:
    if not isinstance(build, str):
        return build
    module, _, name = build.partition(":")
    return cast("Build[S]", getattr(importlib.import_module(module), name))


async def run(settings: S, build: Build[S]) -> int:
    """Runs a service in this event loop until a stop is requested; returns the exit status."""
    rng = Random(os.urandom(16))
    worker_id = settings.worker_id or make_id(settings.role, rng)
    setup_logging(settings.log_level, settings.role, worker_id)
    async with AsyncExitStack() as stack:
        try:
            runtime, hosting = await _assemble(settings, build, rng, worker_id, stack)
        except (OSError, RuntimeError) as error:
            logger.critical("cannot start", extra={"error": str(error)})
            return 1
        _handle_signals(runtime, hosting)
        await hosting.run(_write_ready_file)
    logger.info("stopped", extra={"exit_code": runtime.lifecycle.exit_code})
    return runtime.lifecycle.exit_code


async def _assemble(
    settings: S, build: Build[S], rng: Random, worker_id: str, stack: AsyncExitStack
) -> tuple[Runtime[S], Hosting]:
    """Makes all parts of the process; `stack` closes them in the opposite order."""
    role = settings.role
    host = advertised_host(settings)
    clock = SystemClock()
    telemetry = Telemetry(
        role, worker_id, trace_dir=settings.trace_dir, otlp_endpoint=settings.otlp_endpoint
    )
    stack.push_async_callback(asyncio.to_thread, telemetry.shutdown)
    metrics = Metrics(role, worker_id, VERSION)
    metrics_port = metrics.serve(settings.host, settings.metrics_port)
    stack.push_async_callback(asyncio.to_thread, metrics.close)
    channels = ChannelPool(
        max_message_bytes=settings.max_message_bytes, tls=settings.tls, inject=telemetry.inject
    )
    stack.push_async_callback(channels.close)
    lifecycle = Lifecycle()
    bus = Bus(settings.nats_url, worker_id, telemetry, metrics, rng, clock)
    bus.start(lifecycle.fail)
    stack.push_async_callback(bus.close)
    control = RpcControl(channels)
    members = MembershipView(
        bus,
        lambda address: control.status(address, lease_s=settings.lease_s),
        static_addresses=[address for _, address in parse_peers(settings.static_peers)],
        roles=settings.watches,
        own_worker_id=worker_id,
        clock=clock,
    )
    await members.start(lifecycle.fail)
    stack.push_async_callback(members.stop)
    interceptor = ServerInterceptor(telemetry, metrics, clock, lifecycle.refusal)
    server = create_server(settings, [interceptor])
    port = listen(server, settings)
    runtime = Runtime(
        settings=settings,
        role=role,
        worker_id=worker_id,
        address=join_address(host, port),
        metrics_address=join_address(host, metrics_port),
        telemetry=telemetry,
        metrics=metrics,
        bus=bus,
        members=members,
        channels=channels,
        control=control,
        rng=rng,
        clock=clock,
        lifecycle=lifecycle,
    )
    return runtime, Hosting(runtime, build(runtime), server, create_probe_server(settings))


def _handle_signals(runtime: Runtime[S], hosting: Hosting) -> None:
    """The first signal drains; another one, a moment later, stops at once."""
    loop = asyncio.get_running_loop()
    first_at_s: list[float] = []

    def on_signal(name: str) -> None:
        now = runtime.clock.now()
        if not first_at_s:
            first_at_s.append(now)
            logger.info("signal", extra={"signal": name})
            runtime.request_stop()
        elif now - first_at_s[0] > _DOUBLE_SIGNAL_S:  # a terminal's Ctrl-C may come twice at once
            logger.warning("second signal; stopping at once", extra={"signal": name})
            hosting.cut_short()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number.name)


def _write_ready_file(facts: dict[str, object]) -> None:
    """Tells a supervisor that the process is ready, if it named a file for that."""
    name = os.environ.get(READY_FILE_VARIABLE)
    if name:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"event": "ready", **facts}), encoding="utf-8")
        temporary.replace(path)
