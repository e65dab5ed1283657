"""Compiles guides on a few threads, beside the event loop and the engine's thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from baton.core.errors import InvalidRequest, QueueFull
from baton.core.guide import Guide

_NUM_THREADS = 2
_MAX_WAITING = 64
_QUEUE_TIMEOUT_S = 10.0
_COMPILE_TIMEOUT_S = 10.0
_RETRY_AFTER_S = 1.0


class GuideCompiler:
    """Belongs to one event loop. Each guide is compiled once, however many requests wait for it."""

    def __init__(self, compile_guide: Callable[[Guide], object]) -> None:
        """Calls `compile_guide`, which keeps what it compiled, on its threads."""
        self._compile_guide = compile_guide
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "baton-grammar")
        self._places = asyncio.Semaphore(_NUM_THREADS)
        self._num_waiting = 0
        self._running: dict[Guide, asyncio.Future[object]] = {}

    async def compile(self, guide: Guide) -> None:
        """Compiles a guide. The time limit covers the compiling, not the wait for a thread.

        Raises:
            InvalidRequest: the guide is refused, or takes too long.
            Unsupported: the model has no tokenizer for guides.
            QueueFull: too many guides wait, or no thread became free in time.
        """
        if guide not in self._running:
            await self._wait_for_thread()
            if guide in self._running:  # begun for another request meanwhile
                self._places.release()
            else:
                self._start(guide)
        try:
            async with asyncio.timeout(_COMPILE_TIMEOUT_S):
                # The thread cannot be stopped: it keeps its place until it is done.
                await asyncio.shield(self._running[guide])
        except TimeoutError:
            raise InvalidRequest(
                f"guide.{guide.kind.value} took longer than {_COMPILE_TIMEOUT_S:g} s to compile; "
                "make it smaller"
            ) from None

    def close(self) -> None:
        """Starts no more; does not wait for the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _wait_for_thread(self) -> None:
        if self._num_waiting >= _MAX_WAITING:
            raise QueueFull("too many guides wait to be compiled", retry_after_s=_RETRY_AFTER_S)
        self._num_waiting += 1
        try:
            async with asyncio.timeout(_QUEUE_TIMEOUT_S):
                await self._places.acquire()
        except TimeoutError:
            raise QueueFull(
                f"other guides kept all compiler threads busy for {_QUEUE_TIMEOUT_S:g} s",
                retry_after_s=_RETRY_AFTER_S,
            ) from None
        finally:
            self._num_waiting -= 1

    def _start(self, guide: Guide) -> None:
        loop = asyncio.get_running_loop()
        running = loop.run_in_executor(self._threads, self._compile_guide, guide)
        self._running[guide] = running

        def ended(_: object) -> None:
            del self._running[guide]
            self._places.release()
            # After a timeout there is no caller left to take the error.
            if not running.cancelled():
                running.exception()

        running.add_done_callback(ended)
