"""Prompts being computed and pushed, and the copies kept of them: the one owner of their blocks.

Every path ends in the engine's release, or in a hold whose lease ends there. Everything here runs
on the event loop; the engine computes on its own thread.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from baton.core.clock import Clock
from baton.core.errors import BatonError, Internal, StaleEpoch
from baton.core.sequence import SequenceSpec
from baton.engine.events import BlocksReady, EngineEvent, Failed, LayersReady, Started, Tokens
from baton.engine.worker import EngineWorker
from baton.handoff.sender import PushReport, PushSender
from baton.prefill.computed_chunks import ComputedChunks
from baton.prefill.holds import Hold, Holds
from baton.prefill.prefix import PrefixSource
from baton.prefill.spans import Recorder
from baton.wire.prefill import FirstToken, PrefillDone, PrefillEvent, PrefillStarted, PushTarget
from baton.worker.tokens import merge

logger = logging.getLogger(__name__)
_ENGINE_CHECK_INTERVAL_S = 5.0


@dataclass(frozen=True, slots=True)
class Job:
    """A prompt to compute, and where its KV goes."""

    request_id: str
    attempt: int
    spec: SequenceSpec
    target: PushTarget | None
    recorder: Recorder


MakeSender = Callable[[SequenceSpec, PushTarget], PushSender]


class _Running:
    """One job's news, from the engine and from its push."""

    def __init__(self, job: Job, clock: Clock) -> None:
        self.job = job
        self._clock = clock
        self.is_unwanted = False
        """The scheduler released the copy before the push ended, so none is kept."""
        self.report: PushReport | None = None
        """Of the committed push."""
        self.failure: asyncio.Future[BatonError] = asyncio.get_running_loop().create_future()
        """Done with the error that ended the job, once one has."""
        self._events: list[EngineEvent] = []
        self._has_news = asyncio.Event()

    def put(self, event: EngineEvent) -> None:
        """Takes an event of the engine. A prompt has few: one per step that computes it."""
        if isinstance(event, Failed):
            self.fail(event.error)
            return
        self._events.append(event)
        self._has_news.set()

    def fail(self, error: BatonError) -> None:
        """Ends the job; the first error counts."""
        if not self.failure.done():
            self.failure.set_result(error)
        self._has_news.set()

    async def next(self, worker: EngineWorker) -> EngineEvent:
        """The next event. Raises the error given to `fail`."""
        while True:
            if self.failure.done():
                raise self.failure.result()
            if self._events:
                return self._events.pop(0)
            self._has_news.clear()
            try:
                async with self._clock.timeout(_ENGINE_CHECK_INTERVAL_S):
                    await self._has_news.wait()
            except TimeoutError:
                if not worker.is_alive:
                    raise Internal("the engine has stopped") from None


class Jobs:
    """All jobs and kept copies of the worker."""

    def __init__(
        self,
        worker: EngineWorker,
        prefix: PrefixSource,
        *,
        worker_id: str,
        hold_lease_s: float,
        clock: Clock,
        make_sender: MakeSender,
    ) -> None:
        self._worker = worker
        self._engine = worker.engine
        self._block_size = worker.engine.fingerprint.layout.block_size
        self._prefix = prefix
        self._worker_id = worker_id
        self._clock = clock
        self._make_sender = make_sender
        self._running: dict[str, _Running] = {}
        self._holds = Holds(hold_lease_s)
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self.num_holds_expired = 0
        self.push_bytes_per_s = 0.0

    def __len__(self) -> int:
        return len(self._running)

    @property
    def num_holds(self) -> int:
        """Copies kept."""
        return len(self._holds)

    async def wait_idle(self) -> None:
        """Returns once nothing is being computed or pushed."""
        await self._is_idle.wait()

    async def run(self, job: Job) -> AsyncGenerator[PrefillEvent, None]:
        """Does a job to its end. Closing this early stops it and frees what it held.

        Raises:
            StaleEpoch: this attempt or a later one is here already, or came meanwhile.
            BatonError: computation or push failed.
        """
        self._replace_older(job)
        seq_id = job.spec.seq_id
        running = _Running(job, self._clock)
        self._running[seq_id] = running
        self._is_idle.clear()
        try:
            async with aclosing(self._compute(running)) as events:
                async for event in events:
                    yield event
        finally:
            self._worker.unsubscribe(seq_id)
            del self._running[seq_id]
            if running.report is not None and not running.is_unwanted:
                self._holds.add(seq_id, job.request_id, job.attempt, self._clock.now())
            else:
                self._engine.sequences.release(seq_id)
            if not self._running:
                self._is_idle.set()

    def release(self, request_id: str, attempt: int) -> int:
        """Lets go of the copies kept of a request; returns the number of blocks.

        The decode worker may be so quick that this comes before the job here knows that its push
        is committed: then the copy is not kept at all.
        """
        for running in self._running.values():
            job = running.job
            if job.request_id == request_id and attempt in {0, job.attempt}:
                running.is_unwanted = True
        return sum(self._let_go(hold) for hold in self._holds.take(request_id, attempt))

    def end_all(self, error: BatonError) -> None:
        """Fails all jobs and lets go of all copies."""
        for running in self._running.values():
            running.fail(error)
        for hold in self._holds.take_all():
            self._let_go(hold)

    def sweep_once(self, now: float) -> None:
        """Lets go of copies whose lease has ended by `now`, and of the oldest one under pressure.

        Pressure means that prompts wait and nearly no block is free: a kept copy saves a
        computation that may come, a waiting prompt is one that has come.
        """
        expired = self._holds.take_expired(now)
        self.num_holds_expired += len(expired)
        if not expired and len(self._holds) and self._is_under_pressure():
            expired = self._holds.take_oldest()
        for hold in expired:
            logger.info("kept copy let go", extra={"request_id": hold.request_id})
            self._let_go(hold)

    def _is_under_pressure(self) -> bool:
        counts = self._engine.kv_counts()
        num_usable = counts["free"] + counts["cached"]
        return self._engine.stats().num_waiting > 0 and num_usable * 20 < sum(counts.values())

    def _let_go(self, hold: Hold) -> int:
        return self._engine.sequences.release(hold.seq_id)

    def _replace_older(self, job: Job) -> None:
        for running in self._running.values():
            other = running.job
            if other.request_id == job.request_id and other.attempt >= job.attempt:
                raise StaleEpoch(
                    f"attempt {job.attempt} of request {job.request_id} comes too late: "
                    f"attempt {other.attempt} is here"
                )
        for running in self._running.values():
            if running.job.request_id == job.request_id:
                running.fail(StaleEpoch(f"attempt {job.attempt} replaced it"))
        for hold in self._holds.take(job.request_id):
            self._let_go(hold)

    async def _compute(self, running: _Running) -> AsyncGenerator[PrefillEvent, None]:
        job = running.job
        arrived_at_s = self._clock.now()
        num_fetched = await self._prefix.fetch(job.spec)
        self._worker.subscribe(job.spec.seq_id, running.put)
        self._engine.sequences.submit(job.spec)
        started_at_s = arrived_at_s
        progress = ComputedChunks(len(job.spec.token_ids), self._block_size)
        async with _Pushing(self, running) as pushing:
            while True:
                event = await running.next(self._worker)
                match event:
                    case Started():
                        started_at_s = event.at_s
                        progress.started(event.at_s, event.num_cached_tokens)
                        pushing.start()
                        pushing.ready(event.num_cached_tokens // self._block_size)
                        yield self._started(job, event, arrived_at_s, num_fetched)
                    case LayersReady():
                        pushing.layers_ready(event.num_blocks, event.layer_end)
                    case BlocksReady():
                        progress.computed(event.num_blocks, event.at_s)
                        pushing.ready(event.num_blocks)
                    case Tokens():
                        break
            self._prefix.offer(job.spec)
            job.recorder.computed(started_at_s, event.at_s)
            if event.finish_reason is None:
                pushing.finish(event)
            else:
                await pushing.stop()
            yield FirstToken(merge([event]), event.at_s - started_at_s, progress.chunks)
            if event.finish_reason is None:
                running.report = await pushing.report()
            yield running.report or PrefillDone()

    def _started(
        self, job: Job, event: Started, since_s: float, num_fetched: int
    ) -> PrefillStarted:
        started = PrefillStarted(
            queue_s=event.at_s - since_s,
            cached_tokens=event.num_cached_tokens,
            fetched_tokens=min(num_fetched * self._block_size, event.num_cached_tokens),
        )
        job.recorder.queued(since_s, event.at_s, started)
        return started

    def make_sender(self, job: Job) -> PushSender | None:
        """The push of a job, if it has a target."""
        return None if job.target is None else self._make_sender(job.spec, job.target)

    def run_push(self, push: PushSender, job: Job) -> asyncio.Task[PushReport]:
        """Runs a push beside the computation."""
        return asyncio.create_task(push.run(job.request_id, job.attempt, self._worker_id))

    def pushed(self, report: PushReport) -> None:
        """Updates the measured push rate from a finished push."""
        if report.active_s > 0.0:
            # Bytes of KV as it is computed: what placement asks about, however it travels.
            layout = self._engine.fingerprint.layout
            measured = report.num_blocks * layout.block_bytes / report.active_s
            known = self.push_bytes_per_s
            self.push_bytes_per_s = measured if not known else 0.8 * known + 0.2 * measured


class _Pushing:
    """A job's push, if it has a target: never outlives the job, and fails it when it fails."""

    def __init__(self, jobs: Jobs, running: _Running) -> None:
        self._jobs = jobs
        self._running = running
        self._push = jobs.make_sender(running.job)
        self._task: asyncio.Task[PushReport] | None = None

    async def __aenter__(self) -> _Pushing:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def start(self) -> None:
        """Opens the stream to the target."""
        if self._push is not None:
            self._task = self._jobs.run_push(self._push, self._running.job)
            self._task.add_done_callback(self._on_done)

    def ready(self, num_blocks: int) -> None:
        """So many blocks can be sent."""
        if self._push is not None:
            self._push.ready(num_blocks)

    def layers_ready(self, num_blocks: int, layer_end: int) -> None:
        """Of so many blocks, the layers before `layer_end` can be sent."""
        if self._push is not None:
            self._push.layers_ready(num_blocks, layer_end)

    def finish(self, event: Tokens) -> None:
        """The rest can be sent, and the manifest with the first token."""
        if self._push is not None:
            logprob = event.logprobs[0] if event.logprobs else None
            self._push.finish(event.token_ids[0], logprob, event.at_s)

    async def report(self) -> PushReport | None:
        """Waits for the commit; None without a target. Raises the error that ended the push."""
        if self._task is None:
            return None
        failure = self._running.failure
        waited: set[asyncio.Future[Any]] = {self._task, failure}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if failure.done():
            raise failure.result()
        report = self._task.result()
        self._jobs.pushed(report)
        self._running.job.recorder.pushed(report)
        return report

    async def stop(self) -> None:
        """Cancels the push unless it is over."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _on_done(self, task: asyncio.Task[PushReport]) -> None:
        if task.cancelled():
            return
        error = task.exception()
        if isinstance(error, BatonError):
            self._running.fail(error)
        elif error is not None:
            self._running.fail(Internal(f"push failed: {error!r}"))
