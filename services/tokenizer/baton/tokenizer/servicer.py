"""TokenizerService on the wire: checks limits, calls the vocabulary, answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

from baton.core.errors import BatonError, InvalidRequest
from baton.tokenizer.conversation import read_array, read_message
from baton.tokenizer.streams import OpenOutputs
from baton.tokenizer.vocabulary import Vocabularies, Vocabulary
from baton.v1 import common_pb2, tokenizer_pb2, tokenizer_pb2_grpc

if TYPE_CHECKING:
    import grpc.aio
    from prometheus_client import Counter, Gauge

_Argument = TypeVar("_Argument")
_Result = TypeVar("_Result")
SHORT_TEXT_CHARS = 2_000
"""Encoded on the event loop: about a millisecond, less than handing it to a thread is worth."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on one message."""

    max_text_chars: int
    max_token_ids: int
    max_chat_messages: int
    max_open_outputs: int


@dataclass(frozen=True, slots=True)
class TokenizerMetrics:
    """Counts of what went through."""

    encoded_tokens: Counter
    decoded_tokens: Counter
    open_outputs: Gauge


class TokenizerServicer(tokenizer_pb2_grpc.TokenizerServiceServicer):
    """Answers TokenizerService; `executor` runs what would keep the event loop."""

    def __init__(
        self,
        vocabularies: Vocabularies,
        limits: Limits,
        executor: Executor,
        metrics: TokenizerMetrics,
    ) -> None:
        self._vocabularies = vocabularies
        self._limits = limits
        self._executor = executor
        self._metrics = metrics

    def add_to(self, server: grpc.aio.Server) -> list[str]:
        """Registers itself; returns the full names of what it serves."""
        tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server(self, server)
        return [tokenizer_pb2.DESCRIPTOR.services_by_name["TokenizerService"].full_name]

    async def Encode(
        self, request: tokenizer_pb2.EncodeRequest, context: Any
    ) -> tokenizer_pb2.EncodeResponse:
        """Text or a conversation to token ids."""
        vocabulary = self._vocabularies.get(request.model)
        if request.WhichOneof("input") == "text":
            self._check_chars(len(request.text))
            token_ids = await self._run(len(request.text), vocabulary.encode_text, request.text)
        elif request.WhichOneof("input") == "chat":
            token_ids = await self._encode_chat(vocabulary, request)
        else:
            raise InvalidRequest("set text or chat")
        self._metrics.encoded_tokens.inc(len(token_ids))
        return tokenizer_pb2.EncodeResponse(
            token_ids=token_ids,
            tokenizer_hash=vocabulary.tokenizer_hash,
            model=vocabulary.name,
        )

    async def DecodeText(
        self, request: tokenizer_pb2.DecodeTextRequest, context: Any
    ) -> tokenizer_pb2.DecodeTextResponse:
        """Token ids to text."""
        vocabulary = self._vocabularies.get(request.model)
        token_ids = list(request.token_ids)
        self._check_ids(len(token_ids))

        def decode(ids: list[int]) -> str:
            return vocabulary.decode(ids, keep_special_tokens=request.keep_special_tokens)

        text = await self._run(len(token_ids), decode, token_ids)
        self._metrics.decoded_tokens.inc(len(token_ids))
        return tokenizer_pb2.DecodeTextResponse(text=text)

    async def StreamText(
        self, request_iterator: AsyncIterator[tokenizer_pb2.StreamTextRequest], context: Any
    ) -> AsyncIterator[tokenizer_pb2.StreamTextResponse]:
        """Token ids to text as they come, many outputs in one call."""
        outputs = OpenOutputs(self._vocabularies, self._limits.max_open_outputs)
        num_shown = 0
        try:
            async for request in request_iterator:
                response = self._step(outputs, request)
                self._metrics.open_outputs.inc(len(outputs) - num_shown)
                num_shown = len(outputs)
                yield response
        finally:
            self._metrics.open_outputs.dec(num_shown)

    async def GetTokenizerInfo(
        self, request: tokenizer_pb2.GetTokenizerInfoRequest, context: Any
    ) -> tokenizer_pb2.GetTokenizerInfoResponse:
        """The models known here."""
        return tokenizer_pb2.GetTokenizerInfoResponse(
            tokenizers=[
                tokenizer_pb2.TokenizerInfo(
                    model=vocabulary.name,
                    tokenizer_hash=vocabulary.tokenizer_hash,
                    vocab_size=vocabulary.vocab_size,
                    eos_token_ids=vocabulary.eos_token_ids,
                    has_chat_template=vocabulary.chat_template is not None,
                )
                for vocabulary in self._vocabularies
            ]
        )

    def _step(
        self, outputs: OpenOutputs, request: tokenizer_pb2.StreamTextRequest
    ) -> tokenizer_pb2.StreamTextResponse:
        """Answers one message. An error closes its output and leaves the others alone."""
        stream_id = request.stream_id
        response = tokenizer_pb2.StreamTextResponse(stream_id=stream_id)
        is_opening = request.HasField("open")
        try:
            self._check_ids(len(request.token_ids) + len(request.describe_token_ids))
            if is_opening:
                outputs.open(
                    stream_id,
                    request.open.model,
                    tuple(request.open.stop),
                    keep_special_tokens=request.open.keep_special_tokens,
                )
            output = outputs.get(stream_id)
            piece = outputs.add(stream_id, tuple(request.token_ids), is_last=request.flush)
        except BatonError as error:
            outputs.close(stream_id)
            response.error_reason = cast("common_pb2.ErrorReason", error.reason.value)
            response.error_message = error.message
            return response
        self._metrics.decoded_tokens.inc(piece.num_tokens)
        response.text = piece.text
        response.stop = piece.stop
        response.num_tokens = piece.num_tokens
        if output is not None:
            for token_id in request.describe_token_ids:
                token = output.vocabulary.describe(token_id)
                response.token_texts.add(token_bytes=token.token_bytes, text=token.text)
        return response

    async def _encode_chat(
        self, vocabulary: Vocabulary, request: tokenizer_pb2.EncodeRequest
    ) -> list[int]:
        chat = request.chat
        if not 0 < len(chat.messages) <= self._limits.max_chat_messages:
            raise InvalidRequest(
                f"chat must have 1 to {self._limits.max_chat_messages} messages, "
                f"got {len(chat.messages)}"
            )
        num_chars = len(chat.tools_json) + sum(
            len(message.role) + len(message.content) + len(message.tool_calls_json)
            for message in chat.messages
        )
        self._check_chars(num_chars)
        messages = [
            read_message(
                message.role,
                message.content,
                message.tool_calls_json,
                message.tool_call_id,
                message.name,
            )
            for message in chat.messages
        ]
        tools = read_array(chat.tools_json, "tools")
        return await self._run(num_chars, partial(vocabulary.encode_chat, tools=tools), messages)

    async def _run(
        self, size: int, function: Callable[[_Argument], _Result], argument: _Argument
    ) -> _Result:
        if size <= SHORT_TEXT_CHARS:
            return function(argument)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, function, argument)

    def _check_chars(self, num_chars: int) -> None:
        if num_chars > self._limits.max_text_chars:
            raise InvalidRequest(
                f"the text has {num_chars} characters; "
                f"at most {self._limits.max_text_chars} are encoded at once"
            )

    def _check_ids(self, num_ids: int) -> None:
        if num_ids > self._limits.max_token_ids:
            raise InvalidRequest(
                f"the message has {num_ids} token ids; "
                f"at most {self._limits.max_token_ids} are taken at once"
            )
