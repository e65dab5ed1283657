"""Calls that a prefill worker makes: pushes to decode workers."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, cast

import grpc

from baton.core.errors import BatonError, ErrorReason, KvTransferLost, error_for
from baton.core.handoff import Chunk, Manifest, Opening
from baton.rpc.channel import ChannelPool
from baton.rpc.convert import fingerprint_to_pb, logprob_to_pb, reason_from_pb
from baton.rpc.errors import error_from_rpc
from baton.rpc.frames import encode_frame
from baton.v1 import kv_transfer_pb2

_NOTHING = memoryview(b"")
_PUSH = "/baton.v1.KvTransferService/Push"
_EOF = cast("Any", grpc.aio).EOF
_SAYS_WHY = frozenset({
    ErrorReason.STALE_EPOCH,
    ErrorReason.KV_LAYOUT_MISMATCH,
    ErrorReason.KV_CHECKSUM,
    ErrorReason.KV_TRANSFER_LOST,
    ErrorReason.STALLED,
    ErrorReason.DEADLINE,
})
"""Reasons that a receiver gives itself; all others mean that it is not reachable."""


@dataclass(frozen=True, slots=True)
class Credit:
    """Chunks that may be sent on top of those allowed so far."""

    num_chunks: int


@dataclass(frozen=True, slots=True)
class Committed:
    """The receiver has verified everything."""

    num_bytes: int
    num_chunks: int


class PushCall:
    """One push to a decode worker. `cancel` it when leaving early."""

    max_chunk_bytes = 1 << 20
    """Larger messages are slower over gRPC, and hold up what shares their connection."""

    def __init__(self, channels: ChannelPool, address: str, *, timeout_s: float) -> None:
        start: Any = channels.get(address, is_bulk=True).stream_stream(
            _PUSH,
            request_serializer=None,
            response_deserializer=kv_transfer_pb2.PushResponse.FromString,
        )
        self._address = address
        self._call: Any = start(timeout=timeout_s)

    async def open(self, opening: Opening) -> None:
        """Sends the first frame."""
        await self._write(
            kv_transfer_pb2.PushHeader(
                epoch=opening.epoch,
                open=kv_transfer_pb2.PushOpen(
                    reservation_id=opening.reservation_id,
                    request_id=opening.request_id,
                    attempt=opening.attempt,
                    fingerprint=fingerprint_to_pb(opening.fingerprint),
                    worker_id=opening.worker_id,
                ),
            )
        )

    def room(self, _sequence: int, num_bytes: int) -> memoryview:
        """Memory to put a chunk into before it is sent; there must be credit for it."""
        return memoryview(bytearray(num_bytes))

    async def chunk(self, chunk: Chunk, payload: memoryview) -> None:
        """Sends a chunk, which lies in its room."""
        span = chunk.span
        header = kv_transfer_pb2.PushHeader(
            epoch=chunk.epoch,
            chunk=kv_transfer_pb2.PushChunk(
                sequence=chunk.sequence,
                layer_start=span.layer_start,
                layer_end=span.layer_end,
                block_start=span.block_start,
                num_blocks=span.num_blocks,
                checksum=chunk.checksum,
            ),
        )
        await self._write(header, payload)

    async def sign_of_life(self, epoch: int) -> None:
        """Tells the receiver that there will be more."""
        await self._write(kv_transfer_pb2.PushHeader(epoch=epoch))

    async def manifest(self, manifest: Manifest) -> None:
        """Sends the last frame."""
        logprob = manifest.first_logprob
        header = kv_transfer_pb2.PushHeader(
            epoch=manifest.epoch,
            manifest=kv_transfer_pb2.PushManifest(
                num_chunks=manifest.num_chunks,
                num_bytes=manifest.num_bytes,
                block_start=manifest.block_start,
                num_blocks=manifest.num_blocks,
                num_tokens=manifest.num_tokens,
                tokens_hash=manifest.tokens_hash,
                checksum=manifest.checksum,
                first_token_id=manifest.first_token_id,
                first_token_logprob=logprob_to_pb(logprob) if logprob else None,
            ),
        )
        await self._write(header)

    async def end(self) -> None:
        """Sends nothing more."""
        await self._call.done_writing()

    async def read(self) -> Credit | Committed:
        """The receiver's next answer.

        Raises:
            BatonError: what the receiver says, or KvTransferLost.
        """
        try:
            answer = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise self._failure(error) from error
        if answer is _EOF:
            raise KvTransferLost(f"the decode worker at {self._address} ended the push")
        if answer.HasField("failed"):
            reason = reason_from_pb(answer.failed.reason)
            raise self._as_sender(error_for(reason, answer.failed.message))
        if answer.HasField("committed"):
            return Committed(answer.committed.num_bytes, answer.committed.num_chunks)
        return Credit(answer.credit.num_chunks)

    def cancel(self) -> None:
        """Ends the call at once; harmless when it is over."""
        self._call.cancel()

    async def _write(
        self, header: kv_transfer_pb2.PushHeader, payload: memoryview = _NOTHING
    ) -> None:
        try:
            await self._call.write(encode_frame(header.SerializeToString(), payload))
        except grpc.aio.AioRpcError as error:
            raise self._failure(error) from error
        except asyncio.InvalidStateError as error:
            raise KvTransferLost(f"the decode worker at {self._address} ended the push") from error

    def _failure(self, error: grpc.aio.AioRpcError) -> BatonError:
        return self._as_sender(error_from_rpc(error))

    def _as_sender(self, failure: BatonError) -> BatonError:
        """What a failed push means to whoever asked this worker for it.

        That the receiver does not know the reservation does not make the request unknown here.
        """
        if failure.reason in _SAYS_WHY:
            return failure
        return KvTransferLost(f"push to {self._address}: {failure.message}")
