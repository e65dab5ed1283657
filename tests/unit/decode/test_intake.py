from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import pytest

from baton.core.errors import Cancelled, StaleEpoch
from baton.decode.intake import Intake


async def test_a_release_may_come_as_the_time_limit_ends() -> None:
    session: Any = SimpleNamespace(error=None, on_release=None)

    async def frames() -> AsyncGenerator[Any, None]:
        try:
            await asyncio.Event().wait()
        finally:
            session.error = Cancelled("the reader went away")
            session.on_release()
        yield None

    worker: Any = SimpleNamespace(engine=None)
    nobody: Any = SimpleNamespace(stop=lambda: None)
    intake = Intake(worker, nobody, nobody, num_credits=1, progress_timeout_s=0.01)
    async with aclosing(frames()) as stream:
        with pytest.raises(StaleEpoch, match="the reader went away"):
            await intake._next(stream, session)
    assert session.on_release is None
    intake.close()
