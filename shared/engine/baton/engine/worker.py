"""The engine's thread, and its bridge to asyncio.

The thread owns all tensors. Events cross over in batches, one `call_soon_threadsafe` per step;
callbacks run on the event loop. Commands go straight to `Engine`, whose lock is never held for
long.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Sequence

from baton.core.errors import Internal
from baton.core.guide import Guide
from baton.engine.config import EngineConfig, OnProgress
from baton.engine.engine import Engine
from baton.engine.events import EngineEvent, Failed
from baton.engine.guide_compiler import GuideCompiler

_IDLE_WAIT_S = 0.5
_JOIN_TIMEOUT_S = 10.0

logger = logging.getLogger(__name__)

Callback = Callable[[EngineEvent], None]


class EngineWorker:
    """An engine in its thread. Made by `start`; all methods belong to the loop that started it."""

    def __init__(self, config: EngineConfig, on_progress: OnProgress | None) -> None:
        self._loop = asyncio.get_running_loop()
        self._loaded: asyncio.Future[Engine] = self._loop.create_future()
        self._on_progress = on_progress
        self._callbacks: dict[str, Callback] = {}
        self._compiler = GuideCompiler(lambda guide: self.engine.grammars.compile(guide))
        self._is_stopping = False
        self._thread = threading.Thread(
            target=self._run, args=(config,), name="baton-engine", daemon=True
        )

    @classmethod
    async def start(
        cls, config: EngineConfig, on_progress: OnProgress | None = None
    ) -> EngineWorker:
        """Loads the model in the engine's thread, and starts computing.

        Raises:
            ModelNotFound, Unsupported, InvalidRequest: it cannot be served.
        """
        worker = cls(config, on_progress)
        worker._thread.start()
        try:
            await worker._loaded
        except asyncio.CancelledError:
            worker._is_stopping = True
            raise
        return worker

    @property
    def engine(self) -> Engine:
        """The engine."""
        return self._loaded.result()

    @property
    def is_alive(self) -> bool:
        """True while the thread computes."""
        return self._thread.is_alive() and not self._is_stopping

    def subscribe(self, seq_id: str, callback: Callback) -> None:
        """Has a sequence's events delivered, in order. Call it before the sequence starts."""
        self._callbacks[seq_id] = callback

    def unsubscribe(self, seq_id: str) -> None:
        """Ends the delivery. Idempotent."""
        self._callbacks.pop(seq_id, None)

    async def prepare(self, guide: Guide | None) -> None:
        """Compiles a guide. Call it before the sequence is submitted or reserved.

        Raises:
            InvalidRequest, Unsupported, QueueFull: see GuideCompiler.compile.
        """
        if guide is not None and guide not in self.engine.grammars:
            await self._compiler.compile(guide)

    async def stop(self) -> None:
        """Ends the thread after the step under way, and lets go of the KV. Idempotent."""
        self._is_stopping = True
        self._compiler.close()
        if self._loaded.done() and not self._loaded.cancelled() and not self._loaded.exception():
            self.engine.notify()
        await asyncio.to_thread(self._thread.join, _JOIN_TIMEOUT_S)

    def _run(self, config: EngineConfig) -> None:
        try:
            engine = Engine(config, self._report)
        except Exception as error:  # noqa: BLE001 - the caller of `start` gets it
            self._call(self._set_loaded, None, error)
            return
        # A compile on the event loop or on this thread would hold up every stream.
        engine.grammars.compiles_on_demand = False
        engine.deliver_with(lambda: self._send(engine.drain_events()))
        self._call(self._set_loaded, engine, None)
        try:
            while not self._is_stopping:
                has_stepped = engine.step()
                self._send(engine.drain_events())
                if not has_stepped:
                    engine.wait(_IDLE_WAIT_S)
        except Exception:
            logger.exception("engine died")
        engine.fail_all(Internal("the engine has stopped"))
        self._send(engine.drain_events())
        engine.close()

    def _set_loaded(self, engine: Engine | None, error: Exception | None) -> None:
        if self._loaded.done():
            return
        if engine is not None:
            self._loaded.set_result(engine)
        elif error is not None:
            self._loaded.set_exception(error)

    def _report(self, fraction: float, text: str) -> None:
        if self._on_progress is not None:
            self._call(self._on_progress, fraction, text)

    def _send(self, events: Sequence[EngineEvent]) -> None:
        if events:
            self._call(self._deliver, events)

    def _call(self, function: Callable[..., None], *args: object) -> None:
        # The loop may be closed already when a process goes down hard.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *args)

    def _deliver(self, events: Sequence[EngineEvent]) -> None:
        for event in events:
            callback = self._callbacks.get(event.seq_id)
            if callback is None:
                continue
            try:
                callback(event)
            except Exception:
                # The other events of this step belong to other requests.
                logger.exception("a sequence's callback failed", extra={"seq_id": event.seq_id})
                if isinstance(event, Failed):
                    self.unsubscribe(event.seq_id)
                else:
                    error = Internal("the sequence's reader failed")
                    self.engine.sequences.fail(event.seq_id, error)
