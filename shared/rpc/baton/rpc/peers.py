"""Calls that more than one service makes: to ControlService, and to the cache service."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import grpc
import xxhash
from google.protobuf.message import DecodeError

from baton.core.cluster import Announcement
from baton.core.errors import KvChecksum
from baton.core.eviction import FIRST_LINK, ChainLink
from baton.core.hashing import Fingerprint, KvLayout
from baton.v1 import cache_pb2, cache_pb2_grpc, common_pb2, control_pb2, control_pb2_grpc
from baton.wire.channel import ChannelPool
from baton.wire.cluster import rates_from_pb, status_from_pb
from baton.wire.errors import rpc_errors
from baton.wire.frames import decode_frame, encode_frame
from baton.wire.layout import hashes_from_pb, layout_to_pb
from baton.wire.timing import duration_to_pb

STATUS_TIMEOUT_S = 1.5
SNAPSHOT_TIMEOUT_S = 10.0
PIN_TIMEOUT_S = 5.0
_FETCH = "/baton.v1.CacheService/FetchBlocks"
_STORE = "/baton.v1.CacheService/StoreBlocks"
_EOF = cast("Any", grpc.aio).EOF


@dataclass(frozen=True, slots=True)
class KvSnapshot:
    """All blocks in a worker's prefix cache."""

    worker_id: str
    sequence: int
    """Of the last KV event that it includes."""
    block_hashes: tuple[bytes, ...]


class ControlClient:
    """Asks other processes about themselves. All methods raise BatonError when that fails."""

    def __init__(self, channels: ChannelPool) -> None:
        self._channels = channels

    async def status(self, address: str, *, lease_s: float) -> Announcement:
        """The status of the process at `address`, as a lease of `lease_s` on being a member."""
        with rpc_errors():
            pb = await self._stub(address).GetStatus(
                control_pb2.GetStatusRequest(), timeout=STATUS_TIMEOUT_S
            )
        return Announcement(
            status=status_from_pb(pb.status),
            lease_s=lease_s,
            rates=rates_from_pb(pb.rates),
        )

    async def kv_snapshot(self, address: str) -> KvSnapshot:
        """What is in a worker's prefix cache: mends a gap in its KV events."""
        with rpc_errors():
            pb = await self._stub(address).GetKvSnapshot(
                control_pb2.GetKvSnapshotRequest(), timeout=SNAPSHOT_TIMEOUT_S
            )
        hashes = hashes_from_pb("block_hashes", pb.block_hashes)
        return KvSnapshot(pb.worker_id, pb.sequence, hashes)

    async def drain(self, address: str, grace_s: float | None = None) -> int:
        """Has the process drain and exit; returns the number of requests that still run."""
        grace = None if grace_s is None else duration_to_pb(grace_s)
        with rpc_errors():
            pb = await self._stub(address).Drain(
                control_pb2.DrainRequest(grace=grace), timeout=STATUS_TIMEOUT_S
            )
        return int(pb.num_requests_running)

    def _stub(self, address: str) -> control_pb2_grpc.ControlServiceStub:
        return control_pb2_grpc.ControlServiceStub(self._channels.get(address))


@dataclass(frozen=True, slots=True)
class Block:
    """One block of KV."""

    block_hash: bytes
    payload: bytes | memoryview
    link: ChainLink = FIRST_LINK
    """Needed to store it; not known of a fetched one."""


class CachePeer:
    """The cache service. All methods raise BatonError when a call fails."""

    def __init__(self, channels: ChannelPool, address: str) -> None:
        self._channels = channels
        self._address = address

    @property
    def address(self) -> str:
        """Where it is."""
        return self._address

    async def num_stored(self, hashes: Sequence[bytes], *, timeout_s: float) -> int:
        """Leading blocks of a prefix that the store has."""
        with rpc_errors():
            answer: cache_pb2.LookupPrefixResponse = await self._stub().LookupPrefix(
                cache_pb2.LookupPrefixRequest(block_hashes=hashes), timeout=timeout_s
            )
        return min(answer.num_stored_blocks, len(hashes))

    async def answer(self, key: bytes, *, timeout_s: float) -> bytes:
        """The serialized Answer that is kept under a key; empty when there is none."""
        with rpc_errors():
            found = await self._stub().LookupAnswer(
                cache_pb2.LookupAnswerRequest(key=key), timeout=timeout_s
            )
        return bytes(found.answer)

    async def store_answer(self, key: bytes, answer: bytes, *, timeout_s: float) -> bool:
        """Has a serialized Answer kept; False when it does not fit."""
        with rpc_errors():
            stored = await self._stub().StoreAnswer(
                cache_pb2.StoreAnswerRequest(key=key, answer=answer), timeout=timeout_s
            )
        return bool(stored.stored)

    async def pin(
        self, hashes: Sequence[bytes], block_bytes: int, ttl_s: float, label: str
    ) -> common_pb2.Pin:
        """Has a prefix kept, whatever comes."""
        request = cache_pb2.PinBlocksRequest(
            block_hashes=hashes,
            block_bytes=block_bytes,
            ttl=duration_to_pb(ttl_s),
            label=label,
        )
        with rpc_errors():
            answer: cache_pb2.PinBlocksResponse = await self._stub().PinBlocks(
                request, timeout=PIN_TIMEOUT_S
            )
        return answer.pin

    async def unpin(self, pin_id: str) -> bool:
        """Takes a pin back; False when it has none of that id."""
        with rpc_errors():
            answer = await self._stub().UnpinBlocks(
                cache_pb2.UnpinBlocksRequest(pin_id=pin_id), timeout=PIN_TIMEOUT_S
            )
        return bool(answer.found)

    async def pins(self) -> list[common_pb2.Pin]:
        """Its pins."""
        with rpc_errors():
            answer = await self._stub().ListPins(cache_pb2.ListPinsRequest(), timeout=PIN_TIMEOUT_S)
        return list(answer.pins)

    def _stub(self) -> cache_pb2_grpc.CacheServiceStub:
        return cache_pb2_grpc.CacheServiceStub(self._channels.get(self._address))

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
        layout = layout_to_pb(fingerprint.layout)
        is_first = True
        try:
            with rpc_errors():
                async for block in blocks:
                    header = cache_pb2.BlockHeader(
                        block_hash=block.block_hash,
                        checksum=xxhash.xxh3_64_intdigest(block.payload),
                        layout=layout if is_first else None,
                        position=block.link.position,
                        parent_hash=block.link.parent,
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
