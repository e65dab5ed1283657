"""Background tasks that cannot die unseen."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, TypeVar

from baton.core.clock import Clock
from baton.rpc.logs import log_failure
from baton.wire.clock import ended_within

logger = logging.getLogger(__name__)
ResultT = TypeVar("ResultT")


class Tasks:
    """The background tasks of one owner, which must await `stop`.

    An exception that ends a task is logged as an error, and `on_failure` is called: where the
    process cannot do without the tasks, that is `Lifecycle.fail`.
    """

    def __init__(self, owner: str, on_failure: Callable[[], None] | None = None) -> None:
        """`owner` stands in log lines."""
        self._owner = owner
        self.on_failure = on_failure
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(
        self, work: Coroutine[Any, Any, ResultT], name: str, *, context: Context | None = None
    ) -> asyncio.Task[ResultT]:
        """Starts a task; `context` replaces a copy of the caller's."""
        task = asyncio.get_running_loop().create_task(work, name=name, context=context)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def finish(self, clock: Clock, timeout_s: float) -> None:
        """Waits for all tasks, and cancels those that take longer."""
        await ended_within(clock, self._tasks, timeout_s)
        await self.stop()

    async def stop(self) -> None:
        """Cancels all tasks and waits for their end."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            names = {"owner": self._owner, "task": task.get_name()}
            log_failure(logger, "background task failed", error, **names)
            if self.on_failure is not None:
                self.on_failure()
