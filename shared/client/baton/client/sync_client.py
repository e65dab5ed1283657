# Generated from `async_client.py`: edit that, then `make sync`.
"""The blocking client: usable from any thread, without an event loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
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
from baton.client.connection import Connection, default_api_key, default_tls
from baton.client.pause import Pause
from baton.client.retry import Retrier, RetryPolicy
from baton.client.sync_stream import TextStream
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
from baton.wire.inference.blocking import InferenceCaller
from baton.wire.inference.overview import ClusterStatus, Model
from baton.wire.inference.pins import PinnedPrefix
from baton.wire.inference.records import RecordQuery, RequestList, RequestRecord
from baton.wire.inference.vectors import Embeddings

_Answer = TypeVar("_Answer")


class Client:
    """Talks to a Baton scheduler. Thread-safe; close it, or use it in `with`.

    Failures are the errors of `baton.client`. Refusals are tried again within the deadline,
    and an answer that breaks off goes on with its next token.

        with Client("127.0.0.1:50051") as client:
            with client.generate("def add(a, b):", max_tokens=32, stream=True) as stream:
                for chunk in stream:
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
        self._caller = InferenceCaller(
            address, self._connection.credentials(), self._connection.channel_options
        )

    @property
    def address(self) -> str:
        """The scheduler's address, host:port."""
        return self._connection.address

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the channel; running calls are cancelled."""
        self._caller.close()

    @overload
    def generate(
        self,
        prompt: str | None = None,
        *,
        stream: Literal[False] = False,
        **options: Unpack[GenerateOptions],
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompt: str | None = None,
        *,
        stream: Literal[True],
        **options: Unpack[GenerateOptions],
    ) -> TextStream: ...

    def generate(
        self, prompt: str | None = None, *, stream: bool = False, **options: Unpack[GenerateOptions]
    ) -> Completion | TextStream:
        """Generates text for a prompt, `messages=` or `token_ids=`; see GenerateOptions.

        Raises:
            BatonError: a subclass per reason, such as InvalidRequest or QueueFull. Invalid
                arguments raise at once, not when the answer is awaited.
        """
        answer = TextStream(
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
    ) -> Completion: ...

    @overload
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: Literal[True],
        **options: Unpack[ChatOptions],
    ) -> TextStream: ...

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        stream: bool = False,
        **options: Unpack[ChatOptions],
    ) -> Completion | TextStream:
        """Answers a conversation, as `generate` does with `messages=`."""
        whole = cast("GenerateOptions", {**options, "messages": messages})
        if stream:
            return self.generate(stream=True, **whole)
        return self.generate(**whole)

    def models(self, *, timeout_s: float | None = None) -> list[Model]:
        """The models that can be used now."""
        return self._call(self._caller.models, timeout_s)

    def tokenize(
        self,
        text: str | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        model: str = "",
        timeout_s: float | None = None,
    ) -> list[int]:
        """Token ids of a text, or of a conversation with its generation prompt."""
        request = tokenize_request(text, messages, model)
        return self._call(partial(self._caller.tokenize, request), timeout_s)

    def detokenize(
        self, token_ids: Sequence[int], *, model: str = "", timeout_s: float | None = None
    ) -> str:
        """Text of token ids."""
        return self._call(partial(self._caller.detokenize, token_ids, model), timeout_s)

    def embed(self, inputs: EmbedInputs, **options: Unpack[EmbedOptions]) -> Embeddings:
        """Vectors of a text, of texts, or of token ids: hidden states of the served model.

        Raises:
            BatonError: a subclass per reason, such as InvalidRequest or PromptTooLong.
        """
        request = embed_request(inputs, options)
        return self._call(partial(self._caller.embed, request), options.get("timeout_s"))

    def pin_prefix(self, prompt: str | None = None, **options: Unpack[PinOptions]) -> PinnedPrefix:
        """Keeps a prompt's KV from eviction for a limited time. Calling it again renews the pin.

        Raises:
            KvCacheFull: the prompt exceeds the room for pins.
        """
        request = pin_request(prompt, options)
        return self._call(partial(self._caller.pin, request), options.get("timeout_s"))

    def unpin_prefix(self, pin_id: str, *, timeout_s: float | None = None) -> bool:
        """Ends a pin; False when there is no such pin."""
        return self._call(partial(self._caller.unpin, pin_id), timeout_s)

    def pinned_prefixes(self, *, timeout_s: float | None = None) -> list[PinnedPrefix]:
        """The prefixes that are kept."""
        return self._call(self._caller.pins, timeout_s)

    def status(self, *, timeout_s: float | None = None) -> ClusterStatus:
        """State and load of every process that the scheduler knows."""
        return self._call(self._caller.status, timeout_s)

    def requests(
        self, *, limit: int = 0, tenant: str = "", timeout_s: float | None = None
    ) -> RequestList:
        """The latest requests of this scheduler, with their stages; at most `limit`, 0 for all.

        `tenant` is for gateways, which authenticate tenants themselves: it selects that one's.
        """
        query = RecordQuery(limit=limit, tenant=tenant)
        return self._call(partial(self._caller.requests, query), timeout_s)

    def request(
        self, request_id: str, *, tenant: str = "", timeout_s: float | None = None
    ) -> RequestRecord:
        """One of the latest requests, with what its stages consisted of; `tenant` as in `requests`.

        Raises:
            RequestNotFound: the scheduler does not remember it.
        """
        query = RecordQuery(request_id, limit=1, tenant=tenant)
        found = self._call(partial(self._caller.requests, query), timeout_s)
        return found.requests[0]

    def _call(self, call: Callable[[CallTerms], _Answer], timeout_s: float | None) -> _Answer:
        ends_at_s = time.monotonic() + self._connection.check_timeout_s(timeout_s)
        attempt = 0
        while True:
            attempt += 1
            try:
                answer = call(self._connection.terms(ends_at_s - time.monotonic()))
            except BatonError as error:
                delay_s = self._retrier.delay_s(error, attempt, ends_at_s - time.monotonic())
                if delay_s is None:
                    raise
            else:
                self._retrier.succeeded()
                return answer
            Pause().ended_within(delay_s)


def _complete(stream: TextStream) -> Completion:
    with stream:
        for _ in stream:
            pass
    return stream.completion
