"""A prefill worker that makes faults on purpose: `python -m tests.support.faulty_prefill`.

The variable FAULTS_VARIABLE holds them: see `tests.support.faults`. Settings are the service's own.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

from baton.core.sequence import SequenceSpec
from baton.engine.events import BlocksReady, LayersReady
from baton.handoff.push_stream import PushStream
from baton.prefill.service import PrefillService
from baton.prefill.settings import PrefillSettings
from baton.rpc.process import main
from tests.support.faults import NO_FAULTS, FaultPlan, Faults, FaultyStream
from tests.support.system import FAULTS_VARIABLE


class FaultyPrefillService(PrefillService):
    """The service, with faults at its seams: the stream of a push, and the engine's events."""

    def __init__(self, runtime: Any, text: str) -> None:
        super().__init__(runtime)
        self._plan = FaultPlan(text)
        self._faults: dict[str, Faults] = {}
        """By sequence."""
        self._delivering: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        await super().start()
        worker, prefix = self.loaded().host.worker, self.loaded().prefix
        fetch, subscribe = prefix.fetch, worker.subscribe

        async def fetch_late(spec: SequenceSpec) -> int:
            request_id, _, attempt = spec.seq_id.rpartition("/")
            faults = self._faults[spec.seq_id] = self._plan.next(request_id, int(attempt))
            await asyncio.sleep(faults.delay_start_s)
            return await fetch(spec)

        def subscribe_late(seq_id: str, callback: Callable[[Any], None]) -> None:
            delay_s = self._faults[seq_id].delay_chunk_s
            subscribe(seq_id, self._late(callback, delay_s) if delay_s else callback)

        prefix.fetch = fetch_late  # type: ignore[method-assign]
        worker.subscribe = subscribe_late  # type: ignore[method-assign]

    def connect(self, spec: SequenceSpec, target: Any) -> PushStream:
        stream = super().connect(spec, target)
        faults = self._faults[spec.seq_id]
        return stream if faults == NO_FAULTS else FaultyStream(stream, faults)

    def _late(self, callback: Callable[[Any], None], delay_s: float) -> Callable[[Any], None]:
        """A callback that gets events in order, each chunk's `delay_s` late, and no layers."""
        events: asyncio.Queue[Any] = asyncio.Queue()

        async def deliver() -> None:
            while True:
                event = await events.get()
                if isinstance(event, BlocksReady):
                    await asyncio.sleep(delay_s)
                if not isinstance(event, LayersReady):
                    callback(event)

        self._delivering.add(asyncio.create_task(deliver()))
        return events.put_nowait

    async def stop(self) -> None:
        for task in self._delivering:
            task.cancel()
        await super().stop()


def faulty(text: str) -> Callable[[Any], FaultyPrefillService]:
    """Builds the service with faults."""
    return lambda runtime: FaultyPrefillService(runtime, text)


def build(runtime: Any) -> FaultyPrefillService:
    """The service of a process."""
    return FaultyPrefillService(runtime, os.environ[FAULTS_VARIABLE])


if __name__ == "__main__":
    main(PrefillSettings, "tests.support.faulty_prefill:build")
