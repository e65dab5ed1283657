"""Membership of real processes over a real broker: both get killed."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import pytest

from baton.core.cluster import ServiceState
from baton.rpc.bus import Bus
from baton.rpc.membership import MembershipView
from baton.rpc.metrics import Metrics
from baton.rpc.telemetry import Telemetry
from baton.wire.channel import ChannelPool
from baton.wire.clock import SystemClock
from baton.wire.control import RpcControl
from tests.support.demo_process import Demo
from tests.support.eventually import eventually
from tests.support.nats import NatsServer


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[NatsServer]:
    server = NatsServer(tmp_path / "nats")
    yield server
    server.kill()


@pytest.fixture
async def demos(tmp_path: Path, broker: NatsServer) -> AsyncIterator[list[Demo]]:
    made = [Demo(tmp_path / name, broker.url) for name in ("one", "two")]
    yield made
    for demo in made:
        demo.kill()
        await demo.pool.close()


class Observer:
    """A view as a service has it."""

    def __init__(self, nats_url: str, static_addresses: list[str]) -> None:
        telemetry, metrics = Telemetry("t", "t-1"), Metrics("t", "t-1", "0")
        self._pool = ChannelPool(max_message_bytes=1 << 20)
        control = RpcControl(self._pool)
        self.bus = Bus(
            nats_url,
            name="t",
            telemetry=telemetry,
            metrics=metrics,
            rng=Random(1),
            clock=SystemClock(),
        )
        self.members = MembershipView(
            self.bus,
            lambda address: control.status(address, lease_s=1.0),
            static_addresses=static_addresses,
            clock=SystemClock(),
        )

    async def __aenter__(self) -> Observer:
        self.bus.start()
        await self.members.start()
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.members.stop()
        await self.bus.close()
        await self._pool.close()

    def ready(self) -> set[str]:
        """Addresses of the ready members."""
        return {
            member.status.address
            for member in self.members.view()
            if member.status.state is ServiceState.READY
        }


async def test_processes_outlive_the_broker_in_the_view_and_dead_ones_do_not(
    broker: NatsServer, demos: list[Demo]
) -> None:
    one, two = demos
    both = {one.address, two.address}
    await broker.start()
    for demo in demos:
        demo.start("--lease-s", "1", "--announce-interval-s", "0.3")
    async with Observer(broker.url, []) as observer:
        await eventually(lambda: observer.ready() == both, timeout_s=20)
        broker.kill()
        await eventually(lambda: not observer.bus.is_connected)
        leases = [member.lease_ends_at_s for member in observer.members.view()]
        await eventually(
            lambda: all(
                member.lease_ends_at_s > max(leases) + 2.0 for member in observer.members.view()
            ),
            timeout_s=15,
        )
        assert observer.ready() == both
        two.kill()
        await eventually(lambda: observer.ready() == {one.address}, timeout_s=10)
        await broker.start()
        await eventually(lambda: observer.bus.is_connected, timeout_s=10)
        two.start("--lease-s", "1")
        await eventually(lambda: observer.ready() == both, timeout_s=20)
        # Announced by the processes themselves: a new observer, who has nobody to ask, knows them.
        async with Observer(broker.url, []) as newcomer:
            await eventually(lambda: newcomer.ready() == both, timeout_s=15)
        one.signal(signal.SIGTERM)
        await eventually(lambda: observer.ready() == {two.address}, timeout_s=5)
        assert await one.exit_code() == 0


async def test_static_peers_need_no_broker(demos: list[Demo]) -> None:
    one, two = demos
    async with Observer("", [one.address, two.address]) as observer:
        one.start()
        await eventually(lambda: observer.ready() == {one.address}, timeout_s=20)
        one.kill()
        await eventually(lambda: observer.ready() == set(), timeout_s=10)
