"""Inputs to vectors: tokenize, choose a prefill worker, and another one when it fails."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator

from baton.core.cluster import Member
from baton.core.embedding import shaped
from baton.core.errors import (
    BatonError,
    Internal,
    InvalidRequest,
    NoWorker,
    PromptTooLong,
)
from baton.core.roles import Role
from baton.scheduler.attempt import SchedulerDeps
from baton.scheduler.live import worker_request_id
from baton.scheduler.placer import AttemptFailed, Failover, Verdict
from baton.wire.clock import ended_within
from baton.wire.inference.vectors import Embedding, EmbedRequest
from baton.wire.orders import EmbedOrder

logger = logging.getLogger(__name__)
MAX_AT_ONCE = 16
"""Inputs of one request that are computed side by side."""


class Embedder:
    """Runs requests for vectors. One per process."""

    def __init__(self, deps: SchedulerDeps) -> None:
        self._deps = deps
        self._cluster = deps.cluster
        self._clock = deps.clock
        self._running: set[asyncio.Task[object]] = set()

    @property
    def num_running(self) -> int:
        """Requests for vectors that run."""
        return len(self._running)

    async def embed(self, job: EmbedRequest, timeout_s: float) -> AsyncGenerator[Embedding, None]:
        """Vectors in the order in which they are done. Closing it early cancels the others.

        Raises:
            BatonError: one of the inputs failed.
        """
        with self._deps.entrance.entered(job.priority):
            ends_at_s = self._clock.now() + timeout_s
            model = self._cluster.resolve_model(job.model)
            places = asyncio.Semaphore(MAX_AT_ONCE)

            async def one(index: int) -> Embedding:
                async with places:
                    return await self._one(job, model, index, ends_at_s)

            tasks = [asyncio.create_task(one(index)) for index in range(len(job.inputs))]
            caller = asyncio.current_task()
            if caller is not None:
                self._running.add(caller)
            try:
                for done in asyncio.as_completed(tasks):
                    yield await done
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                if caller is not None:
                    self._running.discard(caller)

    async def drain(self, grace_s: float) -> None:
        """Refuses new requests, and waits for the running ones."""
        self._deps.entrance.close()
        await ended_within(self._clock, set(self._running), grace_s)

    async def _one(self, job: EmbedRequest, model: str, index: int, ends_at_s: float) -> Embedding:
        prompt = job.inputs[index]
        if isinstance(prompt, tuple):
            token_ids = prompt
        else:
            token_ids = await self._deps.encoder.encode(
                model, prompt, ends_at_s - self._clock.now()
            )
        limit = self._cluster.max_model_len_tokens(model)
        if not token_ids:
            raise InvalidRequest(f"input {index} is empty; it must have at least one token")
        if limit and len(token_ids) > limit:
            raise PromptTooLong(
                f"input {index} has {len(token_ids)} tokens and model {model!r} takes {limit}"
            )
        failover = Failover(self._deps.settings.max_attempts, self._deps.rng)
        request_id = worker_request_id(f"{job.request_id}-{index}", self._deps.rng)
        while True:
            worker = self._choose(model, failover.excluded)
            attempt = failover.num_failures + 1
            order = EmbedOrder(
                request_id, attempt, token_ids, job.pooling, job.priority, job.cache_salt
            )
            try:
                with self._cluster.prefilling(worker.worker_id, len(token_ids)):
                    answer = await self._deps.peers.prefill(worker).embed(
                        order, ends_at_s - self._clock.now()
                    )
            except BatonError as error:
                await self._recover(failover, AttemptFailed("embed", worker.worker_id, error))
            else:
                vector = shaped(answer.values, job.dimensions, is_scaled=job.is_scaled)
                if not math.isfinite(sum(vector)):
                    raise Internal("the model computed an embedding that is not finite")
                return Embedding(
                    index, vector, len(token_ids), answer.num_cached_tokens, model, job.request_id
                )

    def _choose(self, model: str, excluded: frozenset[str]) -> Member:
        """The prefill worker with the fewest tokens waiting; one that failed only as a last one."""
        usable = self._cluster.view().usable(Role.PREFILL, self._clock.now(), model=model)
        if not usable:
            raise NoWorker(
                f"no prefill worker of model {model!r} is ready, which embeddings need",
                retry_after_s=1.0,
            )
        fresh = [member for member in usable if member.worker_id not in excluded] or usable
        loads = self._cluster.loads()

        def num_waiting(member: Member) -> int:
            own = loads.get(member.worker_id)
            return max(own.prefill_tokens if own else 0, member.rates.queued_prefill_tokens)

        return min(fresh, key=num_waiting)

    async def _recover(self, failover: Failover, failure: AttemptFailed) -> None:
        """Gets ready for another attempt, or raises why there is none."""
        verdict = failover.judge(failure)
        if failure.is_unreachable:
            self._cluster.suspect(failure.worker_id)
        if verdict is Verdict.GIVE_UP:
            raise failure.error
        logger.info("embedding failed", extra={"worker": failure.worker_id})
        if verdict is Verdict.RETRY:
            await self._clock.sleep(failover.backoff_s())
