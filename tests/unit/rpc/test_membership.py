"""The membership's rule without a bus: who answers stays, two silences end it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from random import Random

import pytest

from baton.core.cluster import Announcement, ClusterView, ServiceState, ServiceStatus
from baton.core.errors import NoWorker, QueueFull
from baton.rpc.bus import Bus
from baton.rpc.membership import MembershipView
from baton.rpc.metrics import Metrics
from baton.rpc.telemetry import Telemetry
from baton.wire.announcement import announcement_to_bytes
from baton.wire.clock import SystemClock
from tests.support.clock import ReadClock
from tests.support.eventually import eventually


def _announcement(
    worker_id: str,
    address: str,
    *,
    state: ServiceState = ServiceState.READY,
    role: str = "decode",
    running: int = 0,
    leaving: bool = False,
) -> Announcement:
    status = ServiceStatus(worker_id, role, address, state=state, num_requests_running=running)
    return Announcement(status, lease_s=3.0, leaving=leaving)


class Network:
    """Processes by address, and how often each was asked."""

    def __init__(self) -> None:
        self.processes: dict[str, Announcement] = {}
        self.asked: list[str] = []
        self.busy: set[str] = set()

    async def ask(self, address: str) -> Announcement:
        self.asked.append(address)
        if address in self.busy:
            raise QueueFull("Concurrent RPC limit exceeded!")
        if address not in self.processes:
            raise NoWorker("connection refused")
        return self.processes[address]


def _bus() -> Bus:
    metrics = Metrics("t", "t-1", "0")
    return Bus(
        "",
        name="t",
        telemetry=Telemetry("t", "t-1"),
        metrics=metrics,
        rng=Random(1),
        clock=SystemClock(),
    )


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.fixture
async def members(network: Network) -> AsyncIterator[MembershipView]:
    view = MembershipView(
        _bus(),
        network.ask,
        static_addresses=["s:1"],
        own_worker_id="me",
        clock=ReadClock(lambda: 100.0),
    )
    yield view
    await view.stop()


def _ids(members: MembershipView) -> set[str]:
    return {member.worker_id for member in members.view()}


async def test_a_static_peer_comes_goes_and_comes_back_as_somebody_else(network: Network) -> None:
    members = MembershipView(_bus(), network.ask, static_addresses=["s:1"], clock=SystemClock())
    await members.start()
    try:
        await eventually(lambda: len(network.asked) >= 2)
        assert _ids(members) == set()
        network.processes["s:1"] = _announcement("first", "s:1")
        await eventually(lambda: _ids(members) == {"first"})
        del network.processes["s:1"]
        await eventually(lambda: _ids(members) == set())
        network.processes["s:1"] = _announcement("second", "s:1")
        await eventually(lambda: _ids(members) == {"second"})
    finally:
        await members.stop()


async def test_who_stops_answering_is_lost_until_it_is_replaced_or_forgotten(
    network: Network,
) -> None:
    now = 100.0
    members = MembershipView(_bus(), network.ask, own_worker_id="me", clock=ReadClock(lambda: now))
    await members.start()
    try:
        members.observe(_announcement("polite", "x:1"))
        members.observe(_announcement("polite", "x:1", leaving=True))
        assert members.lost() == []
        members.observe(_announcement("first", "x:2"))
        members.observe(_announcement("other", "x:3"))
        for worker_id in ("first", "other"):
            members.suspect(worker_id)

        def tick() -> bool:
            nonlocal now
            now += 0.5  # the two questions are some time apart
            return {member.worker_id for member in members.lost()} == {"first", "other"}

        await eventually(tick)
        members.observe(_announcement("second", "x:2"))
        assert [member.worker_id for member in members.lost()] == ["other"]
        now += 400.0
        assert members.lost() == []
    finally:
        await members.stop()


async def test_process_that_refuses_for_being_busy_stays_a_member(network: Network) -> None:
    now = 100.0
    members = MembershipView(_bus(), network.ask, own_worker_id="me", clock=ReadClock(lambda: now))
    await members.start()
    try:
        members.observe(_announcement("busy", "x:1"))
        members.observe(_announcement("dead", "x:2"))
        network.busy.add("x:1")

        def tick() -> bool:
            nonlocal now
            now += 1.0  # the questions are some time apart
            return network.asked.count("x:1") >= 4

        await eventually(tick)
        assert _ids(members) == {"busy"}
    finally:
        await members.stop()


async def test_a_restart_at_the_same_address_replaces_the_old_boot(members: MembershipView) -> None:
    members.observe(_announcement("first", "x:1"))
    members.observe(_announcement("other", "x:2"))
    members.observe(_announcement("second", "x:1"))
    assert _ids(members) == {"second", "other"}


async def test_suspects_are_unusable_and_asked_at_once(
    members: MembershipView, network: Network
) -> None:
    members.observe(_announcement("w", "x:1"))
    assert members.view().usable("decode", 100.0)
    members.suspect("w")
    assert not members.view().usable("decode", 100.0)
    await eventually(lambda: "x:1" in network.asked)
    members.observe(_announcement("w", "x:1"))
    assert not members.view().usable("decode", 100.0), "a word of its own ends no doubt"
    members.suspect("unknown")


async def test_one_silence_is_forgiven(network: Network) -> None:
    members = MembershipView(_bus(), network.ask, own_worker_id="me", clock=SystemClock())
    network.processes["x:1"] = _announcement("w", "x:1")
    members.observe(network.processes["x:1"])
    answers = iter([False, True, True, False, True, True])

    async def moody(address: str) -> Announcement:
        if not next(answers, True):
            raise NoWorker("no answer")
        network.asked.append(address)
        return network.processes[address]

    members._ask_status = moody
    await members.start()
    try:
        await eventually(lambda: len(network.asked) >= 3)
        assert _ids(members) == {"w"}
    finally:
        await members.stop()


async def test_oneself_is_never_asked(members: MembershipView, network: Network) -> None:
    members.observe(_announcement("me", "x:9"))
    members.observe(_announcement("w", "x:1"))
    await members.start()
    await eventually(lambda: "x:1" in network.asked)
    assert "x:9" not in network.asked
    assert "me" in _ids(members)


async def test_changes_are_told_and_mere_load_is_not(members: MembershipView) -> None:
    seen: list[ClusterView] = []
    members.on_change(seen.append)
    members.observe(_announcement("w", "x:1"))
    members.observe(_announcement("w", "x:1", running=5))
    assert len(seen) == 1
    assert members.view().members["w"].status.num_requests_running == 5
    members.observe(_announcement("w", "x:1", state=ServiceState.DRAINING))
    assert not seen[-1].usable("decode", 100.0)
    members.observe(_announcement("w", "x:1", leaving=True))
    assert len(seen) == 3
    assert not list(seen[-1])


async def test_roles_of_no_interest_are_passed_over() -> None:
    members = MembershipView(_bus(), Network().ask, roles=frozenset({"cache"}), clock=SystemClock())
    members.observe(_announcement("w", "x:1"))
    members.observe(_announcement("c", "x:2", role="cache"))
    assert _ids(members) == {"c"}


async def test_nonsense_on_the_bus_does_no_harm(members: MembershipView) -> None:
    await members._on_announcement("baton.member.x", b"\xff\xff")
    good = announcement_to_bytes(_announcement("w", "x:1"))
    await members._on_announcement("baton.member.decode.w", good)
    assert _ids(members) == {"w"}
