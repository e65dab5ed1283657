"""DecodeService and KvTransferService: messages in, messages out; the sessions do the work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError

from baton.core.errors import BatonError, Cancelled, InvalidRequest, KvLayoutMismatch, Stalled
from baton.core.handoff.frames import (
    Chunk,
    ChunkFrame,
    Committed,
    Credit,
    KvEncoding,
    Manifest,
    Opening,
    PullOffer,
    PushAnswer,
    PushFrame,
    SignOfLife,
    SlotOffer,
    Span,
    Staged,
)
from baton.core.output import DecodeTimings, TokenBatch
from baton.v1 import decode_pb2, decode_pb2_grpc, kv_transfer_pb2
from baton.wire.errors import public_message, reason_to_pb
from baton.wire.frames import decode_frame
from baton.wire.layout import fingerprint_from_pb
from baton.wire.sampling import finish_to_pb, logprob_from_pb, logprob_to_pb
from baton.wire.timing import duration_to_pb, slice_to_pb
from baton.worker.convert import spec_from_pb

if TYPE_CHECKING:
    from baton.decode.service import DecodeService

_MAX_TRANSPORTS = 8
_LAST_WORD_S = 1.0
_MAX_PROBE_BYTES = 64 << 20
_PROBE_TIMEOUT_S = 30.0
_Context = grpc.aio.ServicerContext[Any, Any]
_DECODE = "baton.v1.DecodeService"
_KV_TRANSFER = "baton.v1.KvTransferService"


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


class KvTransferServicer:
    """Serves prefill workers, on raw bytes: see `baton.wire.frames`."""

    def __init__(self, service: DecodeService) -> None:
        self._service = service

    async def push(
        self, requests: AsyncIterator[bytes], context: _Context
    ) -> AsyncGenerator[kv_transfer_pb2.PushResponse, None]:
        """Receives one push."""
        num_bytes, failure = 0, None
        try:
            async with (
                aclosing(_frames(requests)) as frames,
                aclosing(self._service.loaded().intake.receive(frames)) as answers,
            ):
                async for answer in answers:
                    num_bytes = answer.num_bytes if isinstance(answer, Committed) else num_bytes
                    yield _answer_to_pb(answer)
        except BatonError as error:
            failure = error
            yield _failure_to_pb(error)
            # A sender that is writing when the status comes loses it: let it cancel first.
            await asyncio.sleep(_LAST_WORD_S)
            raise
        finally:
            self._service.count_push(num_bytes, failure)

    async def probe(
        self, requests: AsyncIterator[bytes], context: _Context
    ) -> kv_transfer_pb2.ProbeResponse:
        """Counts bytes; measures the path between two workers."""
        num_bytes = 0
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT_S):
                async for message in requests:
                    payload, _ = decode_frame(message)  # field 1, like a frame's header
                    num_bytes += payload.nbytes
                    if num_bytes > _MAX_PROBE_BYTES:
                        raise InvalidRequest(f"a probe has at most {_MAX_PROBE_BYTES} bytes")
        except TimeoutError:
            raise Stalled(f"the probe took longer than {_PROBE_TIMEOUT_S:g} s") from None
        return kv_transfer_pb2.ProbeResponse(num_bytes=num_bytes)

    def handlers(self) -> grpc.GenericRpcHandler[Any, Any]:
        """The service's methods, without protobuf's copies of the payload."""
        return grpc.method_handlers_generic_handler(
            _KV_TRANSFER,
            {
                "Push": grpc.stream_stream_rpc_method_handler(
                    self.push,
                    request_deserializer=None,
                    response_serializer=kv_transfer_pb2.PushResponse.SerializeToString,
                ),
                "Probe": grpc.stream_unary_rpc_method_handler(
                    self.probe,
                    request_deserializer=None,
                    response_serializer=kv_transfer_pb2.ProbeResponse.SerializeToString,
                ),
            },
        )


def register(
    server: grpc.aio.Server, decode: DecodeServicer, transfer: KvTransferServicer
) -> list[str]:
    """Adds both services to a server; returns their full names."""
    decode_pb2_grpc.add_DecodeServiceServicer_to_server(decode, server)
    server.add_generic_rpc_handlers((transfer.handlers(),))
    return [_DECODE, _KV_TRANSFER]


async def _frames(requests: AsyncIterator[bytes]) -> AsyncGenerator[PushFrame, None]:
    async for message in requests:
        yield _frame_from_bytes(message)


def _frame_from_bytes(message: bytes) -> PushFrame:
    """A push's frame.

    Raises:
        InvalidRequest: it is none.
        KvLayoutMismatch: it names an encoding that is not known.
    """
    view, payload = decode_frame(message)
    header = kv_transfer_pb2.PushHeader()
    try:
        header.ParseFromString(bytes(view))
    except DecodeError as error:
        raise InvalidRequest("header must be a baton.v1.PushHeader") from error
    kind = header.WhichOneof("kind")
    if kind == "open":
        return Opening(
            reservation_id=header.open.reservation_id,
            request_id=header.open.request_id,
            attempt=header.open.attempt,
            epoch=header.epoch,
            fingerprint=fingerprint_from_pb(header.open.fingerprint),
            worker_id=header.open.worker_id,
            transports=tuple(header.open.transports[:_MAX_TRANSPORTS]),
            staged=_staged_from_pb(header.open) if header.open.HasField("staged") else None,
            encoding=_encoding_from_pb(header.open.encoding),
        )
    if kind == "chunk":
        chunk = header.chunk
        span = Span(chunk.layer_start, chunk.layer_end, chunk.block_start, chunk.num_blocks)
        return ChunkFrame(
            Chunk(header.epoch, chunk.sequence, span, chunk.checksum), payload, chunk.slot_bytes
        )
    if kind == "manifest":
        return _manifest_from_pb(header.manifest, header.epoch)
    return SignOfLife(header.epoch)


def _manifest_from_pb(manifest: kv_transfer_pb2.PushManifest, epoch: int) -> Manifest:
    has_logprob = manifest.HasField("first_token_logprob")
    return Manifest(
        epoch=epoch,
        num_chunks=manifest.num_chunks,
        num_bytes=manifest.num_bytes,
        block_start=manifest.block_start,
        num_blocks=manifest.num_blocks,
        num_tokens=manifest.num_tokens,
        tokens_hash=manifest.tokens_hash,
        checksum=manifest.checksum,
        first_token_id=manifest.first_token_id,
        first_logprob=logprob_from_pb(manifest.first_token_logprob) if has_logprob else None,
    )


def _encoding_from_pb(value: int) -> KvEncoding:
    try:
        return KvEncoding(value)
    except ValueError as error:
        raise KvLayoutMismatch(f"KV encoding {value} is not known here") from error


def _staged_from_pb(opened: kv_transfer_pb2.PushOpen) -> Staged:
    staged = opened.staged
    return Staged(staged.agent, staged.address, staged.num_slots, staged.slot_bytes, staged.token)


def _answer_to_pb(
    answer: PushAnswer,
) -> kv_transfer_pb2.PushResponse:
    if isinstance(answer, PullOffer):
        return kv_transfer_pb2.PushResponse(
            offer=kv_transfer_pb2.PushOffer(
                num_slots=answer.num_slots,
                slot_bytes=answer.slot_bytes,
                staged=kv_transfer_pb2.StagedOffer(),
            )
        )
    if isinstance(answer, SlotOffer):
        memory = kv_transfer_pb2.SharedMemory(pid=answer.pid, fd=answer.fd)
        return kv_transfer_pb2.PushResponse(
            offer=kv_transfer_pb2.PushOffer(
                num_slots=answer.num_slots,
                slot_bytes=answer.slot_bytes,
                token=answer.token,
                shared_memory=memory,
            )
        )
    if isinstance(answer, Credit):
        return kv_transfer_pb2.PushResponse(
            credit=kv_transfer_pb2.PushCredit(num_chunks=answer.num_chunks)
        )
    return kv_transfer_pb2.PushResponse(
        committed=kv_transfer_pb2.PushCommitted(
            num_bytes=answer.num_bytes, num_chunks=answer.num_chunks
        )
    )


def _failure_to_pb(error: BatonError) -> kv_transfer_pb2.PushResponse:
    return kv_transfer_pb2.PushResponse(
        failed=kv_transfer_pb2.PushFailed(
            reason=reason_to_pb(error.reason), message=public_message(error)
        )
    )


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
