"""Admission as requests see it, where timers fail or requests are many."""

from __future__ import annotations

import asyncio
import logging

import pytest

from baton.core.admission import Admission
from baton.core.errors import KvCacheFull
from baton.scheduler.gate import AdmissionGate
from baton.wire.clock import SystemClock
from tests.support.eventually import eventually


async def test_a_timer_that_fails_is_logged_and_the_next_one_still_runs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fails_at: set[int] = set()
    num_asked = 0

    def capacity(model: str) -> int:
        nonlocal num_asked
        num_asked += 1
        if num_asked in fails_at:
            raise RuntimeError("no capacity")
        return 1

    gate = AdmissionGate(Admission(8), capacity, SystemClock())
    ticket = await gate.enter("r1", "m", priority=0, deadline_s=1e9)
    fails_at.add(num_asked + 2)
    with caplog.at_level(logging.ERROR), pytest.raises(KvCacheFull):
        await gate.wait_again(ticket, 0.4)
    failed = [record for record in caplog.records if "background task failed" in record.message]
    assert len(failed) == 1
    gate.leave(ticket)
    again = asyncio.create_task(gate.enter("r2", "m", priority=0, deadline_s=1e9))
    await eventually(again.done)
    await gate.close()
