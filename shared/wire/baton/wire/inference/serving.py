"""InferenceService at a scheduler, as a protocol of values, and its adapter to gRPC."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from google.protobuf.message import Message

from baton.v1 import inference_pb2 as pb2
from baton.v1 import inference_pb2_grpc
from baton.wire.fields import as_message
from baton.wire.inference.chunks import Chunk, chunk_to_pb
from baton.wire.inference.overview import ClusterStatus, Model, models_to_pb, overview_to_pb
from baton.wire.inference.pins import PinnedPrefix, PinRequest, pin_request_from_pb, pin_to_pb
from baton.wire.inference.records import RecordQuery, RequestList, query_from_pb, requests_to_pb
from baton.wire.inference.requests import (
    GenerateRequest,
    Tokenized,
    TokenizeRequest,
    generate_from_pb,
    tokenize_from_pb,
)
from baton.wire.inference.vectors import Embedding, EmbedRequest, embed_from_pb, embedding_to_pb

Emit = Callable[[Chunk], Awaitable[None]]
"""Sends a chunk to the caller; waits while the caller is slow."""


class InferenceServer(Protocol):
    """A scheduler, as its process implements it. Methods raise BatonError.

    `timeout_s` is what the call's deadline leaves, None without one.
    """

    async def generate(self, request: GenerateRequest, timeout_s: float | None, emit: Emit) -> None:
        """Runs a request to its end; returns after the last chunk was sent."""

    def embed(
        self, request: EmbedRequest, timeout_s: float | None
    ) -> AsyncGenerator[Embedding, None]:
        """Vectors in the order in which they are done; closing it early cancels the others."""

    async def models(self) -> Sequence[Model]:
        """The models that can be used now."""

    async def tokenize(self, request: TokenizeRequest, timeout_s: float | None) -> Tokenized:
        """A text or a conversation to token ids."""

    async def detokenize(
        self, model: str, token_ids: Sequence[int], timeout_s: float | None
    ) -> str:
        """Token ids to text."""

    async def pin(self, request: PinRequest, timeout_s: float | None) -> PinnedPrefix:
        """Keeps a prefix from eviction."""

    async def unpin(self, pin_id: str) -> bool:
        """Ends a pin; False when the caller has no such pin."""

    async def pins(self) -> Sequence[PinnedPrefix]:
        """The caller's pins."""

    async def status(self) -> ClusterStatus:
        """Every process that the scheduler knows, itself included."""

    async def requests(self, query: RecordQuery) -> RequestList:
        """The latest requests, or one of them."""


class _InferenceAdapter(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self, server: InferenceServer) -> None:
        self._server = server

    async def Generate(self, request: pb2.GenerateRequest, context: Any) -> None:
        # Writes by itself, so that a cancelled call is noticed at once; so does Embed.
        async def emit(chunk: Chunk) -> None:
            for message in chunk_to_pb(chunk, request):
                await context.write(message)

        await self._server.generate(generate_from_pb(request), context.time_remaining(), emit)

    async def Embed(self, request: pb2.EmbedRequest, context: Any) -> None:
        vectors = self._server.embed(embed_from_pb(request), context.time_remaining())
        async with aclosing(vectors):
            async for vector in vectors:
                await context.write(embedding_to_pb(vector))

    async def ListModels(self, request: pb2.ListModelsRequest, _: Any) -> Message:
        return models_to_pb(await self._server.models())

    async def Tokenize(self, request: pb2.TokenizeRequest, context: Any) -> Message:
        tokenized = await self._server.tokenize(tokenize_from_pb(request), context.time_remaining())
        return as_message(pb2.TokenizeResponse, tokenized)

    async def Detokenize(self, request: pb2.DetokenizeRequest, context: Any) -> Message:
        token_ids = tuple(request.token_ids)
        text = await self._server.detokenize(request.model, token_ids, context.time_remaining())
        return pb2.DetokenizeResponse(text=text)

    async def PinPrefix(self, request: pb2.PinPrefixRequest, context: Any) -> Message:
        pin = await self._server.pin(pin_request_from_pb(request), context.time_remaining())
        return pb2.PinPrefixResponse(pin=pin_to_pb(pin))

    async def UnpinPrefix(self, request: pb2.UnpinPrefixRequest, _: Any) -> Message:
        return pb2.UnpinPrefixResponse(found=await self._server.unpin(request.pin_id))

    async def ListPinnedPrefixes(self, request: pb2.ListPinnedPrefixesRequest, _: Any) -> Message:
        pins = await self._server.pins()
        return pb2.ListPinnedPrefixesResponse(pins=[pin_to_pb(pin) for pin in pins])

    async def GetClusterStatus(self, request: pb2.GetClusterStatusRequest, _: Any) -> Message:
        return overview_to_pb(await self._server.status())

    async def ListRequests(self, request: pb2.ListRequestsRequest, _: Any) -> Message:
        return requests_to_pb(await self._server.requests(query_from_pb(request)))


def add_inference_server(server: Any, implementation: InferenceServer) -> str:
    """Adds it to a gRPC server; returns the service's full name."""
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(
        _InferenceAdapter(implementation), server
    )
    return "baton.v1.InferenceService"
