"""CacheService on the wire: bulk streams as raw frames, everything else as messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError

from baton.cache.store import check_hash, received_block
from baton.cache.tiers import TieredStore
from baton.core.errors import InvalidRequest, KvChecksum, Stalled
from baton.core.eviction import ChainLink
from baton.core.hashing import KvLayout
from baton.rpc.convert import layout_from_pb
from baton.rpc.frames import decode_frame, encode_frame
from baton.v1 import cache_pb2, common_pb2

if TYPE_CHECKING:
    from baton.cache.metrics import CacheMetrics
    from baton.core.prefix_index import PrefixIndex

SERVICE_NAME: str = cache_pb2.DESCRIPTOR.services_by_name["CacheService"].full_name


@dataclass(frozen=True, slots=True)
class CacheLimits:
    """Bounds on one call."""

    max_prefix_blocks: int
    stall_timeout_s: float


class CacheServicer:
    """Answers CacheService from a store and an index."""

    def __init__(
        self, store: TieredStore, index: PrefixIndex, limits: CacheLimits, metrics: CacheMetrics
    ) -> None:
        self._store = store
        self._index = index
        self._limits = limits
        self._metrics = metrics

    def handlers(self) -> grpc.GenericRpcHandler[Any, Any]:
        """The service's handlers; frames pass as raw bytes, so KV is not copied by protobuf."""
        pb = cache_pb2
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "LookupPrefix": grpc.unary_unary_rpc_method_handler(
                    self.LookupPrefix,
                    pb.LookupPrefixRequest.FromString,
                    pb.LookupPrefixResponse.SerializeToString,
                ),
                "FetchBlocks": grpc.unary_stream_rpc_method_handler(
                    self.FetchBlocks, pb.FetchBlocksRequest.FromString, None
                ),
                "StoreBlocks": grpc.stream_unary_rpc_method_handler(
                    self.StoreBlocks, None, pb.StoreBlocksResponse.SerializeToString
                ),
                "DropBlocks": grpc.unary_unary_rpc_method_handler(
                    self.DropBlocks,
                    pb.DropBlocksRequest.FromString,
                    pb.DropBlocksResponse.SerializeToString,
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
                        header.layout.CopyFrom(_layout_to_pb(layout))
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


def _layout_to_pb(layout: KvLayout) -> common_pb2.KvLayout:
    return common_pb2.KvLayout(
        block_size=layout.block_size,
        dtype=layout.dtype,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
    )
