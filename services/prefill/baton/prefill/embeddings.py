"""Prompts computed for their vectors: nothing is pushed, and only prefix cache is kept."""

from __future__ import annotations

import asyncio

from baton.core.clock import Clock
from baton.core.embedding import Pooling
from baton.core.errors import Internal
from baton.core.sequence import SequenceSpec
from baton.engine.events import Embedded, EngineEvent, Failed, Started
from baton.engine.worker import EngineWorker
from baton.prefill.prefix import PrefixSource
from baton.wire.prefill import PromptVector

_ENGINE_CHECK_INTERVAL_S = 5.0


class EmbeddingRunner:
    """Has the engine compute prompts, and gives every block back on every path."""

    def __init__(self, worker: EngineWorker, prefix: PrefixSource, clock: Clock) -> None:
        self._worker = worker
        self._engine = worker.engine
        self._prefix = prefix
        self._clock = clock
        self._num_running = 0
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    async def wait_idle(self) -> None:
        """Returns once none is being computed."""
        await self._is_idle.wait()

    async def embed(self, spec: SequenceSpec) -> PromptVector:
        """A prompt's vector. Cancelling the call ends the computation.

        Raises:
            BatonError: the prompt was refused, or failed.
        """
        self._num_running += 1
        self._is_idle.clear()
        try:
            if spec.pooling is not Pooling.MEAN:
                await self._prefix.fetch(spec)
            return await self._compute(spec)
        finally:
            self._worker.unsubscribe(spec.seq_id)
            self._engine.sequences.release(spec.seq_id)
            self._num_running -= 1
            if not self._num_running:
                self._is_idle.set()

    async def _compute(self, spec: SequenceSpec) -> PromptVector:
        values: asyncio.Future[tuple[float, ...]] = asyncio.get_running_loop().create_future()
        num_cached_tokens = 0

        def on_event(event: EngineEvent) -> None:
            nonlocal num_cached_tokens
            match event:
                case Started():
                    num_cached_tokens = event.num_cached_tokens
                case Embedded() if not values.done():
                    values.set_result(event.values)
                case Failed() if not values.done():
                    values.set_exception(event.error)

        self._worker.subscribe(spec.seq_id, on_event)
        self._engine.sequences.submit(spec)
        while True:
            try:
                async with self._clock.timeout(_ENGINE_CHECK_INTERVAL_S):
                    return PromptVector(await asyncio.shield(values), num_cached_tokens)
            except TimeoutError:
                if not self._worker.is_alive:
                    raise Internal("the engine has stopped") from None
