"""DecodeService: messages in, messages out; the sessions do the work."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import grpc

from baton.core.errors import BatonError, Cancelled, InvalidRequest
from baton.core.output import DecodeTimings, TokenBatch
from baton.v1 import decode_pb2, decode_pb2_grpc
from baton.wire.sampling import finish_to_pb, logprob_to_pb
from baton.wire.timing import duration_to_pb, slice_to_pb
from baton.worker.convert import spec_from_pb

if TYPE_CHECKING:
    from baton.decode.service import DecodeService

_Context = grpc.aio.ServicerContext[Any, Any]
_DECODE = "baton.v1.DecodeService"


class DecodeServicer(decode_pb2_grpc.DecodeServiceServicer):
    """Serves the scheduler."""

    def __init__(self, service: DecodeService) -> None:
        self._service = service

    async def Reserve(
        self, request: decode_pb2.ReserveRequest, context: _Context
    ) -> decode_pb2.ReserveResponse:
        """Reserves room for a request."""
        loaded = self._service.admitting()
        spec = spec_from_pb(loaded.host.engine, request)
        await loaded.host.worker.prepare(spec.sampling.guide)
        session = loaded.sessions.reserve(
            spec, request.request_id, request.attempt, fork_of=request.fork_of
        )
        return decode_pb2.ReserveResponse(
            reservation_id=session.reservation.reservation_id,
            epoch=session.reservation.epoch,
            lease=duration_to_pb(loaded.sessions.lease_s),
            num_blocks=session.grant.num_blocks,
            num_cached_blocks=session.grant.num_cached_blocks,
            push_address=self._service.address,
        )

    async def Decode(
        self, request: decode_pb2.DecodeRequest, context: _Context
    ) -> AsyncGenerator[decode_pb2.DecodeResponse, None]:
        """Streams a reserved request's tokens."""
        sessions = self._service.loaded().sessions
        session = sessions.attach(request.reservation_id, request.epoch)
        parent = self._service.context()
        try:
            stream = sessions.stream(session, local_prefill=request.local_prefill)
            async with aclosing(stream) as batches:
                async for batch in batches:
                    yield _batch_to_pb(batch)
        except BatonError as error:
            sessions.release(session, error)
            raise
        finally:
            sessions.release(session, Cancelled("the reader of the tokens went away"))
            self._service.record(session, parent)

    async def Release(
        self, request: decode_pb2.ReleaseRequest, context: _Context
    ) -> decode_pb2.ReleaseResponse:
        """Ends reservations."""
        if not (request.reservation_id or request.request_id):
            raise InvalidRequest("set reservation_id or request_id")
        num_blocks = self._service.loaded().sessions.release_named(
            request.reservation_id, request.request_id, request.reason[:128] or "no reason given"
        )
        return decode_pb2.ReleaseResponse(released_blocks=num_blocks)

    async def RenewLeases(
        self, request: decode_pb2.RenewLeasesRequest, context: _Context
    ) -> decode_pb2.RenewLeasesResponse:
        """Extends leases."""
        sessions = self._service.loaded().sessions
        unknown = sessions.renew(request.reservation_ids)
        return decode_pb2.RenewLeasesResponse(
            lease=duration_to_pb(sessions.lease_s), unknown_reservation_ids=unknown
        )


def register(server: grpc.aio.Server, decode: DecodeServicer) -> str:
    """Adds the service to a server; returns its full name."""
    decode_pb2_grpc.add_DecodeServiceServicer_to_server(decode, server)
    return _DECODE


def _batch_to_pb(batch: TokenBatch) -> decode_pb2.DecodeResponse:
    response = decode_pb2.DecodeResponse(
        token_index=batch.token_index,
        token_ids=batch.token_ids,
        logprobs=[logprob_to_pb(logprob) for logprob in batch.logprobs],
        finish_reason=finish_to_pb(batch.finish_reason),
        draft_tokens=batch.draft_tokens,
        accepted_tokens=batch.accepted_tokens,
        timings=_timings_to_pb(batch.timings) if batch.timings else None,
        prompt_logprobs=[logprob_to_pb(logprob) for logprob in batch.prompt_logprobs],
    )
    if batch.stop_token_id is not None:
        response.stop_token_id = batch.stop_token_id
    return response


def _timings_to_pb(timings: DecodeTimings) -> decode_pb2.DecodeTimings:
    return decode_pb2.DecodeTimings(
        wait_for_kv=duration_to_pb(timings.wait_for_kv_s),
        queue=duration_to_pb(timings.queue_s),
        first_step=duration_to_pb(timings.first_step_s),
        cached_tokens=timings.cached_tokens,
        kv_chunks=[slice_to_pb(chunk) for chunk in timings.kv_chunks],
    )
