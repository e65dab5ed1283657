"""The blocking client, on blocking gRPC: usable from any thread, no event loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from random import Random, SystemRandom
from typing import Any, Literal, Self, TypeVar, Unpack, cast, overload

import grpc

from baton.client import messages as pb
from baton.client.connection import Connection, default_api_key, default_tls
from baton.client.errors import error_of_call
from baton.client.pins import PinnedPrefix, PinOptions, pin_request, pinned_from
from baton.client.records import RequestList, RequestRecord, list_requests_request, requests_from
from baton.client.retry import Retrier, RetryPolicy
from baton.client.sync_stream import TextStream
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


class Client:
    """Talks to a Baton scheduler. Thread-safe; close it, or use it in `with`.

    Failures are the errors of `baton.client`. Refusals are tried again within the deadline,
    and an answer that breaks off goes on with its next token.

        with Client("127.0.0.1:50051") as client:
            print(client.generate("def add(a, b):", max_tokens=32).text)
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
        self._channel = self._connection.channel()
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the channel; running calls are cancelled."""
        self._channel.close()

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
            BatonError: the reason's own class, such as InvalidRequest or QueueFull.
        """
        request = pb.generate_request(prompt, options)

        def open_call(request: Any, timeout_s: float) -> Any:
            return self._stub.Generate(
                request, timeout=timeout_s, metadata=self._connection.metadata()
            )

        timeout_s = self._connection.deadline_s(options)
        answer = TextStream(request, open_call, self._connection, self._retrier, timeout_s)
        if stream:
            return answer
        with answer:
            for _ in answer:
                pass
        return answer.completion

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
        request = inference_pb2.ListModelsRequest()
        return pb.models_from(self._call(self._stub.ListModels, request, timeout_s))

    def tokenize(
        self,
        text: str | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        model: str = "",
        timeout_s: float | None = None,
    ) -> list[int]:
        """Token ids of a text, or of a conversation with its generation prompt."""
        request = pb.tokenize_request(text, messages, model)
        return list(self._call(self._stub.Tokenize, request, timeout_s).token_ids)

    def detokenize(
        self, token_ids: Sequence[int], *, model: str = "", timeout_s: float | None = None
    ) -> str:
        """Text of token ids."""
        request = pb.detokenize_request(token_ids, model)
        text: str = self._call(self._stub.Detokenize, request, timeout_s).text
        return text

    def embed(self, inputs: EmbedInputs, **options: Unpack[EmbedOptions]) -> Embeddings:
        """Vectors of a text, of texts, or of token ids: hidden states of the served model.

        Raises:
            BatonError: the reason's own class, such as InvalidRequest or PromptTooLong.
        """
        request = embed_request(inputs, options)

        def call(request: object, **given: Any) -> list[inference_pb2.EmbedResponse]:
            return list(self._stub.Embed(request, **given))

        return embeddings_from(request, self._call(call, request, options.get("timeout_s")))

    def pin_prefix(self, prompt: str | None = None, **options: Unpack[PinOptions]) -> PinnedPrefix:
        """Has the cache keep a prompt's KV from being evicted, for a limited time.

        Raises:
            KvCacheFull: it does not fit what pins may take.
        """
        request = pin_request(prompt, options)
        answer = self._call(self._stub.PinPrefix, request, options.get("timeout_s"))
        return pinned_from(answer.pin)

    def unpin_prefix(self, pin_id: str, *, timeout_s: float | None = None) -> bool:
        """Takes that back; False when there is no such pin."""
        request = inference_pb2.UnpinPrefixRequest(pin_id=pin_id)
        return bool((self._call(self._stub.UnpinPrefix, request, timeout_s)).found)

    def pinned_prefixes(self, *, timeout_s: float | None = None) -> list[PinnedPrefix]:
        """The prefixes that are kept."""
        request = inference_pb2.ListPinnedPrefixesRequest()
        answer = self._call(self._stub.ListPinnedPrefixes, request, timeout_s)
        return [pinned_from(pin) for pin in answer.pins]

    def status(self, *, timeout_s: float | None = None) -> ClusterStatus:
        """State and load of every process that the scheduler knows."""
        request = inference_pb2.GetClusterStatusRequest()
        return pb.status_from(self._call(self._stub.GetClusterStatus, request, timeout_s))

    def requests(
        self, *, limit: int = 0, tenant: str = "", timeout_s: float | None = None
    ) -> RequestList:
        """The latest requests of this scheduler, with their stages; at most `limit`, 0 for all.

        `tenant` is for gateways, which tell tenants apart themselves: only that one's.
        """
        request = list_requests_request("", limit, tenant)
        return requests_from(self._call(self._stub.ListRequests, request, timeout_s))

    def request(
        self, request_id: str, *, tenant: str = "", timeout_s: float | None = None
    ) -> RequestRecord:
        """One of the latest requests, with what its stages consisted of; `tenant` as in `requests`.

        Raises:
            RequestNotFound: the scheduler does not remember it.
        """
        request = list_requests_request(request_id, 1, tenant)
        answer = self._call(self._stub.ListRequests, request, timeout_s)
        return requests_from(answer).requests[0]

    def _call(
        self, method: Callable[..., _Answer], request: object, timeout_s: float | None
    ) -> _Answer:
        ends_at_s = time.monotonic() + self._connection.check_timeout_s(timeout_s)
        attempt = 0
        while True:
            attempt += 1
            remaining_s = max(0.0, ends_at_s - time.monotonic())
            try:
                answer = method(request, timeout=remaining_s, metadata=self._connection.metadata())
            except grpc.RpcError as rpc_error:
                error = error_of_call(rpc_error, self._connection.address)
                delay_s = self._retrier.delay_s(error, attempt, ends_at_s - time.monotonic())
                if delay_s is None:
                    raise error from rpc_error
            else:
                self._retrier.succeeded()
                return answer
            time.sleep(delay_s)
