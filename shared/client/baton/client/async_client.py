"""The asyncio client, on grpc.aio: one per event loop.

The blocking client is this file with the keywords taken out, by `unasync` at build time (`make
sync`). Not a thread with an event loop behind blocking methods: a fork leaves that thread behind,
grpc.aio complains when one process has several loops, and every chunk would wait for two threads
to take turns. On blocking gRPC, Ctrl-C, threads and latency are gRPC's.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from random import Random, SystemRandom
from typing import Any, Literal, Self, TypeVar, Unpack, cast, overload

from baton.client.arguments import (
    EmbedInputs,
    embed_request,
    generate_request,
    pin_request,
    tokenize_request,
)
from baton.client.async_stream import AsyncTextStream
from baton.client.connection import Connection, default_api_key, default_tls
from baton.client.pause import AsyncPause
from baton.client.retry import Retrier, RetryPolicy
from baton.client.types import (
    ChatOptions,
    Completion,
    EmbedOptions,
    GenerateOptions,
    PinOptions,
    Tls,
)
from baton.core.errors import BatonError
from baton.wire.calls import CallTerms
from baton.wire.inference.caller import AsyncInferenceCaller
from baton.wire.inference.overview import ClusterStatus, Model
from baton.wire.inference.pins import PinnedPrefix
from baton.wire.inference.records import RecordQuery, RequestList, RequestRecord
from baton.wire.inference.vectors import Embeddings

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
            address, timeout_s, api_key or default_api_key(address), tls or default_tls()
        )
        self._retrier = Retrier(retry or RetryPolicy(), rng or SystemRandom())
        self._caller = AsyncInferenceCaller(
            address, self._connection.credentials(), self._connection.channel_options
        )

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
        await self._caller.close()

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
            BatonError: a subclass per reason, such as InvalidRequest or QueueFull. Invalid
                arguments raise at once, not when the answer is awaited.
        """
        answer = AsyncTextStream(
            generate_request(prompt, options),
            partial(self._caller.generate, can_resume=self._retrier.may_retry),
            self._connection,
            self._retrier,
            self._connection.check_timeout_s(options.get("timeout_s")),
        )
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
        return await self._call(self._caller.models, timeout_s)

    async def tokenize(
        self,
        text: str | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        model: str = "",
        timeout_s: float | None = None,
    ) -> list[int]:
        """Token ids of a text, or of a conversation with its generation prompt."""
        request = tokenize_request(text, messages, model)
        return await self._call(partial(self._caller.tokenize, request), timeout_s)

    async def detokenize(
        self, token_ids: Sequence[int], *, model: str = "", timeout_s: float | None = None
    ) -> str:
        """Text of token ids."""
        return await self._call(partial(self._caller.detokenize, token_ids, model), timeout_s)

    async def embed(self, inputs: EmbedInputs, **options: Unpack[EmbedOptions]) -> Embeddings:
        """Vectors of a text, of texts, or of token ids: hidden states of the served model.

        Raises:
            BatonError: a subclass per reason, such as InvalidRequest or PromptTooLong.
        """
        request = embed_request(inputs, options)
        return await self._call(partial(self._caller.embed, request), options.get("timeout_s"))

    async def pin_prefix(
        self, prompt: str | None = None, **options: Unpack[PinOptions]
    ) -> PinnedPrefix:
        """Keeps a prompt's KV from eviction for a limited time. Calling it again renews the pin.

        Raises:
            KvCacheFull: the prompt exceeds the room for pins.
        """
        request = pin_request(prompt, options)
        return await self._call(partial(self._caller.pin, request), options.get("timeout_s"))

    async def unpin_prefix(self, pin_id: str, *, timeout_s: float | None = None) -> bool:
        """Ends a pin; False when there is no such pin."""
        return await self._call(partial(self._caller.unpin, pin_id), timeout_s)

    async def pinned_prefixes(self, *, timeout_s: float | None = None) -> list[PinnedPrefix]:
        """The prefixes that are kept."""
        return await self._call(self._caller.pins, timeout_s)

    async def status(self, *, timeout_s: float | None = None) -> ClusterStatus:
        """State and load of every process that the scheduler knows."""
        return await self._call(self._caller.status, timeout_s)

    async def requests(
        self, *, limit: int = 0, tenant: str = "", timeout_s: float | None = None
    ) -> RequestList:
        """The latest requests of this scheduler, with their stages; at most `limit`, 0 for all.

        `tenant` is for gateways, which authenticate tenants themselves: it selects that one's.
        """
        query = RecordQuery(limit=limit, tenant=tenant)
        return await self._call(partial(self._caller.requests, query), timeout_s)

    async def request(
        self, request_id: str, *, tenant: str = "", timeout_s: float | None = None
    ) -> RequestRecord:
        """One of the latest requests, with what its stages consisted of; `tenant` as in `requests`.

        Raises:
            RequestNotFound: the scheduler does not remember it.
        """
        query = RecordQuery(request_id, limit=1, tenant=tenant)
        found = await self._call(partial(self._caller.requests, query), timeout_s)
        return found.requests[0]

    async def _call(
        self, call: Callable[[CallTerms], Awaitable[_Answer]], timeout_s: float | None
    ) -> _Answer:
        ends_at_s = time.monotonic() + self._connection.check_timeout_s(timeout_s)
        attempt = 0
        while True:
            attempt += 1
            try:
                answer = await call(self._connection.terms(ends_at_s - time.monotonic()))
            except BatonError as error:
                delay_s = self._retrier.delay_s(error, attempt, ends_at_s - time.monotonic())
                if delay_s is None:
                    raise
            else:
                self._retrier.succeeded()
                return answer
            await AsyncPause().ended_within(delay_s)


async def _complete(stream: AsyncTextStream) -> Completion:
    async with stream:
        async for _ in stream:
            pass
    return stream.completion
