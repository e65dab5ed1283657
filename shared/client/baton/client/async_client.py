"""The asyncio client, on grpc.aio: one per event loop."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from random import Random, SystemRandom
from typing import Any, Literal, Self, TypeVar, Unpack, cast, overload

import grpc.aio

from baton.client import messages as pb
from baton.client.async_stream import AsyncTextStream
from baton.client.connection import Connection, default_api_key, default_tls
from baton.client.errors import error_of_call
from baton.client.pins import PinnedPrefix, PinOptions, pin_request, pinned_from
from baton.client.records import RequestList, RequestRecord, list_requests_request, requests_from
from baton.client.retry import Retrier, RetryPolicy
from baton.client.types import (
    ChatOptions,
    ClusterStatus,
    Completion,
    Embeddings,
    EmbedOptions,
    GenerateOptions,
    Model,
    Tls,
)
from baton.client.vectors import EmbedInputs, embed_request, embeddings_from
from baton.v1 import inference_pb2, inference_pb2_grpc

_Answer = TypeVar("_Answer")


class AsyncClient:
    """Talks to a Baton scheduler from one event loop; close it, or use it in `async with`.

    Failures are the errors of `baton.client`. Refusals are tried again within the deadline,
    and an answer that breaks off goes on with its next token.

        async with AsyncClient("127.0.0.1:50051") as client:
            async with client.generate("def add(a, b):", max_tokens=32, stream=True) as stream:
                async for chunk in stream:
                    print(chunk.text, end="")
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = 600.0,
        api_key: str | None = None,
        tls: Tls | None = None,
        retry: RetryPolicy | None = None,
        rng: Random | None = None,
    ) -> None:
        self._connection = Connection(
            address, timeout_s, api_key or default_api_key(), tls or default_tls()
        )
        self._retrier = Retrier(retry or RetryPolicy(), rng or SystemRandom())
        self._credentials = self._connection.credentials()
        self._channel: grpc.aio.Channel | None = None

    @property
    def address(self) -> str:
        """The scheduler's address, host:port."""
        return self._connection.address

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the channel; running calls are cancelled."""
        if self._channel is not None:
            await self._channel.close(None)

    @overload
    def generate(
        self,
        prompt: str | None = None,
        *,
        stream: Literal[False] = False,
        **options: Unpack[GenerateOptions],
    ) -> Awaitable[Completion]: ...

    @overload
    def generate(
        self,
        prompt: str | None = None,
        *,
        stream: Literal[True],
        **options: Unpack[GenerateOptions],
    ) -> AsyncTextStream: ...

    def generate(
        self, prompt: str | None = None, *, stream: bool = False, **options: Unpack[GenerateOptions]
    ) -> Awaitable[Completion] | AsyncTextStream:
        """Generates text for a prompt, `messages=` or `token_ids=`; see GenerateOptions.

        Raises:
            BatonError: the reason's own class, such as InvalidRequest or QueueFull; a mistake that
                shows here already is raised at once, not when awaited.
        """
        request = pb.generate_request(prompt, options)

        def open_call(request: Any, timeout_s: float) -> Any:
            return self._stub.Generate(
                request, timeout=timeout_s, metadata=self._connection.metadata()
            )

        timeout_s = self._connection.deadline_s(options)
        answer = AsyncTextStream(request, open_call, self._connection, self._retrier, timeout_s)
        return answer if stream else _complete(answer)

    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: Literal[False] = False,
        **options: Unpack[ChatOptions],
    ) -> Awaitable[Completion]: ...

    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: Literal[True],
        **options: Unpack[ChatOptions],
    ) -> AsyncTextStream: ...

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: bool = False,
        **options: Unpack[ChatOptions],
    ) -> Awaitable[Completion] | AsyncTextStream:
        """Answers a conversation, as `generate` does with `messages=`."""
        whole = cast("GenerateOptions", {**options, "messages": messages})
        if stream:
            return self.generate(stream=True, **whole)
        return self.generate(**whole)

    async def models(self, *, timeout_s: float | None = None) -> list[Model]:
        """The models that can be used now."""
        request = inference_pb2.ListModelsRequest()
        return pb.models_from(await self._call(self._stub.ListModels, request, timeout_s))

    async def tokenize(
        self,
        text: str | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        model: str = "",
        timeout_s: float | None = None,
    ) -> list[int]:
        """Token ids of a text, or of a conversation with its generation prompt."""
        request = pb.tokenize_request(text, messages, model)
        return list((await self._call(self._stub.Tokenize, request, timeout_s)).token_ids)

    async def detokenize(
        self, token_ids: Sequence[int], *, model: str = "", timeout_s: float | None = None
    ) -> str:
        """Text of token ids."""
        request = pb.detokenize_request(token_ids, model)
        text: str = (await self._call(self._stub.Detokenize, request, timeout_s)).text
        return text

    async def embed(self, inputs: EmbedInputs, **options: Unpack[EmbedOptions]) -> Embeddings:
        """Vectors of a text, of texts, or of token ids: hidden states of the served model.

        Raises:
            BatonError: the reason's own class, such as InvalidRequest or PromptTooLong.
        """
        request = embed_request(inputs, options)

        async def call(request: object, **given: Any) -> list[inference_pb2.EmbedResponse]:
            answers = self._stub.Embed(request, **given)
            return [answer async for answer in answers]

        return embeddings_from(request, await self._call(call, request, options.get("timeout_s")))

    async def pin_prefix(
        self, prompt: str | None = None, **options: Unpack[PinOptions]
    ) -> PinnedPrefix:
        """Has the cache keep a prompt's KV from being evicted, for a limited time.

        Raises:
            KvCacheFull: it does not fit what pins may take.
        """
        request = pin_request(prompt, options)
        answer = await self._call(self._stub.PinPrefix, request, options.get("timeout_s"))
        return pinned_from(answer.pin)

    async def unpin_prefix(self, pin_id: str, *, timeout_s: float | None = None) -> bool:
        """Takes that back; False when there is no such pin."""
        request = inference_pb2.UnpinPrefixRequest(pin_id=pin_id)
        return bool((await self._call(self._stub.UnpinPrefix, request, timeout_s)).found)

    async def pinned_prefixes(self, *, timeout_s: float | None = None) -> list[PinnedPrefix]:
        """The prefixes that are kept."""
        request = inference_pb2.ListPinnedPrefixesRequest()
        answer = await self._call(self._stub.ListPinnedPrefixes, request, timeout_s)
        return [pinned_from(pin) for pin in answer.pins]

    async def status(self, *, timeout_s: float | None = None) -> ClusterStatus:
        """State and load of every process that the scheduler knows."""
        request = inference_pb2.GetClusterStatusRequest()
        return pb.status_from(await self._call(self._stub.GetClusterStatus, request, timeout_s))

    async def requests(
        self, *, limit: int = 0, tenant: str = "", timeout_s: float | None = None
    ) -> RequestList:
        """The latest requests of this scheduler, with their stages; at most `limit`, 0 for all.

        `tenant` is for gateways, which tell tenants apart themselves: only that one's.
        """
        request = list_requests_request("", limit, tenant)
        return requests_from(await self._call(self._stub.ListRequests, request, timeout_s))

    async def request(
        self, request_id: str, *, tenant: str = "", timeout_s: float | None = None
    ) -> RequestRecord:
        """One of the latest requests, with what its stages consisted of; `tenant` as in `requests`.

        Raises:
            RequestNotFound: the scheduler does not remember it.
        """
        request = list_requests_request(request_id, 1, tenant)
        answer = await self._call(self._stub.ListRequests, request, timeout_s)
        return requests_from(answer).requests[0]

    @functools.cached_property
    def _stub(self) -> inference_pb2_grpc.InferenceServiceStub:
        # Opened at the first call, because a channel belongs to the event loop that runs then, and
        # a client may be made before there is one.
        address, options = self._connection.address, self._connection.channel_options
        self._channel = (
            grpc.aio.insecure_channel(address, options)
            if self._credentials is None
            else grpc.aio.secure_channel(address, self._credentials, options)
        )
        return inference_pb2_grpc.InferenceServiceStub(self._channel)

    async def _call(
        self, method: Callable[..., Awaitable[_Answer]], request: object, timeout_s: float | None
    ) -> _Answer:
        ends_at_s = time.monotonic() + self._connection.check_timeout_s(timeout_s)
        attempt = 0
        while True:
            attempt += 1
            remaining_s = max(0.0, ends_at_s - time.monotonic())
            metadata = self._connection.metadata()
            try:
                answer = await method(request, timeout=remaining_s, metadata=metadata)
            except grpc.aio.AioRpcError as rpc_error:
                error = error_of_call(rpc_error, self._connection.address)
                delay_s = self._retrier.delay_s(error, attempt, ends_at_s - time.monotonic())
                if delay_s is None:
                    raise error from rpc_error
            else:
                self._retrier.succeeded()
                return answer
            await asyncio.sleep(delay_s)


async def _complete(stream: AsyncTextStream) -> Completion:
    async with stream:
        async for _ in stream:
            pass
    return stream.completion
