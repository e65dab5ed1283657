"""Wait for a condition instead of sleeping."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from inspect import isawaitable
from typing import Any


async def eventually(
    condition: Callable[[], Any | Awaitable[Any]], timeout_s: float = 5.0, interval_s: float = 0.01
) -> Any:
    """Returns the condition's first truthy value; fails when there is none within the time.

    The condition may be a coroutine function. An AssertionError that it raises counts as "not yet".
    """
    ends_at = time.monotonic() + timeout_s
    last: object = None
    while True:
        try:
            value = condition()
            if isawaitable(value):
                value = await value
            if value:
                return value
            last = value
        except AssertionError as error:
            last = error
        if time.monotonic() >= ends_at:
            raise AssertionError(f"not true within {timeout_s} s; last: {last!r}")
        await asyncio.sleep(interval_s)
