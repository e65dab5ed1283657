"""Calls that a prefill worker makes: pushes to decode workers, blocks from and to the cache."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import grpc
import xxhash
from google.protobuf.message import DecodeError

from baton.core.errors import BatonError, ErrorReason, KvChecksum, KvTransferLost, error_for
from baton.core.handoff import Chunk, Manifest, Opening
from baton.core.hashing import Fingerprint, KvLayout
from baton.rpc.channel import ChannelPool
from baton.rpc.convert import fingerprint_to_pb, logprob_to_pb, reason_from_pb
from baton.rpc.errors import error_from_rpc, rpc_errors
from baton.rpc.frames import decode_frame, encode_frame
from baton.v1 import cache_pb2, cache_pb2_grpc, kv_transfer_pb2

_PUSH = "/baton.v1.KvTransferService/Push"
_FETCH = "/baton.v1.CacheService/FetchBlocks"
_STORE = "/baton.v1.CacheService/StoreBlocks"
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

    async def chunk(self, chunk: Chunk, payload: bytes) -> None:
        """Sends a chunk."""
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

    async def _write(self, header: kv_transfer_pb2.PushHeader, payload: bytes = b"") -> None:
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


@dataclass(frozen=True, slots=True)
class Block:
    """One block of KV."""

    block_hash: bytes
    payload: bytes | memoryview


class CachePeer:
    """The cache service. All methods raise BatonError when a call fails."""

    def __init__(self, channels: ChannelPool, address: str) -> None:
        self._channels = channels
        self._address = address

    async def num_stored(self, hashes: Sequence[bytes], *, timeout_s: float) -> int:
        """Leading blocks of a prefix that the store has."""
        stub = cache_pb2_grpc.CacheServiceStub(self._channels.get(self._address))
        with rpc_errors():
            answer: cache_pb2.LookupPrefixResponse = await stub.LookupPrefix(
                cache_pb2.LookupPrefixRequest(block_hashes=hashes), timeout=timeout_s
            )
        return min(answer.num_stored_blocks, len(hashes))

    async def fetch(
        self, hashes: Sequence[bytes], layout: KvLayout, *, timeout_s: float
    ) -> AsyncGenerator[Block, None]:
        """Blocks in the order asked for, verified, up to the first one missing."""
        start: Any = self._channels.get(self._address, is_bulk=True).unary_stream(
            _FETCH,
            request_serializer=cache_pb2.FetchBlocksRequest.SerializeToString,
            response_deserializer=None,
        )
        call = start(cache_pb2.FetchBlocksRequest(block_hashes=hashes), timeout=timeout_s)
        try:
            with rpc_errors():
                for expected in hashes:
                    message = await call.read()
                    if message is _EOF:
                        return
                    view, payload = decode_frame(message)
                    header = _block_header(view)
                    is_whole = payload.nbytes == layout.block_bytes
                    if header.block_hash != expected or not is_whole:
                        raise KvChecksum("the cache service sent another block than asked for")
                    if xxhash.xxh3_64_intdigest(payload) != header.checksum:
                        raise KvChecksum("a block of the cache service does not match its checksum")
                    yield Block(expected, payload)
        finally:
            call.cancel()

    async def store(
        self, blocks: AsyncIterator[Block], fingerprint: Fingerprint, *, timeout_s: float
    ) -> int:
        """Stores blocks; returns how many were new there."""
        start: Any = self._channels.get(self._address, is_bulk=True).stream_unary(
            _STORE,
            request_serializer=None,
            response_deserializer=cache_pb2.StoreBlocksResponse.FromString,
        )
        call = start(timeout=timeout_s)
        layout = fingerprint_to_pb(fingerprint).layout
        is_first = True
        try:
            with rpc_errors():
                async for block in blocks:
                    header = cache_pb2.BlockHeader(
                        block_hash=block.block_hash,
                        checksum=xxhash.xxh3_64_intdigest(block.payload),
                        layout=layout if is_first else None,
                    )
                    is_first = False
                    await call.write(encode_frame(header.SerializeToString(), block.payload))
                await call.done_writing()
                answer = await call
        finally:
            call.cancel()
        return int(answer.num_stored)


def _block_header(view: memoryview) -> cache_pb2.BlockHeader:
    try:
        return cache_pb2.BlockHeader.FromString(bytes(view))
    except DecodeError as error:
        raise KvChecksum("the cache service sent a frame without a block header") from error
