"""DecodeService: room for an attempt's KV, then its tokens."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from baton.core.clock import Clock
from baton.core.errors import InvalidRequest
from baton.core.output import DecodeTimings, TokenBatch
from baton.v1 import decode_pb2 as pb2
from baton.v1 import decode_pb2_grpc
from baton.wire.calls import ask
from baton.wire.fields import as_message, as_value
from baton.wire.orders import AttemptOrder, attempt_from_pb, attempt_to_pb
from baton.wire.sampling import finish_from_pb, finish_to_pb, logprob_from_pb, logprob_to_pb
from baton.wire.streams import AnswerStream, RpcStream
from baton.wire.timing import slice_to_pb, slices_from_pb

SERVICE_NAME = "baton.v1.DecodeService"
_MAX_REASON_CHARS = 128


@dataclass(frozen=True, slots=True)
class KvReservation:
    """Room for a prompt's KV at a decode worker, under a lease."""

    reservation_id: str
    epoch: int
    """Fences out writes meant for an earlier reservation of the same blocks."""
    lease_s: float
    """From the answer's arrival, unless renewed."""
    num_blocks: int
    num_cached_blocks: int
    """Leading blocks of the prompt that the worker has already."""
    push_address: str
    """host:port of the worker's KvTransferService."""


@dataclass(frozen=True, slots=True)
class LeaseRenewal:
    """Renewed leases, and the reservations that have ended meanwhile."""

    lease_s: float
    unknown_ids: tuple[str, ...] = ()


class DecodeServer(Protocol):
    """A decode worker's side. Every failure is a BatonError."""

    async def reserve(self, order: AttemptOrder) -> KvReservation:
        """Reserves blocks, all or nothing."""

    def decode(
        self, reservation_id: str, epoch: int, *, local_prefill: bool
    ) -> AsyncGenerator[TokenBatch, None]:
        """Runs a reserved attempt to its end. Closing it early ends the attempt."""

    async def release(self, reservation_id: str, request_id: str, reason: str) -> int:
        """Ends one reservation, or all of a request's; returns the blocks let go. Idempotent."""

    async def renew_leases(self, reservation_ids: Sequence[str]) -> LeaseRenewal:
        """Extends leases."""


class DecodeCaller(Protocol):
    """A scheduler's side of one decode worker. Every failure is a BatonError."""

    async def reserve(self, order: AttemptOrder, timeout_s: float) -> KvReservation:
        """Reserves blocks, all or nothing."""

    def decode(
        self, reservation: KvReservation, *, local_prefill: bool, timeout_s: float
    ) -> AnswerStream[TokenBatch]:
        """Starts decoding; the caller must cancel the stream when it stops reading."""

    async def release(
        self, *, reservation_id: str = "", request_id: str = "", reason: str, timeout_s: float
    ) -> int:
        """Ends one reservation, or all of a request's; returns the blocks let go."""

    async def renew_leases(self, reservation_ids: Sequence[str], timeout_s: float) -> LeaseRenewal:
        """Extends leases."""


class RpcDecodeCaller:
    """A DecodeCaller over gRPC. `peer` names the worker in messages."""

    def __init__(self, channel: grpc.aio.Channel, peer: str, clock: Clock) -> None:
        self._stub: Any = decode_pb2_grpc.DecodeServiceStub(channel)
        self._peer = peer
        self._clock = clock

    async def reserve(self, order: AttemptOrder, timeout_s: float) -> KvReservation:
        """See DecodeCaller."""
        request = attempt_to_pb(pb2.ReserveRequest, order)
        response = await ask(self._stub.Reserve, request, timeout_s)
        return as_value(KvReservation, response)

    def decode(
        self, reservation: KvReservation, *, local_prefill: bool, timeout_s: float
    ) -> AnswerStream[TokenBatch]:
        """See DecodeCaller."""
        request = as_message(pb2.DecodeRequest, reservation, local_prefill=local_prefill)
        call = self._stub.Decode(request, timeout=timeout_s)
        return RpcStream(call, _batch_from_pb, self._peer, self._clock)

    async def release(
        self, *, reservation_id: str = "", request_id: str = "", reason: str, timeout_s: float
    ) -> int:
        """See DecodeCaller."""
        request = pb2.ReleaseRequest(
            reservation_id=reservation_id, request_id=request_id, reason=reason
        )
        response = await ask(self._stub.Release, request, timeout_s)
        return int(response.released_blocks)

    async def renew_leases(self, reservation_ids: Sequence[str], timeout_s: float) -> LeaseRenewal:
        """See DecodeCaller."""
        request = pb2.RenewLeasesRequest(reservation_ids=reservation_ids)
        response = await ask(self._stub.RenewLeases, request, timeout_s)
        ended = tuple(response.unknown_reservation_ids)
        return as_value(LeaseRenewal, response, unknown_ids=ended)


class _DecodeAdapter(decode_pb2_grpc.DecodeServiceServicer):
    """Messages in, messages out."""

    def __init__(self, server: DecodeServer) -> None:
        self._server = server

    async def Reserve(self, request: pb2.ReserveRequest, _: Any) -> pb2.ReserveResponse:
        reservation = await self._server.reserve(attempt_from_pb(request, request.fork_of))
        return as_message(pb2.ReserveResponse, reservation)

    async def Decode(
        self, request: pb2.DecodeRequest, _: Any
    ) -> AsyncGenerator[pb2.DecodeResponse, None]:
        stream = self._server.decode(
            request.reservation_id, request.epoch, local_prefill=request.local_prefill
        )
        async with aclosing(stream) as batches:
            async for batch in batches:
                yield _batch_to_pb(batch)

    async def Release(self, request: pb2.ReleaseRequest, _: Any) -> pb2.ReleaseResponse:
        if not (request.reservation_id or request.request_id):
            raise InvalidRequest("set reservation_id or request_id")
        reason = request.reason[:_MAX_REASON_CHARS] or "no reason given"
        num_blocks = await self._server.release(request.reservation_id, request.request_id, reason)
        return pb2.ReleaseResponse(released_blocks=num_blocks)

    async def RenewLeases(self, request: pb2.RenewLeasesRequest, _: Any) -> pb2.RenewLeasesResponse:
        renewal = await self._server.renew_leases(request.reservation_ids)
        ended = renewal.unknown_ids
        return as_message(pb2.RenewLeasesResponse, renewal, unknown_reservation_ids=ended)


def add_decode_server(server: grpc.aio.Server, implementation: DecodeServer) -> str:
    """Adds the service to a gRPC server; returns its full name."""
    decode_pb2_grpc.add_DecodeServiceServicer_to_server(_DecodeAdapter(implementation), server)
    return SERVICE_NAME


def _batch_to_pb(batch: TokenBatch) -> pb2.DecodeResponse:
    timings = None
    if batch.timings is not None:
        chunks = [slice_to_pb(chunk) for chunk in batch.timings.kv_chunks]
        timings = as_message(pb2.DecodeTimings, batch.timings, kv_chunks=chunks)
    return pb2.DecodeResponse(
        token_index=batch.token_index,
        token_ids=batch.token_ids,
        logprobs=[logprob_to_pb(logprob) for logprob in batch.logprobs],
        finish_reason=finish_to_pb(batch.finish_reason),
        stop_token_id=batch.stop_token_id,
        draft_tokens=batch.draft_tokens,
        accepted_tokens=batch.accepted_tokens,
        timings=timings,
        prompt_logprobs=[logprob_to_pb(logprob) for logprob in batch.prompt_logprobs],
    )


def _batch_from_pb(pb: pb2.DecodeResponse) -> TokenBatch:
    timings = None
    if pb.HasField("timings"):
        chunks = slices_from_pb("kv_chunks", pb.timings.kv_chunks)
        timings = as_value(DecodeTimings, pb.timings, kv_chunks=chunks)
    return TokenBatch(
        token_index=pb.token_index,
        token_ids=tuple(pb.token_ids),
        logprobs=tuple(logprob_from_pb(entry) for entry in pb.logprobs),
        finish_reason=finish_from_pb(pb.finish_reason),
        stop_token_id=pb.stop_token_id if pb.HasField("stop_token_id") else None,
        draft_tokens=pb.draft_tokens,
        accepted_tokens=pb.accepted_tokens,
        timings=timings,
        prompt_logprobs=tuple(logprob_from_pb(entry) for entry in pb.prompt_logprobs),
    )
