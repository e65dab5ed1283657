"""What goes to the caller: output relayed from any number of attempts, or a kept answer replayed.

An answer is kept only where the caller allows it and the request determines the answer. The key
covers the model's fingerprint and the tenant's salt, so no tenant sees what another one was
answered. Best effort: a slow or missing cache never fails a request.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from baton.core.answer_key import answer_key, is_determined
from baton.core.errors import BatonError
from baton.core.output import TokenBatch, TokenText
from baton.core.request import RequestStatus
from baton.core.sampling import FinishReason, TokenLogprob
from baton.core.stages import StageName
from baton.rpc.cache_access import CacheAccess
from baton.rpc.metrics import Metrics
from baton.rpc.tasks import Tasks
from baton.scheduler.live import LiveRequest
from baton.scheduler.scheduler_metrics import SchedulerMetrics
from baton.scheduler.text import TextOutput
from baton.scheduler.view import ClusterWatch
from baton.wire.inference.chunks import Chunk, Logprob, PlacementTaken, TopLogprob
from baton.wire.inference.kept_answer import answer_part, chunks_of_answer
from baton.wire.inference.serving import Emit
from baton.wire.tokenizer import TextReply

MAX_ANSWER_BYTES = 1 << 20
"""Larger answers are not kept."""
_STORE_TIMEOUT_S = 5.0
_MAX_STORES = 64
"""Most answers being stored at a time; others are not kept."""
_WHOLE = frozenset({"stop", "length"})
MAX_DESCRIBED_TOKENS = 8192
"""Most in one message. A prompt's log-probabilities may need more, which go in several."""


class OutputRelay:
    """Drops tokens that the caller has, turns the others into text, and ends the output once."""

    def __init__(
        self, live: LiveRequest, text: TextOutput, emit: Emit, metrics: SchedulerMetrics
    ) -> None:
        self._live = live
        self._text = text
        self._emit = emit
        self._metrics = metrics
        self._last_at_s: float | None = None
        self._has_begun = False

    async def feed(self, batch: TokenBatch) -> bool:
        """Sends the new tokens of a batch without gap; True if the output has ended."""
        self._live.output.count_drafts(batch)
        start = len(self._live.output.ids)
        num_known = start - batch.token_index if batch.token_ids else 0
        token_ids = batch.token_ids[num_known:]
        if not token_ids and batch.finish_reason is None:
            return False
        logprobs = batch.logprobs[num_known:]
        reply = await self._to_text(batch, token_ids, logprobs)
        # Negative if a replay to another tokenizer stopped within tokens that were sent before.
        num_shown = max(0, reply.num_tokens) if reply.stop else len(token_ids)
        await self._send(batch, token_ids[:num_shown], logprobs[:num_shown], reply)
        return batch.finish_reason is not None or bool(reply.stop)

    async def finish_at_limit(self) -> None:
        """Ends an output whose last token is out but whose worker died before it said so."""
        batch = TokenBatch(len(self._live.output.ids), (), finish_reason=FinishReason.LENGTH)
        await self.feed(batch)

    async def _to_text(
        self, batch: TokenBatch, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob]
    ) -> TextReply:
        describe = _described(*self._of_prompt(batch)) + _described(token_ids, logprobs)
        texts: list[TokenText] = []
        while len(describe) > MAX_DESCRIBED_TOKENS:
            part, describe = describe[:MAX_DESCRIBED_TOKENS], describe[MAX_DESCRIBED_TOKENS:]
            texts += (await self._text.add((), describe=part)).token_texts
        reply = await self._text.add(
            self._visible(batch, token_ids),
            describe=describe,
            is_last=batch.finish_reason is not None,
        )
        return replace(reply, token_texts=(*texts, *reply.token_texts)) if texts else reply

    def _of_prompt(self, batch: TokenBatch) -> tuple[Sequence[int], Sequence[TokenLogprob]]:
        """Prompt tokens with log-probabilities: they go out with the first output token."""
        if self._live.output.ids or not batch.prompt_logprobs:
            return (), ()
        return self._live.asked.prompt_ids[1:], batch.prompt_logprobs

    def _visible(self, batch: TokenBatch, token_ids: Sequence[int]) -> Sequence[int]:
        """Without the stop token that ended the output: like a stop string, it is not shown."""
        is_stop_token = batch.stop_token_id is not None and bool(token_ids)
        if is_stop_token and not self._live.asked.job.keep_special_tokens:
            return token_ids[:-1]
        return token_ids

    async def _send(
        self,
        batch: TokenBatch,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprob],
        reply: TextReply,
    ) -> None:
        live = self._live
        live.timeline.first_token(StageName.DETOKENIZE)
        self._observe(len(token_ids))
        index = len(live.output.ids)
        texts = iter(reply.token_texts)
        prompt_logprobs = _with_texts(*self._of_prompt(batch), texts)
        live.output.ids.extend(token_ids)
        chunk = Chunk(
            text=reply.text,
            token_index=index,
            num_tokens=len(token_ids),
            token_ids=tuple(token_ids),
            logprobs=_with_texts(token_ids, logprobs, texts),
            prompt_logprobs=prompt_logprobs,
            request_id=live.request_id,
            model=live.asked.model,
        )
        if not self._has_begun:
            self._has_begun = True
            chunk = begun(chunk, live)
        finish_reason = FinishReason.STOP if reply.stop else batch.finish_reason
        if finish_reason is None:
            await self._emit(chunk)
            return
        await self._emit(self._ended(chunk, finish_reason, batch, reply))
        live.output.finish_reason = finish_reason.name.lower()
        live.state.end(RequestStatus.FINISHED, live.clock.now())

    def _observe(self, num_tokens: int) -> None:
        now = self._live.clock.now()
        if self._last_at_s is None:
            self._metrics.ttft_s.observe(self._live.timeline.stages.ttft_s or 0.0)
        else:
            for _ in range(num_tokens):
                self._metrics.itl_s.observe((now - self._last_at_s) / num_tokens)
        if num_tokens:
            self._last_at_s = now
        self._metrics.sent(num_tokens)

    def _ended(
        self, chunk: Chunk, reason: FinishReason, batch: TokenBatch, reply: TextReply
    ) -> Chunk:
        live = self._live
        placement = live.placement or PlacementTaken()
        live.timeline.decoded(placement.decode_worker_id, max(0, len(live.output.ids) - 1))
        return replace(
            chunk,
            trace_id=live.trace_id,
            finish_reason=reason.name.lower(),
            stop_reason=reply.stop or self._stop_token(batch),
            usage=live.output.usage(len(live.asked.prompt_ids)),
            stages=tuple(live.timeline.stages.stages),
            placement=placement,
        )

    def _stop_token(self, batch: TokenBatch) -> str:
        """Named only when the caller asked for it; a model's own end of sequence is not news."""
        is_asked_for = batch.stop_token_id in self._live.asked.sampling.stop_token_ids
        return str(batch.stop_token_id) if is_asked_for else ""


def begun(chunk: Chunk, live: LiveRequest) -> Chunk:
    """The chunk as a call's first one: with what its caller needs to go on elsewhere."""
    return replace(
        chunk,
        trace_id=live.trace_id,
        seed=live.asked.sampling.seed,
        fingerprint=live.output.digest,
    )


def _described(token_ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> list[int]:
    """Tokens whose texts go with log-probabilities."""
    ids: list[int] = []
    for token_id, logprob in zip(token_ids, logprobs, strict=False):
        ids += [token_id, *logprob.top_token_ids]
    return ids


def _with_texts(
    token_ids: Sequence[int], logprobs: Sequence[TokenLogprob], remaining: Iterator[TokenText]
) -> tuple[Logprob, ...]:
    """Joins log-probabilities with the texts that were asked for in the same order."""
    nothing = TokenText(b"", "")
    joined = []
    for token_id, logprob in zip(token_ids, logprobs, strict=False):
        own = next(remaining, nothing)
        top = []
        for top_id, value in zip(logprob.top_token_ids, logprob.top_logprobs, strict=False):
            text = next(remaining, nothing)
            top.append(TopLogprob(top_id, text.text, text.token_bytes, value))
        joined.append(Logprob(token_id, own.text, own.token_bytes, logprob.logprob, tuple(top)))
    return tuple(joined)


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
