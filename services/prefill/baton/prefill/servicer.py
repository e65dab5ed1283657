"""PrefillService: messages in, messages out; the jobs do the work."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import grpc

from baton.core.embedding import pooling_of
from baton.core.errors import InvalidRequest, QueueFull
from baton.core.sampling import SamplingParams
from baton.core.sequence import SequenceSpec
from baton.engine.engine import Engine
from baton.handoff.sender import PushTarget
from baton.prefill.jobs import Job, JobDone, JobEvent, JobFirstToken, JobStarted
from baton.v1 import prefill_pb2, prefill_pb2_grpc
from baton.wire.sampling import finish_to_pb, logprob_to_pb
from baton.wire.timing import duration_to_pb, slice_to_pb
from baton.worker.convert import seq_id_from_pb, spec_from_pb

if TYPE_CHECKING:
    from baton.prefill.service import PrefillService

MAX_PROBE_BYTES = 64 << 20
_Context = grpc.aio.ServicerContext[Any, Any]
_PREFILL = "baton.v1.PrefillService"


class PrefillServicer(prefill_pb2_grpc.PrefillServiceServicer):
    """Serves the scheduler."""

    def __init__(self, service: PrefillService) -> None:
        self._service = service
        self._is_measuring = False

    async def Prefill(
        self, request: prefill_pb2.PrefillRequest, context: _Context
    ) -> AsyncGenerator[prefill_pb2.PrefillResponse, None]:
        """Computes a prompt and pushes its KV."""
        loaded = self._service.admitting()
        job = _job_from_pb(loaded.host.engine, request)
        await loaded.host.worker.prepare(job.spec.sampling.guide)
        recorder = self._service.recorder(job)
        async with aclosing(loaded.jobs.run(job)) as events:
            async for event in events:
                recorder.note(event)
                if isinstance(event, JobDone):
                    self._service.count(event)
                yield _event_to_pb(event)

    async def EmbedPrompt(
        self, request: prefill_pb2.EmbedPromptRequest, context: _Context
    ) -> prefill_pb2.EmbedPromptResponse:
        """Computes a prompt for its vector."""
        loaded = self._service.admitting()
        spec = SequenceSpec(
            seq_id=seq_id_from_pb(request),
            token_ids=tuple(request.token_ids),
            sampling=SamplingParams(temperature=0.0),
            max_tokens=1,
            priority=request.priority,
            cache_salt=request.cache_salt,
            pooling=pooling_of(request.pooling),
        )
        values, num_cached_tokens = await loaded.embeddings.embed(spec)
        return prefill_pb2.EmbedPromptResponse(values=values, cached_tokens=num_cached_tokens)

    async def ReleasePrefill(
        self, request: prefill_pb2.ReleasePrefillRequest, context: _Context
    ) -> prefill_pb2.ReleasePrefillResponse:
        """Lets go of a kept copy."""
        if not request.request_id:
            raise InvalidRequest("request_id must be set")
        num_blocks = self._service.loaded().jobs.release(request.request_id, request.attempt)
        return prefill_pb2.ReleasePrefillResponse(released_blocks=num_blocks)

    async def MeasurePath(
        self, request: prefill_pb2.MeasurePathRequest, context: _Context
    ) -> prefill_pb2.MeasurePathResponse:
        """Sends bytes to a decode worker and says how long that took."""
        if not 0 < request.num_bytes <= MAX_PROBE_BYTES:
            raise InvalidRequest(f"num_bytes must be in [1, {MAX_PROBE_BYTES}]")
        if self._is_measuring:
            raise QueueFull("another path is being measured, which this would disturb")
        self._is_measuring = True
        try:
            path = await self._service.measure_path(request.decode_worker_id, request.num_bytes)
        finally:
            self._is_measuring = False
        return prefill_pb2.MeasurePathResponse(
            num_bytes=path.num_bytes,
            transfer=duration_to_pb(path.transfer_s),
            round_trip=duration_to_pb(path.round_trip_s),
        )


def register(server: grpc.aio.Server, servicer: PrefillServicer) -> list[str]:
    """Adds the service to a server; returns its full name."""
    prefill_pb2_grpc.add_PrefillServiceServicer_to_server(servicer, server)
    return [_PREFILL]


def _job_from_pb(engine: Engine, request: prefill_pb2.PrefillRequest) -> Job:
    """What to compute.

    Raises:
        InvalidRequest, PromptTooLong, KvLayoutMismatch: it never can be.
    """
    return Job(
        request_id=request.request_id,
        attempt=request.attempt,
        spec=spec_from_pb(engine, request, prefill_only=True),
        target=_target_from_pb(request.target) if request.HasField("target") else None,
    )


def _target_from_pb(target: prefill_pb2.PushTarget) -> PushTarget:
    if not (target.address and target.reservation_id and target.epoch):
        raise InvalidRequest("target must have address, reservation_id and epoch")
    return PushTarget(
        worker_id=target.worker_id,
        address=target.address,
        reservation_id=target.reservation_id,
        epoch=target.epoch,
        num_cached_blocks=target.num_cached_blocks,
    )


def _event_to_pb(event: JobEvent) -> prefill_pb2.PrefillResponse:
    match event:
        case JobStarted():
            started = prefill_pb2.PrefillStarted(
                queue=duration_to_pb(event.queue_s),
                cached_tokens=event.cached_tokens,
                fetched_tokens=event.fetched_tokens,
            )
            return prefill_pb2.PrefillResponse(started=started)
        case JobFirstToken():
            return prefill_pb2.PrefillResponse(first_token=_first_token_to_pb(event))
        case JobDone():
            return prefill_pb2.PrefillResponse(done=_done_to_pb(event))


def _first_token_to_pb(event: JobFirstToken) -> prefill_pb2.FirstToken:
    token = prefill_pb2.FirstToken(
        token_id=event.token_id,
        logprob=logprob_to_pb(event.logprob) if event.logprob else None,
        finish_reason=finish_to_pb(event.finish_reason),
        compute=duration_to_pb(event.at_s - event.started_at_s),
        prompt_logprobs=[logprob_to_pb(logprob) for logprob in event.prompt_logprobs],
        chunks=[slice_to_pb(chunk) for chunk in event.chunks],
    )
    if event.stop_token_id is not None:
        token.stop_token_id = event.stop_token_id
    return token


def _done_to_pb(event: JobDone) -> prefill_pb2.PrefillDone:
    report = event.report
    if report is None:
        return prefill_pb2.PrefillDone()
    return prefill_pb2.PrefillDone(
        bytes=report.num_bytes,
        blocks=report.num_blocks,
        chunks=report.num_chunks,
        transfer=duration_to_pb(report.ended_at_s - report.began_at_s),
        exposed=duration_to_pb(report.exposed_s),
        idle=duration_to_pb(report.idle_s),
    )
