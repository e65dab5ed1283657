# Generated from `caller.py`: edit that, then `make sync`.
"""Calls to a scheduler's InferenceService on blocking gRPC, for the SDK."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import grpc

from baton.v1 import inference_pb2 as pb2
from baton.v1 import inference_pb2_grpc
from baton.wire.calls import CallTerms
from baton.wire.errors import CallErrors
from baton.wire.inference.chunks import Chunk, chunk_from_pb
from baton.wire.inference.overview import ClusterStatus, Model, models_from_pb, overview_from_pb
from baton.wire.inference.pins import PinnedPrefix, PinRequest, pin_from_pb, pin_request_to_pb
from baton.wire.inference.records import RecordQuery, RequestList, query_to_pb, requests_from_pb
from baton.wire.inference.requests import (
    GenerateRequest,
    TokenizeRequest,
    fitting,
    generate_to_pb,
    tokenize_to_pb,
)
from baton.wire.inference.vectors import Embeddings, EmbedRequest, embed_to_pb, embeddings_from_pb


class ChunkCall(Iterator[Chunk]):
    """A running Generate call. Iterating raises BatonError when the call fails."""

    def __init__(self, call: Any, errors: CallErrors, *, has_token_ids: bool) -> None:
        self.token_ids: list[int] = []
        """Output tokens that came so far, whether or not the chunks have them."""
        self._call = call
        self._messages = iter(call)
        self._errors = errors
        self._has_token_ids = has_token_ids

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        with self._errors:
            message = next(self._messages)
        self.token_ids.extend(message.token_ids)
        return chunk_from_pb(message, has_token_ids=self._has_token_ids)

    def cancel(self) -> None:
        """Ends the call. Idempotent; for any thread."""
        self._call.cancel()


OpenCall = Callable[[CallTerms], ChunkCall]
"""Starts a call whose request is ready, on the terms given."""


class InferenceCaller:
    """One scheduler. Methods raise BatonError; a request that cannot be sent, before its call.

    The channel is opened by the first call. The caller owns it.
    """

    def __init__(
        self,
        address: str,
        credentials: grpc.ChannelCredentials | None,
        options: Sequence[tuple[str, int | str]],
    ) -> None:
        self._address = address
        self._credentials = credentials
        self._options = options
        self._errors = CallErrors(address)
        self._lock = threading.Lock()
        self._channel: grpc.Channel | None = None
        self._opened: Any = None

    def close(self) -> None:
        """Closes the channel; running calls are cancelled."""
        if self._channel is not None:
            self._channel.close()

    def generate(self, request: GenerateRequest, *, can_resume: bool) -> OpenCall:
        """Prepares a call; with `can_resume`, it collects token ids whether or not asked for.

        Raises:
            InvalidRequest: a value does not fit its field.
        """
        message = generate_to_pb(request, with_token_ids=can_resume)
        has_token_ids = request.return_token_ids

        def open_call(terms: CallTerms) -> ChunkCall:
            call = self._stub().Generate(message, timeout=terms.timeout_s, metadata=terms.metadata)
            return ChunkCall(call, self._errors, has_token_ids=has_token_ids)

        return open_call

    def embed(self, request: EmbedRequest, terms: CallTerms) -> Embeddings:
        """Vectors of all inputs, in order."""
        message = embed_to_pb(request)
        with self._errors:
            call = self._stub().Embed(message, timeout=terms.timeout_s, metadata=terms.metadata)
            answers = list(call)
        return embeddings_from_pb(answers, len(request.inputs))

    def models(self, terms: CallTerms) -> list[Model]:
        """The models that can be used now."""
        return models_from_pb(self._ask("ListModels", pb2.ListModelsRequest(), terms))

    def tokenize(self, request: TokenizeRequest, terms: CallTerms) -> list[int]:
        """Token ids of a text, or of a conversation with its generation prompt."""
        answer = self._ask("Tokenize", tokenize_to_pb(request), terms)
        return list(answer.token_ids)

    def detokenize(self, token_ids: Sequence[int], model: str, terms: CallTerms) -> str:
        """Text of token ids."""
        with fitting():
            return str(
                (
                    self._ask(
                        "Detokenize", pb2.DetokenizeRequest(model=model, token_ids=token_ids), terms
                    )
                ).text
            )

    def pin(self, request: PinRequest, terms: CallTerms) -> PinnedPrefix:
        """Keeps a prompt's KV from eviction."""
        answer = self._ask("PinPrefix", pin_request_to_pb(request), terms)
        return pin_from_pb(answer.pin)

    def unpin(self, pin_id: str, terms: CallTerms) -> bool:
        """Ends a pin; False when there is no such pin."""
        return bool((self._ask("UnpinPrefix", pb2.UnpinPrefixRequest(pin_id=pin_id), terms)).found)

    def pins(self, terms: CallTerms) -> list[PinnedPrefix]:
        """The prefixes that are kept."""
        request = pb2.ListPinnedPrefixesRequest()
        answer = self._ask("ListPinnedPrefixes", request, terms)
        return [pin_from_pb(pin) for pin in answer.pins]

    def status(self, terms: CallTerms) -> ClusterStatus:
        """State and load of every process that the scheduler knows."""
        return overview_from_pb(self._ask("GetClusterStatus", pb2.GetClusterStatusRequest(), terms))

    def requests(self, query: RecordQuery, terms: CallTerms) -> RequestList:
        """The latest requests, or one of them."""
        return requests_from_pb(self._ask("ListRequests", query_to_pb(query), terms))

    def _ask(self, method: str, request: object, terms: CallTerms) -> Any:
        with self._errors:
            call = getattr(self._stub(), method)
            return call(request, timeout=terms.timeout_s, metadata=terms.metadata)

    def _stub(self) -> Any:
        with self._lock:  # a blocking caller serves several threads
            if self._opened is None:
                self._channel = (
                    grpc.insecure_channel(self._address, self._options)
                    if self._credentials is None
                    else grpc.secure_channel(self._address, self._credentials, self._options)
                )
                self._opened = inference_pb2_grpc.InferenceServiceStub(self._channel)
            return self._opened
