"""The bus and the membership on a real broker that gets killed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from baton.core.cluster import Announcement, ServiceState, ServiceStatus
from baton.core.errors import NoWorker
from baton.rpc.bus import Bus
from baton.rpc.membership import Announcer, MembershipView
from baton.rpc.metrics import Metrics
from baton.rpc.telemetry import Telemetry
from baton.wire.clock import SystemClock
from tests.support.eventually import eventually
from tests.support.nats import NatsServer


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[NatsServer]:
    server = NatsServer(tmp_path / "nats")
    yield server
    server.kill()


class Station:
    """A bus with what it exports and what it heard."""

    def __init__(self, url: str) -> None:
        self.exporter = InMemorySpanExporter()
        self.telemetry = Telemetry("t", "t-1", processors=(SimpleSpanProcessor(self.exporter),))
        self.metrics = Metrics("t", "t-1", "0")
        self.heard: list[bytes] = []
        self.bus = Bus(
            url,
            name="t-1",
            telemetry=self.telemetry,
            metrics=self.metrics,
            rng=Random(1),
            clock=SystemClock(),
        )

    async def hear(self, subject: str, data: bytes) -> None:
        if data == b"bad":
            raise ValueError("cannot handle")
        self.heard.append(data)

    async def exchange(self, data: bytes) -> bool:
        """Publishes on its own subject; True once that was heard."""
        await self.bus.publish("test.echo", data)
        return data in self.heard

    def dropped(self, direction: str) -> float:
        labels = {"direction": direction}
        name = "baton_bus_dropped_messages_total"
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


@pytest.fixture
async def station(broker: NatsServer) -> AsyncIterator[Station]:
    station = Station(broker.url)
    yield station
    await station.bus.close()


async def test_a_broker_that_comes_late_is_found(broker: NatsServer, station: Station) -> None:
    station.bus.start()
    await station.bus.subscribe("test.echo", station.hear)
    await station.bus.publish("test.echo", b"lost")
    assert not station.bus.is_connected
    assert station.dropped("publish") == 1
    await broker.start()
    await eventually(lambda: station.exchange(b"found"), timeout_s=10)
    assert b"lost" not in station.heard


async def test_a_killed_broker_is_found_again_with_all_subscriptions(
    broker: NatsServer, station: Station
) -> None:
    await broker.start()
    connects = []

    async def on_connect() -> None:
        connects.append(station.bus.is_connected)

    station.bus.on_connect(on_connect)
    station.bus.start()
    await station.bus.subscribe("test.echo", station.hear)
    await eventually(lambda: station.exchange(b"1"))
    for round_number in (2, 3):
        broker.kill()
        await eventually(lambda: not station.bus.is_connected)
        await station.bus.publish("test.echo", b"lost")  # must not raise or block
        await broker.start()
        data = str(round_number).encode()
        await eventually(lambda data=data: station.exchange(data), timeout_s=10)
    assert connects == [True, True, True]
    await station.bus.publish("test.echo", b"once")
    await station.bus.publish("test.echo", b"end")
    await eventually(lambda: b"end" in station.heard)
    assert station.heard.count(b"once") == 1, "a subscription must not be made twice"


async def test_a_handler_that_fails_does_not_end_the_subscription(
    broker: NatsServer, station: Station
) -> None:
    await broker.start()
    station.bus.start()
    await station.bus.subscribe("test.echo", station.hear)
    await eventually(lambda: station.bus.is_connected)
    await station.bus.publish("test.echo", b"bad")
    await eventually(lambda: station.exchange(b"good"))
    assert station.dropped("receive") == 1


async def test_too_large_a_message_is_dropped_and_counted(
    broker: NatsServer, station: Station
) -> None:
    await broker.start()
    station.bus.start()
    await station.bus.subscribe("test.echo", station.hear)
    await eventually(lambda: station.bus.is_connected)
    await station.bus.publish("test.echo", bytes(2 * 1024 * 1024))
    assert station.dropped("publish") == 1
    await eventually(lambda: station.exchange(b"next"))


async def test_the_trace_goes_through_messages_and_does_not_stick(
    broker: NatsServer, station: Station
) -> None:
    await broker.start()
    contexts: list[dict[str, str]] = []

    async def hear(subject: str, data: bytes) -> None:
        contexts.append(station.telemetry.inject())

    station.bus.start()
    await station.bus.subscribe("test.echo.one", hear)
    await eventually(lambda: station.bus.is_connected)
    await station.bus.publish("test.echo.one", b"untraced")
    root = station.telemetry.start_span("root")
    station.telemetry.set_current(station.telemetry.context_of(root))
    await station.bus.publish("test.echo.one", b"traced")
    from opentelemetry.context import Context

    station.telemetry.set_current(Context())
    await station.bus.publish("test.echo.one", b"untraced")
    await eventually(lambda: len(contexts) == 3)
    trace_id = f"{root.get_span_context().trace_id:032x}"
    assert contexts[0] == contexts[2] == {}
    assert contexts[1]["traceparent"].split("-")[1] == trace_id
    spans = {span.kind: span for span in station.exporter.get_finished_spans()}
    assert spans[SpanKind.PRODUCER].name == "publish test.echo"
    consumer, producer = spans[SpanKind.CONSUMER], spans[SpanKind.PRODUCER]
    assert consumer.name == "process test.echo"
    assert consumer.parent is not None
    assert producer.context is not None
    assert consumer.parent.span_id == producer.context.span_id


async def test_without_a_url_there_is_no_bus() -> None:
    station = Station("")
    station.bus.start()
    await station.bus.subscribe("test.echo", station.hear)
    await station.bus.publish("test.echo", b"x")
    assert not station.bus.is_connected
    assert station.dropped("publish") == 0
    await station.bus.close()


class Member:
    """A process that announces itself, answers questions about itself, and watches the others."""

    def __init__(self, url: str, worker_id: str, everybody: dict[str, Member]) -> None:
        self.station = Station(url)
        self.worker_id = worker_id
        self.is_alive = True
        self.is_leaving = False
        self._everybody = everybody
        everybody[f"{worker_id}:1"] = self
        self.view = MembershipView(
            self.station.bus, self._ask, own_worker_id=worker_id, clock=SystemClock()
        )
        self.announcer = Announcer(
            self.station.bus,
            self.describe,
            observe=self.view.observe,
            interval_s=0.2,
            clock=SystemClock(),
        )

    def describe(self) -> Announcement:
        status = ServiceStatus(
            self.worker_id, "decode", f"{self.worker_id}:1", state=ServiceState.READY
        )
        return Announcement(status, lease_s=0.6, leaving=self.is_leaving)

    async def _ask(self, address: str) -> Announcement:
        peer = self._everybody[address]
        if not peer.is_alive:
            raise NoWorker("connection refused")
        return peer.describe()

    async def start(self) -> None:
        self.station.bus.start()
        await self.view.start()
        await self.announcer.start()

    def knows(self) -> set[str]:
        return {member.worker_id for member in self.view.view()}

    async def die(self) -> None:
        """As by kill -9: no goodbye."""
        self.is_alive = False
        await self.station.bus.close()

    async def stop(self) -> None:
        self.is_leaving = True
        await self.announcer.stop()
        await self.view.stop()
        await self.station.bus.close()


@pytest.fixture
async def members(broker: NatsServer) -> AsyncIterator[list[Member]]:
    everybody: dict[str, Member] = {}
    made = [Member(broker.url, name, everybody) for name in ("a", "b", "c")]
    for member in made:
        await member.start()
    yield made
    for member in made:
        await member.stop()


async def test_members_find_each_other_and_outlive_the_broker(
    broker: NatsServer, members: list[Member]
) -> None:
    a, b, c = members
    await broker.start()
    await eventually(lambda: all(m.knows() == {"a", "b", "c"} for m in members), timeout_s=10)
    broker.kill()
    await eventually(lambda: not any(m.station.bus.is_connected for m in members))
    asked_at = a.view.view().members["b"].lease_ends_at_s
    # Three leases later everybody who answers is still there, and who does not is gone.
    await eventually(
        lambda: a.view.view().members["b"].lease_ends_at_s > asked_at + 1.8, timeout_s=10
    )
    assert a.knows() == {"a", "b", "c"}
    await c.die()
    await eventually(lambda: a.knows() == b.knows() == {"a", "b"}, timeout_s=10)
    await broker.start()
    await eventually(lambda: a.station.bus.is_connected and b.station.bus.is_connected, 10)
    newcomer = Member(broker.url, "d", a._everybody)
    await newcomer.start()
    try:
        # The query that it sends on its connect brings the others in; it need not wait for turns.
        await eventually(lambda: newcomer.knows() == {"a", "b", "d"}, timeout_s=10)
        await eventually(lambda: a.knows() == {"a", "b", "d"}, timeout_s=10)
    finally:
        await newcomer.stop()
    await eventually(lambda: a.knows() == {"a", "b"}, timeout_s=5)


async def test_a_member_killed_without_goodbye_is_dropped_when_its_lease_ends(
    broker: NatsServer, members: list[Member]
) -> None:
    a, b, c = members
    await broker.start()
    await eventually(lambda: a.knows() == {"a", "b", "c"}, timeout_s=10)
    await c.die()
    await eventually(lambda: a.knows() == b.knows() == {"a", "b"}, timeout_s=5)


async def test_a_member_cut_off_from_the_bus_stays(
    broker: NatsServer, members: list[Member]
) -> None:
    a, _, c = members
    await broker.start()
    await eventually(lambda: a.knows() == {"a", "b", "c"}, timeout_s=10)
    await c.station.bus.close()
    before = a.view.view().members["c"].lease_ends_at_s
    await eventually(lambda: a.view.view().members["c"].lease_ends_at_s > before + 1.8, 10)
