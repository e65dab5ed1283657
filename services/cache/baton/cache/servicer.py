"""CacheService on the wire: bulk streams as raw frames, everything else as messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError

from baton.cache.answers import AnswerStore
from baton.cache.pins import Pin, Pins
from baton.cache.store import check_hash, received_block
from baton.cache.tiers import TieredStore
from baton.core.errors import InvalidRequest, KvChecksum, Stalled
from baton.core.eviction import ChainLink
from baton.core.hashing import KvLayout
from baton.v1 import cache_pb2, common_pb2
from baton.wire.frames import decode_frame, encode_frame
from baton.wire.layout import layout_from_pb, layout_to_pb
from baton.wire.timing import duration_from_pb, duration_to_pb

if TYPE_CHECKING:
    from baton.cache.metrics import CacheMetrics
    from baton.core.prefix_index import PrefixIndex

_SERVICE = cache_pb2.DESCRIPTOR.services_by_name["CacheService"]
_UNARY = [m.name for m in _SERVICE.methods if not m.client_streaming and not m.server_streaming]
SERVICE_NAME: str = _SERVICE.full_name


@dataclass(frozen=True, slots=True)
class CacheLimits:
    """Bounds on one call."""

    max_prefix_blocks: int
    stall_timeout_s: float


@dataclass(frozen=True, slots=True)
class Stores:
    """What is kept here."""

    blocks: TieredStore
    answers: AnswerStore
    pins: Pins


class CacheServicer:
    """Answers CacheService from its stores and an index."""

    def __init__(
        self, stores: Stores, index: PrefixIndex, limits: CacheLimits, metrics: CacheMetrics
    ) -> None:
        self._store = stores.blocks
        self._answers = stores.answers
        self._pins = stores.pins
        self._index = index
        self._limits = limits
        self._metrics = metrics

    def handlers(self) -> grpc.GenericRpcHandler[Any, Any]:
        """The service's handlers; frames pass as raw bytes, so KV is not copied by protobuf."""
        pb = cache_pb2
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                **{name: self._unary(name) for name in _UNARY},
                "FetchBlocks": grpc.unary_stream_rpc_method_handler(
                    self.FetchBlocks, pb.FetchBlocksRequest.FromString, None
                ),
                "StoreBlocks": grpc.stream_unary_rpc_method_handler(
                    self.StoreBlocks, None, pb.StoreBlocksResponse.SerializeToString
                ),
            },
        )

    async def LookupPrefix(
        self, request: cache_pb2.LookupPrefixRequest, context: Any
    ) -> cache_pb2.LookupPrefixResponse:
        """How much of a prefix is here, and at which workers."""
        hashes = self._checked(request.block_hashes)
        holders = self._index.match(hashes)
        return cache_pb2.LookupPrefixResponse(
            num_stored_blocks=self._store.num_leading(hashes),
            holders=[
                cache_pb2.PrefixHolder(worker_id=worker_id, num_blocks=num_blocks)
                for worker_id, num_blocks in sorted(holders.items())
            ],
        )

    async def FetchBlocks(
        self, request: cache_pb2.FetchBlocksRequest, context: Any
    ) -> AsyncIterator[bytes]:
        """Stored blocks in order, up to the first that is missing, as frames."""
        hashes = self._checked(request.block_hashes)
        layout: KvLayout | None = None
        num_sent = 0
        try:
            async with aclosing(self._store.read(hashes)) as blocks:
                async for block in blocks:
                    if layout is not None and block.layout != layout:
                        break
                    header = cache_pb2.BlockHeader(
                        block_hash=block.block_hash, checksum=block.checksum
                    )
                    if layout is None:
                        layout = block.layout
                        header.layout.CopyFrom(layout_to_pb(layout))
                    yield encode_frame(header.SerializeToString(), block.payload)
                    num_sent += 1
                    self._metrics.fetched_blocks.labels("hit").inc()
                    self._metrics.fetched_bytes.inc(len(block.payload))
            if num_sent < len(hashes):
                self._metrics.fetched_blocks.labels("miss").inc()
        finally:
            self._store.touch(hashes[:num_sent])

    async def StoreBlocks(
        self, request_iterator: AsyncIterator[bytes], context: Any
    ) -> cache_pb2.StoreBlocksResponse:
        """Stores a stream of blocks; those before an error stay stored."""
        layout: KvLayout | None = None
        num_received = num_stored = 0
        frames = aiter(request_iterator)
        while (frame := await self._next_frame(frames)) is not None:
            header, payload = _parse(frame)
            if layout is None:
                layout = _layout_of(header)
            if num_received >= self._limits.max_prefix_blocks:
                raise InvalidRequest(
                    f"store at most {self._limits.max_prefix_blocks} blocks in one call"
                )
            num_stored += self._put(header, layout, payload)
            num_received += 1
        return cache_pb2.StoreBlocksResponse(
            num_stored=num_stored, num_skipped=num_received - num_stored
        )

    async def DropBlocks(
        self, request: cache_pb2.DropBlocksRequest, context: Any
    ) -> cache_pb2.DropBlocksResponse:
        """Empties the store."""
        return cache_pb2.DropBlocksResponse(num_dropped=await self._store.clear())

    async def LookupAnswer(
        self, request: cache_pb2.LookupAnswerRequest, context: Any
    ) -> cache_pb2.LookupAnswerResponse:
        """The answer kept under a key, if there is one."""
        return cache_pb2.LookupAnswerResponse(answer=self._answers.get(request.key))

    async def StoreAnswer(
        self, request: cache_pb2.StoreAnswerRequest, context: Any
    ) -> cache_pb2.StoreAnswerResponse:
        """Keeps an answer."""
        return cache_pb2.StoreAnswerResponse(stored=self._answers.put(request.key, request.answer))

    def _put(self, header: cache_pb2.BlockHeader, layout: KvLayout, payload: memoryview) -> bool:
        try:
            link = ChainLink(header.parent_hash, header.position)
            block = received_block(header.block_hash, header.checksum, layout, payload, link)
        except KvChecksum:
            self._metrics.stored_blocks.labels("refused").inc()
            raise
        is_new = self._store.put(block)
        self._metrics.stored_blocks.labels("stored" if is_new else "skipped").inc()
        if is_new:
            self._metrics.stored_bytes.inc(len(payload))
        return is_new

    async def PinBlocks(
        self, request: cache_pb2.PinBlocksRequest, context: Any
    ) -> cache_pb2.PinBlocksResponse:
        """Pins a prefix."""
        hashes = self._checked(request.block_hashes)
        ttl_s = duration_from_pb(request.ttl, "ttl")
        pin = self._pins.pin(hashes, request.block_bytes, ttl_s, request.label)
        await self._store.save_pins(self._pins)
        return cache_pb2.PinBlocksResponse(pin=self._pin_to_pb(pin))

    async def UnpinBlocks(
        self, request: cache_pb2.UnpinBlocksRequest, context: Any
    ) -> cache_pb2.UnpinBlocksResponse:
        """Takes a pin back."""
        found = self._pins.unpin(request.pin_id)
        if found:
            await self._store.save_pins(self._pins)
        return cache_pb2.UnpinBlocksResponse(found=found)

    async def ListPins(
        self, request: cache_pb2.ListPinsRequest, context: Any
    ) -> cache_pb2.ListPinsResponse:
        """The pins of this replica."""
        return cache_pb2.ListPinsResponse(pins=[self._pin_to_pb(p) for p in self._pins.current()])

    def _unary(self, name: str) -> grpc.RpcMethodHandler[Any, Any]:
        return grpc.unary_unary_rpc_method_handler(
            getattr(self, name),
            getattr(cache_pb2, f"{name}Request").FromString,
            getattr(cache_pb2, f"{name}Response").SerializeToString,
        )

    def _pin_to_pb(self, pin: Pin) -> common_pb2.Pin:
        return common_pb2.Pin(
            pin_id=pin.pin_id,
            label=pin.label,
            num_blocks=len(pin.block_hashes),
            num_stored_blocks=self._store.num_leading(pin.block_hashes),
            bytes=pin.num_bytes,
            remaining=duration_to_pb(self._pins.remaining_s(pin)),
        )

    async def _next_frame(self, frames: AsyncIterator[bytes]) -> bytes | None:
        try:
            async with asyncio.timeout(self._limits.stall_timeout_s):
                return await anext(frames, None)
        except TimeoutError:
            raise Stalled(
                f"no block arrived for {self._limits.stall_timeout_s:g} s; send again"
            ) from None

    def _checked(self, block_hashes: Sequence[bytes]) -> list[bytes]:
        if not 0 < len(block_hashes) <= self._limits.max_prefix_blocks:
            raise InvalidRequest(
                f"block_hashes must have 1 to {self._limits.max_prefix_blocks} entries,"
                f" got {len(block_hashes)}"
            )
        for block_hash in block_hashes:
            check_hash(block_hash)
        return list(block_hashes)


def _parse(frame: bytes) -> tuple[cache_pb2.BlockHeader, memoryview]:
    header_bytes, payload = decode_frame(frame)
    try:
        return cache_pb2.BlockHeader.FromString(bytes(header_bytes)), payload
    except DecodeError:
        raise InvalidRequest("header is not a BlockHeader") from None


def _layout_of(header: cache_pb2.BlockHeader) -> KvLayout:
    if not header.HasField("layout"):
        raise InvalidRequest("the first block of a stream must have header.layout")
    return layout_from_pb(header.layout)
