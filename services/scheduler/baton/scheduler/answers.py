"""Answers kept of identical requests. Best effort: a slow or missing cache never fails a request.

Only where the caller allows it and the request determines the answer. The key covers the model's
fingerprint and the tenant's salt, so no tenant sees what another one was answered.
"""

from __future__ import annotations

from dataclasses import replace

from baton.core.answer_key import answer_key, is_determined
from baton.core.errors import BatonError
from baton.core.request import RequestStatus
from baton.core.stages import StageName
from baton.rpc.cache_access import CacheAccess
from baton.rpc.metrics import Metrics
from baton.rpc.tasks import Tasks
from baton.scheduler.live import LiveRequest
from baton.scheduler.relay import begun
from baton.scheduler.scheduler_metrics import SchedulerMetrics
from baton.scheduler.view import ClusterWatch
from baton.wire.inference.chunks import Chunk
from baton.wire.inference.kept_answer import answer_part, chunks_of_answer
from baton.wire.inference.serving import Emit

MAX_ANSWER_BYTES = 1 << 20
"""Larger answers are not kept."""
_STORE_TIMEOUT_S = 5.0
_MAX_STORES = 64
"""Under way at a time; more answers are not kept."""
_WHOLE = frozenset({"stop", "length"})


class Answers:
    """The cache service's answers, as one scheduler uses them."""

    def __init__(
        self, cluster: ClusterWatch, cache: CacheAccess, metrics: Metrics, timeout_s: float
    ) -> None:
        self._cluster = cluster
        self._cache = cache
        self._timeout_s = timeout_s
        self._tasks = Tasks("answers")
        self._count = metrics.counter(
            "kept_answers", "Requests that allow a kept answer, by what came of it", ("outcome",)
        )

    def digest(self, live: LiveRequest) -> bytes:
        """Fingerprint of what computes the answer; empty where the workers differ."""
        fingerprint = self._cluster.fingerprint(live.asked.model)
        return live.output.digest or (fingerprint.digest() if fingerprint else b"")

    def key(self, live: LiveRequest) -> bytes | None:
        """What the request's answer is kept under; None where it must not be kept."""
        asked = live.asked
        if not asked.job.can_reuse_answer or not is_determined(asked.job.sampling):
            return None
        if not (digest := self.digest(live)):
            return None
        return answer_key(
            digest,
            asked.job.cache_salt,
            asked.prompt_ids,
            asked.sampling,
            keep_special_tokens=asked.job.keep_special_tokens,
        )

    async def find(self, key: bytes) -> list[Chunk] | None:
        """The whole answer, if one is kept and comes in time."""
        peer = self._cache.replica(key)
        if peer is None:
            self._count.labels("failed").inc()
            return None
        try:
            content = await peer.answer(key, timeout_s=self._timeout_s)
            chunks = chunks_of_answer(content) if content else None
        except BatonError as error:
            self._cache.failed(peer, error)
            self._count.labels("failed").inc()
            return None
        self._count.labels("miss" if chunks is None else "hit").inc()
        return chunks

    def recorded(self, key: bytes, live: LiveRequest, emit: Emit) -> Emit:
        """As `emit`, and keeps what went out once it has ended well."""
        parts: list[bytes] = []
        num_bytes = 0

        async def record(chunk: Chunk) -> None:
            nonlocal num_bytes
            await emit(chunk)
            if num_bytes > MAX_ANSWER_BYTES:
                return
            parts.append(answer_part(chunk))
            num_bytes += len(parts[-1])
            if num_bytes > MAX_ANSWER_BYTES:
                parts.clear()
                self._count.labels("not_kept").inc()
                return
            is_whole = chunk.finish_reason in _WHOLE
            # Other workers may have come, and computed it, since the key was made.
            if is_whole and self.key(live) == key:
                self._keep(key, b"".join(parts))
            elif is_whole:
                self._count.labels("not_kept").inc()

        return record

    async def close(self) -> None:
        """Ends what is still being kept."""
        await self._tasks.stop()

    def _keep(self, key: bytes, answer: bytes) -> None:
        if len(self._tasks) >= _MAX_STORES:
            self._count.labels("not_kept").inc()
            return
        self._tasks.spawn(self._store(key, answer), "keep an answer")

    async def _store(self, key: bytes, answer: bytes) -> None:
        peer = self._cache.replica(key)
        is_kept = False
        if peer is not None:
            try:
                is_kept = await peer.store_answer(key, answer, timeout_s=_STORE_TIMEOUT_S)
            except BatonError as error:
                self._cache.failed(peer, error)
        self._count.labels("kept" if is_kept else "not_kept").inc()


async def replay(
    live: LiveRequest, chunks: list[Chunk], emit: Emit, metrics: SchedulerMetrics
) -> None:
    """Sends a kept answer as it was sent the first time, and ends the request."""
    live.timeline.first_token(StageName.ANSWER_LOOKUP)
    metrics.ttft_s.observe(live.timeline.stages.ttft_s or 0.0)
    for index, kept in enumerate(chunks):
        live.output.ids.extend(kept.token_ids)
        metrics.sent(len(kept.token_ids))
        chunk = replace(kept, request_id=live.request_id, model=live.asked.model)
        if index == 0:
            chunk = begun(chunk, live)
        if chunk.finish_reason:
            live.output.finish_reason = chunk.finish_reason
            stages = tuple(live.timeline.stages.stages)
            chunk = replace(chunk, trace_id=live.trace_id, stages=stages)
        await emit(chunk)
    live.state.end(RequestStatus.FINISHED, live.clock.now())
