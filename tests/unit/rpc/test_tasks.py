"""Background tasks do not die unseen."""

from __future__ import annotations

import asyncio
import logging
from random import Random

import pytest

from baton.core.cluster import Announcement, ServiceStatus
from baton.rpc.bus import Bus
from baton.rpc.membership import Announcer, MembershipView
from baton.rpc.metrics import Metrics
from baton.rpc.runtime import Lifecycle
from baton.rpc.tasks import Tasks
from baton.rpc.telemetry import Telemetry
from baton.wire.clock import SystemClock


def _bus() -> Bus:
    return Bus(
        "",
        name="t",
        telemetry=Telemetry("t", "t-1"),
        metrics=Metrics("t", "t-1", "0"),
        rng=Random(1),
        clock=SystemClock(),
    )


async def _fail() -> None:
    raise ValueError("a secret")


async def test_an_unexpected_end_is_logged_and_stops_the_process(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lifecycle = Lifecycle()
    tasks = Tasks("owner", lifecycle.fail)
    with caplog.at_level(logging.ERROR):
        tasks.spawn(_fail(), "the name")
        await asyncio.wait_for(lifecycle.stop_requested.wait(), 5.0)
    assert lifecycle.exit_code == 1
    (record,) = caplog.records
    assert (record.message, record.owner, record.task, record.error_type) == (  # type: ignore[attr-defined]
        "background task failed",
        "owner",
        "the name",
        "ValueError",
    )
    assert "secret" not in caplog.text
    assert len(tasks) == 0


async def test_tasks_end_with_their_owner() -> None:
    lifecycle = Lifecycle()
    tasks = Tasks("owner", lifecycle.fail)
    assert await tasks.spawn(asyncio.sleep(0, "result"), "short") == "result"
    slow = tasks.spawn(asyncio.sleep(60), "slow")
    await tasks.finish(SystemClock(), 0.01)
    assert slow.cancelled()
    tasks.spawn(asyncio.sleep(60), "slow")
    await tasks.stop()
    assert len(tasks) == 0
    assert not lifecycle.stop_requested.is_set()


async def test_an_announcer_that_cannot_describe_stops_the_process() -> None:
    lifecycle = Lifecycle()

    def describe() -> Announcement:
        raise ValueError

    announcer = Announcer(
        _bus(), describe, observe=lambda _: None, interval_s=0.01, clock=SystemClock()
    )
    await announcer.start(lifecycle.fail)
    await asyncio.wait_for(lifecycle.stop_requested.wait(), 5.0)


async def test_a_sweep_of_members_that_fails_stops_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lifecycle = Lifecycle()

    async def ask(_address: str) -> Announcement:
        return Announcement(ServiceStatus("w", "cache", "a:1"), lease_s=1.0)

    members = MembershipView(_bus(), ask, clock=SystemClock())
    monkeypatch.setattr(members, "_start_polls", lambda: [][0])
    await members.start(lifecycle.fail)
    await asyncio.wait_for(lifecycle.stop_requested.wait(), 5.0)
    await members.stop()
