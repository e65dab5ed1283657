from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from baton.core.errors import Cancelled, StaleEpoch
from baton.core.handoff.frames import ChunkFrame, KvChunk, Span
from baton.handoff.receiver import Intake, _IncomingPush
from baton.wire.clock import SystemClock


async def test_a_release_may_come_as_the_time_limit_ends() -> None:
    session: Any = SimpleNamespace(error=None, on_release=None)

    async def frames() -> AsyncGenerator[Any, None]:
        try:
            await asyncio.Event().wait()
        finally:
            session.error = Cancelled("the reader went away")
            session.on_release()
        yield None

    nobody: Any = SimpleNamespace(close=lambda: None)
    intake = Intake(
        nobody, nobody, nobody, num_credits=1, progress_timeout_s=0.01, clock=SystemClock()
    )
    async with aclosing(frames()) as stream:
        with pytest.raises(StaleEpoch, match="the reader went away"):
            await intake._next(stream, session)
    assert session.on_release is None
    intake.close()


async def test_blocks_stay_quarantined_while_a_write_of_an_ended_push_goes_on() -> None:
    sessions = mock.Mock()
    intake: Any = mock.Mock()
    writing = intake.start_write.return_value = asyncio.get_running_loop().create_future()
    push = _IncomingPush(intake, sessions, mock.sentinel.session, mock.Mock())
    chunk = ChunkFrame(KvChunk(1, 0, Span(0, 1, 0, 1), 0), memoryview(b"kv"))
    task = asyncio.create_task(push.write(chunk))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    push.close(Cancelled("the sender went away"))
    sessions.push_ended.assert_called_once()
    sessions.writes_ended.assert_not_called()
    writing.set_result(None)
    await asyncio.sleep(0)
    sessions.writes_ended.assert_called_once_with(mock.sentinel.session)
