"""The conversation with a cache service: blocks of prefixes, pins, kept answers.

Blocks travel as raw frames, so that protobuf does not copy their KV.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
from google.protobuf.message import Message

from baton.core.errors import InvalidRequest, KvChecksum
from baton.core.eviction import FIRST_LINK, ChainLink
from baton.core.hashing import KvLayout
from baton.v1 import cache_pb2 as pb2
from baton.v1 import cache_pb2_grpc
from baton.wire import calls
from baton.wire.channel import ChannelPool
from baton.wire.errors import rpc_errors
from baton.wire.fields import as_message, parsed
from baton.wire.frames import decode_frame, encode_frame
from baton.wire.inference.pins import PinnedPrefix, pin_from_pb, pin_to_pb
from baton.wire.layout import layout_from_pb, layout_to_pb
from baton.wire.timing import duration_from_pb, duration_to_pb

_SERVICE = pb2.DESCRIPTOR.services_by_name["CacheService"]
_NAME: str = _SERVICE.full_name
_UNARY = [m.name for m in _SERVICE.methods if not m.client_streaming and not m.server_streaming]
PIN_TIMEOUT_S = 5.0
Checksum = Callable[[bytes | memoryview], int]
"""XXH3-64 of a payload."""


@dataclass(frozen=True, slots=True)
class CacheBlock:
    """One block of KV."""

    block_hash: bytes
    layout: KvLayout
    checksum: int
    """XXH3-64 of the payload."""
    payload: bytes | memoryview
    """Its layout is described in cache.proto."""
    link: ChainLink = FIRST_LINK
    """Its place in the prefix; unknown for a fetched block."""


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """Where leading blocks of a prefix are."""

    num_stored_blocks: int
    """In the cache service itself."""
    holders: Mapping[str, int]
    """Blocks per worker id."""


@dataclass(frozen=True, slots=True)
class StoreCounts:
    """What became of the blocks sent to be stored."""

    num_stored: int
    num_skipped: int
    """Known already, or without room."""


class CacheCaller(Protocol):
    """One replica of the cache service. Methods raise BatonError when a call fails."""

    @property
    def address(self) -> str:
        """Its address."""

    async def num_stored(self, hashes: Sequence[bytes], *, timeout_s: float) -> int:
        """Leading blocks of a prefix that the replica has."""

    def fetch(
        self, hashes: Sequence[bytes], layout: KvLayout, *, timeout_s: float
    ) -> AsyncGenerator[CacheBlock, None]:
        """Blocks in the order asked for, verified, up to the first one missing."""

    async def store(self, blocks: AsyncIterator[CacheBlock], *, timeout_s: float) -> int:
        """Stores blocks of one layout; returns how many were new there."""

    async def answer(self, key: bytes, *, timeout_s: float) -> bytes:
        """The answer kept under a key; empty when there is none."""

    async def store_answer(self, key: bytes, answer: bytes, *, timeout_s: float) -> bool:
        """Keeps an answer; False when it does not fit."""

    async def pin(
        self, hashes: Sequence[bytes], block_bytes: int, ttl_s: float, label: str
    ) -> PinnedPrefix:
        """Keeps a prefix from eviction."""

    async def unpin(self, pin_id: str) -> bool:
        """Removes a pin; False when there is none of that id."""

    async def pins(self) -> list[PinnedPrefix]:
        """The replica's pins."""


class CacheServer(Protocol):
    """A cache service, as its process implements it. Methods raise BatonError."""

    def match(self, hashes: Sequence[bytes]) -> PrefixMatch:
        """How much of a prefix is here, and at which workers."""

    def fetch(self, hashes: Sequence[bytes]) -> AsyncGenerator[CacheBlock, None]:
        """Blocks in order, of one layout, up to the first that is missing."""

    async def store(self, blocks: AsyncIterator[CacheBlock]) -> StoreCounts:
        """Stores blocks; those before an error stay stored."""

    async def drop(self) -> int:
        """Empties the store; returns the number of blocks."""

    def answer(self, key: bytes) -> bytes | None:
        """The answer kept under a key."""

    def store_answer(self, key: bytes, answer: bytes) -> bool:
        """Keeps an answer; False when it does not fit."""

    async def pin(
        self, hashes: Sequence[bytes], block_bytes: int, ttl_s: float, label: str
    ) -> PinnedPrefix:
        """Pins a prefix."""

    async def unpin(self, pin_id: str) -> bool:
        """Removes a pin; False when there is none of that id."""

    def pins(self) -> list[PinnedPrefix]:
        """The pins of this replica."""


class RpcCache:
    """Implements CacheCaller over the channels to an address."""

    def __init__(self, channels: ChannelPool, address: str, checksum: Checksum) -> None:
        self.address = address
        self._channels = channels
        self._checksum = checksum

    async def num_stored(self, hashes: Sequence[bytes], *, timeout_s: float) -> int:
        """See CacheCaller."""
        request = pb2.LookupPrefixRequest(block_hashes=hashes)
        pb = await self._ask("LookupPrefix", request, timeout_s)
        return min(int(pb.num_stored_blocks), len(hashes))

    async def fetch(
        self, hashes: Sequence[bytes], layout: KvLayout, *, timeout_s: float
    ) -> AsyncGenerator[CacheBlock, None]:
        """See CacheCaller."""
        channel = self._channels.get(self.address, is_bulk=True)
        start: Any = channel.unary_stream(
            f"/{_NAME}/FetchBlocks",
            request_serializer=pb2.FetchBlocksRequest.SerializeToString,
            response_deserializer=None,
        )
        with rpc_errors():
            call = start(pb2.FetchBlocksRequest(block_hashes=hashes), timeout=timeout_s)
        try:
            for expected in hashes:
                message = await calls.read(call)
                if message is None:
                    return
                view, payload = decode_frame(message)
                header = _fetched_header(view)
                if header.block_hash != expected or payload.nbytes != layout.block_bytes:
                    raise KvChecksum("the cache service sent another block than asked for")
                if self._checksum(payload) != header.checksum:
                    raise KvChecksum("a block of the cache service does not match its checksum")
                yield CacheBlock(expected, layout, header.checksum, payload)
        finally:
            call.cancel()

    async def store(self, blocks: AsyncIterator[CacheBlock], *, timeout_s: float) -> int:
        """See CacheCaller."""
        channel = self._channels.get(self.address, is_bulk=True)
        start: Any = channel.stream_unary(
            f"/{_NAME}/StoreBlocks",
            request_serializer=None,
            response_deserializer=pb2.StoreBlocksResponse.FromString,
        )
        with rpc_errors():
            call = start(timeout=timeout_s)
        try:
            is_first = True
            async for block in blocks:
                header = _header_to_pb(block, with_layout=is_first)
                header.position, header.parent_hash = block.link.position, block.link.parent
                is_first = False
                await calls.write(call, encode_frame(header.SerializeToString(), block.payload))
            with rpc_errors():
                await call.done_writing()
                return int((await call).num_stored)
        finally:
            call.cancel()

    async def answer(self, key: bytes, *, timeout_s: float) -> bytes:
        """See CacheCaller."""
        request = pb2.LookupAnswerRequest(key=key)
        return bytes((await self._ask("LookupAnswer", request, timeout_s)).answer)

    async def store_answer(self, key: bytes, answer: bytes, *, timeout_s: float) -> bool:
        """See CacheCaller."""
        request = pb2.StoreAnswerRequest(key=key, answer=answer)
        return bool((await self._ask("StoreAnswer", request, timeout_s)).stored)

    async def pin(
        self, hashes: Sequence[bytes], block_bytes: int, ttl_s: float, label: str
    ) -> PinnedPrefix:
        """See CacheCaller."""
        request = pb2.PinBlocksRequest(
            block_hashes=hashes,
            block_bytes=block_bytes,
            ttl=duration_to_pb(ttl_s),
            label=label,
        )
        return pin_from_pb((await self._ask("PinBlocks", request, PIN_TIMEOUT_S)).pin)

    async def unpin(self, pin_id: str) -> bool:
        """See CacheCaller."""
        request = pb2.UnpinBlocksRequest(pin_id=pin_id)
        return bool((await self._ask("UnpinBlocks", request, PIN_TIMEOUT_S)).found)

    async def pins(self) -> list[PinnedPrefix]:
        """See CacheCaller."""
        request = pb2.ListPinsRequest()
        pb = await self._ask("ListPins", request, PIN_TIMEOUT_S)
        return [pin_from_pb(pin) for pin in pb.pins]

    async def _ask(self, method: str, request: Message, timeout_s: float) -> Any:
        stub = cache_pb2_grpc.CacheServiceStub(self._channels.get(self.address))
        return await calls.ask(getattr(stub, method), request, timeout_s)


def add_cache(server: grpc.aio.Server, cache: CacheServer) -> str:
    """Serves a cache; returns the service's full name."""
    adapter = _CacheAdapter(cache)
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            getattr(adapter, name),
            getattr(pb2, f"{name}Request").FromString,
            getattr(pb2, f"{name}Response").SerializeToString,
        )
        for name in _UNARY
    }
    handlers["FetchBlocks"] = grpc.unary_stream_rpc_method_handler(
        adapter.FetchBlocks, pb2.FetchBlocksRequest.FromString, None
    )
    handlers["StoreBlocks"] = grpc.stream_unary_rpc_method_handler(
        adapter.StoreBlocks, None, pb2.StoreBlocksResponse.SerializeToString
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_NAME, handlers),))
    return _NAME


class _CacheAdapter:
    def __init__(self, cache: CacheServer) -> None:
        self._cache = cache

    async def LookupPrefix(self, request: pb2.LookupPrefixRequest, _: Any) -> Message:
        found = self._cache.match(request.block_hashes)
        return pb2.LookupPrefixResponse(
            num_stored_blocks=found.num_stored_blocks,
            holders=[
                pb2.PrefixHolder(worker_id=worker_id, num_blocks=num_blocks)
                for worker_id, num_blocks in sorted(found.holders.items())
            ],
        )

    async def FetchBlocks(
        self, request: pb2.FetchBlocksRequest, context: Any
    ) -> AsyncIterator[bytes]:
        is_first = True
        async with aclosing(self._cache.fetch(request.block_hashes)) as blocks:
            async for block in blocks:
                header = _header_to_pb(block, with_layout=is_first)
                is_first = False
                yield encode_frame(header.SerializeToString(), block.payload)

    async def StoreBlocks(self, request_iterator: AsyncIterator[bytes], _: Any) -> Message:
        async with aclosing(_blocks_from_frames(request_iterator)) as blocks:
            counts = await self._cache.store(blocks)
        return as_message(pb2.StoreBlocksResponse, counts)

    async def DropBlocks(self, request: pb2.DropBlocksRequest, _: Any) -> Message:
        return pb2.DropBlocksResponse(num_dropped=await self._cache.drop())

    async def LookupAnswer(self, request: pb2.LookupAnswerRequest, _: Any) -> Message:
        return pb2.LookupAnswerResponse(answer=self._cache.answer(request.key))

    async def StoreAnswer(self, request: pb2.StoreAnswerRequest, _: Any) -> Message:
        stored = self._cache.store_answer(request.key, request.answer)
        return pb2.StoreAnswerResponse(stored=stored)

    async def PinBlocks(self, request: pb2.PinBlocksRequest, _: Any) -> Message:
        ttl_s = duration_from_pb(request.ttl, "ttl")
        pin = await self._cache.pin(request.block_hashes, request.block_bytes, ttl_s, request.label)
        return pb2.PinBlocksResponse(pin=pin_to_pb(pin))

    async def UnpinBlocks(self, request: pb2.UnpinBlocksRequest, _: Any) -> Message:
        return pb2.UnpinBlocksResponse(found=await self._cache.unpin(request.pin_id))

    async def ListPins(self, request: pb2.ListPinsRequest, _: Any) -> Message:
        return pb2.ListPinsResponse(pins=[pin_to_pb(pin) for pin in self._cache.pins()])


def _header_to_pb(block: CacheBlock, *, with_layout: bool) -> pb2.BlockHeader:
    """A stream's first block alone has the layout."""
    return pb2.BlockHeader(
        block_hash=block.block_hash,
        checksum=block.checksum,
        layout=layout_to_pb(block.layout) if with_layout else None,
    )


def _fetched_header(view: memoryview) -> pb2.BlockHeader:
    try:
        return parsed(pb2.BlockHeader, view, "header")
    except InvalidRequest as error:
        raise KvChecksum("the cache service sent a frame without a block header") from error


async def _blocks_from_frames(frames: AsyncIterator[bytes]) -> AsyncGenerator[CacheBlock, None]:
    layout: KvLayout | None = None
    async for frame in frames:
        view, payload = decode_frame(frame)
        header = parsed(pb2.BlockHeader, view, "header")
        if layout is None:
            if not header.HasField("layout"):
                raise InvalidRequest("the first block of a stream must have header.layout")
            layout = layout_from_pb(header.layout)
        link = ChainLink(header.parent_hash, header.position)
        yield CacheBlock(header.block_hash, layout, header.checksum, payload, link)
