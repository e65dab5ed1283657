"""PrefillService: a prompt's KV and first token, or its vector."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import grpc

from baton.core.clock import Clock
from baton.core.embedding import pooling_of
from baton.core.errors import InvalidRequest
from baton.core.output import TokenBatch
from baton.core.timeline import Slice
from baton.v1 import prefill_pb2 as pb2
from baton.v1 import prefill_pb2_grpc
from baton.wire.calls import ask
from baton.wire.fields import as_message, as_value
from baton.wire.frames import MAX_PROBE_BYTES
from baton.wire.orders import AttemptOrder, EmbedOrder, attempt_from_pb, attempt_to_pb, check_origin
from baton.wire.sampling import finish_from_pb, finish_to_pb, logprob_from_pb, logprob_to_pb
from baton.wire.streams import AnswerStream, RpcStream
from baton.wire.timing import duration_from_pb, duration_to_pb, slice_to_pb, slices_from_pb

SERVICE_NAME = "baton.v1.PrefillService"


@dataclass(frozen=True, slots=True)
class PushTarget:
    """A reservation on a decode worker, where a prefill worker sends the KV."""

    worker_id: str
    address: str
    """host:port of the worker's KvTransferService."""
    reservation_id: str
    epoch: int
    num_cached_blocks: int
    """Leading blocks that the worker has already; they are not sent."""


@dataclass(frozen=True, slots=True)
class PrefillStarted:
    """The prompt left the prefill worker's queue."""

    queue_s: float
    cached_tokens: int
    fetched_tokens: int = 0
    """Of the cached ones, those that came from the cache service."""


@dataclass(frozen=True, slots=True)
class FirstToken:
    """The prompt is computed; the tail of its KV may still be on its way."""

    batch: TokenBatch
    """The one token, as a batch like those that the decode worker sends afterwards."""
    compute_s: float
    """From leaving the queue to the token."""
    chunks: tuple[Slice, ...] = ()
    """The chunks that the prompt was computed in, relative to leaving the queue."""


@dataclass(frozen=True, slots=True)
class PrefillDone:
    """The decode worker has committed the KV. All zero if there was no push."""

    num_bytes: int = 0
    num_blocks: int = 0
    num_chunks: int = 0
    transfer_s: float = 0.0
    """From the first chunk's write to the commit's acknowledgement."""
    exposed_s: float = 0.0
    """Part of `transfer_s` after the first token."""
    idle_s: float = 0.0
    """Part of `transfer_s` spent waiting for the computation."""


PrefillEvent = PrefillStarted | FirstToken | PrefillDone


@dataclass(frozen=True, slots=True)
class PromptVector:
    """A prompt's pooled hidden states, neither cut nor scaled."""

    values: tuple[float, ...]
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class PathMeasurement:
    """How long bytes take from a prefill worker to a decode worker over gRPC."""

    num_bytes: int
    """Bytes that arrived."""
    transfer_s: float
    round_trip_s: float
    """The same for no bytes."""


class PrefillServer(Protocol):
    """A prefill worker's side. Every failure is a BatonError."""

    def prefill(
        self, order: AttemptOrder, target: PushTarget | None
    ) -> AsyncGenerator[PrefillEvent, None]:
        """Computes a prompt, and pushes its KV to a target. Closing it early stops both."""

    async def embed(self, order: EmbedOrder) -> PromptVector:
        """Computes a prompt for its vector."""

    async def release(self, request_id: str, attempt: int) -> int:
        """Frees the KV kept for one attempt, or for all if 0; returns the number of blocks."""

    async def measure_path(self, decode_worker_id: str, num_bytes: int) -> PathMeasurement:
        """Sends bytes that go nowhere to a decode worker."""


class PrefillCaller(Protocol):
    """A scheduler's side of one prefill worker. Every failure is a BatonError."""

    def prefill(
        self, order: AttemptOrder, target: PushTarget, timeout_s: float
    ) -> AnswerStream[PrefillEvent]:
        """Starts a prefill; the caller must cancel the stream when it stops reading."""

    async def embed(self, order: EmbedOrder, timeout_s: float) -> PromptVector:
        """Computes a prompt for its vector."""

    async def release(self, request_id: str, attempt: int, reason: str, timeout_s: float) -> int:
        """Lets go of kept KV; returns the number of blocks."""


class RpcPrefillCaller:
    """A PrefillCaller over gRPC. `peer` names the worker in messages."""

    def __init__(self, channel: grpc.aio.Channel, peer: str, clock: Clock) -> None:
        self._stub: Any = prefill_pb2_grpc.PrefillServiceStub(channel)
        self._peer = peer
        self._clock = clock

    def prefill(
        self, order: AttemptOrder, target: PushTarget, timeout_s: float
    ) -> AnswerStream[PrefillEvent]:
        """See PrefillCaller."""
        request = attempt_to_pb(
            pb2.PrefillRequest, order, target=as_message(pb2.PushTarget, target)
        )
        call = self._stub.Prefill(request, timeout=timeout_s)
        convert = partial(_event_from_pb, token_index=order.num_output_tokens)
        return RpcStream(call, convert, self._peer, self._clock)

    async def embed(self, order: EmbedOrder, timeout_s: float) -> PromptVector:
        """See PrefillCaller."""
        request = as_message(pb2.EmbedPromptRequest, order, pooling=order.pooling.value)
        response = await ask(self._stub.EmbedPrompt, request, timeout_s)
        return PromptVector(tuple(response.values), response.cached_tokens)

    async def release(self, request_id: str, attempt: int, reason: str, timeout_s: float) -> int:
        """See PrefillCaller."""
        request = pb2.ReleasePrefillRequest(request_id=request_id, attempt=attempt, reason=reason)
        response = await ask(self._stub.ReleasePrefill, request, timeout_s)
        return int(response.released_blocks)


class _PrefillAdapter(prefill_pb2_grpc.PrefillServiceServicer):
    """Messages in, messages out."""

    def __init__(self, server: PrefillServer) -> None:
        self._server = server

    async def Prefill(
        self, request: pb2.PrefillRequest, _: Any
    ) -> AsyncGenerator[pb2.PrefillResponse, None]:
        order = attempt_from_pb(request)
        target = _target_from_pb(request.target) if request.HasField("target") else None
        async with aclosing(self._server.prefill(order, target)) as events:
            async for event in events:
                yield _event_to_pb(event)

    async def EmbedPrompt(self, request: pb2.EmbedPromptRequest, _: Any) -> pb2.EmbedPromptResponse:
        check_origin(request)
        order = as_value(EmbedOrder, request, pooling=pooling_of(request.pooling))
        vector = await self._server.embed(order)
        return pb2.EmbedPromptResponse(values=vector.values, cached_tokens=vector.num_cached_tokens)

    async def ReleasePrefill(
        self, request: pb2.ReleasePrefillRequest, _: Any
    ) -> pb2.ReleasePrefillResponse:
        if not request.request_id:
            raise InvalidRequest("request_id must be set")
        num_blocks = await self._server.release(request.request_id, request.attempt)
        return pb2.ReleasePrefillResponse(released_blocks=num_blocks)

    async def MeasurePath(self, request: pb2.MeasurePathRequest, _: Any) -> pb2.MeasurePathResponse:
        if not 0 < request.num_bytes <= MAX_PROBE_BYTES:
            raise InvalidRequest(f"num_bytes must be in [1, {MAX_PROBE_BYTES}]")
        path = await self._server.measure_path(request.decode_worker_id, request.num_bytes)
        return as_message(pb2.MeasurePathResponse, path)


def add_prefill_server(server: grpc.aio.Server, implementation: PrefillServer) -> str:
    """Adds the service to a gRPC server; returns its full name."""
    prefill_pb2_grpc.add_PrefillServiceServicer_to_server(_PrefillAdapter(implementation), server)
    return SERVICE_NAME


def _target_from_pb(pb: pb2.PushTarget) -> PushTarget:
    if not (pb.address and pb.reservation_id and pb.epoch):
        raise InvalidRequest("target must have address, reservation_id and epoch")
    return as_value(PushTarget, pb)


def _event_to_pb(event: PrefillEvent) -> pb2.PrefillResponse:
    match event:
        case PrefillStarted():
            return pb2.PrefillResponse(started=as_message(pb2.PrefillStarted, event))
        case FirstToken():
            return pb2.PrefillResponse(first_token=_first_to_pb(event))
        case PrefillDone():
            done = as_message(
                pb2.PrefillDone,
                event,
                bytes=event.num_bytes,
                blocks=event.num_blocks,
                chunks=event.num_chunks,
            )
            return pb2.PrefillResponse(done=done)


def _first_to_pb(first: FirstToken) -> pb2.FirstToken:
    batch = first.batch
    return pb2.FirstToken(
        token_id=batch.token_ids[0],
        logprob=logprob_to_pb(batch.logprobs[0]) if batch.logprobs else None,
        finish_reason=finish_to_pb(batch.finish_reason),
        stop_token_id=batch.stop_token_id,
        compute=duration_to_pb(first.compute_s),
        prompt_logprobs=[logprob_to_pb(logprob) for logprob in batch.prompt_logprobs],
        chunks=[slice_to_pb(chunk) for chunk in first.chunks],
    )


def _event_from_pb(pb: pb2.PrefillResponse, *, token_index: int) -> PrefillEvent:
    """An event of an attempt whose first token is the request's output token `token_index`."""
    match pb.WhichOneof("event"):
        case "started":
            return as_value(PrefillStarted, pb.started)
        case "first_token":
            return _first_from_pb(pb.first_token, token_index)
    done = pb.done
    return as_value(
        PrefillDone, done, num_bytes=done.bytes, num_blocks=done.blocks, num_chunks=done.chunks
    )


def _first_from_pb(pb: pb2.FirstToken, token_index: int) -> FirstToken:
    batch = TokenBatch(
        token_index=token_index,
        token_ids=(pb.token_id,),
        logprobs=(logprob_from_pb(pb.logprob),) if pb.HasField("logprob") else (),
        finish_reason=finish_from_pb(pb.finish_reason),
        stop_token_id=pb.stop_token_id if pb.HasField("stop_token_id") else None,
        prompt_logprobs=tuple(logprob_from_pb(entry) for entry in pb.prompt_logprobs),
    )
    return FirstToken(batch, duration_from_pb(pb.compute), slices_from_pb("chunks", pb.chunks))
