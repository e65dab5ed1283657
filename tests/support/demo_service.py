"""A service of no use, run as a process of its own: `python -m tests.support.demo_service`.

It answers on a raw method `/demo.v1.DemoService/Wait`, a stream: "started", then "done" when the
file named by its settings exists.
"""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, ClassVar

import grpc

from baton.core.errors import ModelNotFound
from baton.rpc.process import Runtime, ServiceSnapshot, main
from baton.rpc.settings import ServiceSettings

NAME = "demo.v1.DemoService"


class DemoSettings(ServiceSettings):
    """Its settings."""

    role: ClassVar[str] = "demo"
    gate_file: str = ""
    """Waiting calls end when this file exists."""
    load_file: str = ""
    """Loading ends when this file exists; empty: at once."""
    load_in_thread_s: float = 0.0
    """Load in a thread that cannot be interrupted for so long."""
    fails: bool = False
    """Fail to load."""
    refuses: bool = False
    """Fail to load, for a reason that the user can do something about."""


async def _appears(path: str) -> None:
    while path and not Path(path).exists():  # noqa: ASYNC110
        await asyncio.sleep(0.01)


class DemoService(grpc.GenericRpcHandler):
    """See baton.rpc.runtime.Service."""

    def __init__(self, runtime: Runtime[DemoSettings]) -> None:
        self._runtime = runtime
        self._running: set[asyncio.Task[Any] | None] = set()
        self._has_loaded = False

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        if handler_call_details.method != f"/{NAME}/Wait":
            return None
        return grpc.unary_stream_rpc_method_handler(self._wait)

    async def _wait(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        task = asyncio.current_task()
        self._running.add(task)
        try:
            yield b"started"
            await _appears(self._runtime.settings.gate_file)
            yield b"done"
        finally:
            self._running.discard(task)

    def register(self, server: grpc.aio.Server) -> list[str]:
        server.add_generic_rpc_handlers((self,))
        return [NAME]

    async def start(self) -> None:
        self._runtime.report_progress(0.25, "a quarter")
        await asyncio.to_thread(time.sleep, self._runtime.settings.load_in_thread_s)
        await _appears(self._runtime.settings.load_file)
        if self._runtime.settings.fails:
            raise RuntimeError("the weights are missing")
        if self._runtime.settings.refuses:
            raise ModelNotFound("there is no such directory")
        self._has_loaded = True

    def snapshot(self) -> ServiceSnapshot:
        if not self._has_loaded:
            raise RuntimeError("nothing is known yet")
        return ServiceSnapshot(
            model="demo",
            kv_blocks={"free": 7},
            num_running=len(self._running),
            stats={"num_frozen_objects": gc.get_freeze_count()},
        )

    def kv_snapshot(self) -> tuple[int, list[bytes]]:
        return 3, [b"h" * 16]

    async def drain(self, grace_s: float) -> None:
        while self._running:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        Path(os.environ["DEMO_STOPPED"]).touch()


if __name__ == "__main__":
    main(DemoSettings, "tests.support.demo_service:DemoService")
