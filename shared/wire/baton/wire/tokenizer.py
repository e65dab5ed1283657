"""The conversation with a tokenizer: text to token ids, and token ids back to text."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
from google.protobuf.message import Message

from baton.core.errors import BatonError, InvalidRequest, error_for
from baton.core.output import TokenText
from baton.core.prompt import TextPrompt
from baton.v1 import tokenizer_pb2 as pb2
from baton.v1 import tokenizer_pb2_grpc
from baton.wire import calls
from baton.wire.errors import reason_from_pb, reason_to_pb, rpc_errors
from baton.wire.fields import as_message, as_value
from baton.wire.prompt import chat_from_pb, prompt_fields


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt as token ids."""

    model: str
    token_ids: tuple[int, ...]
    tokenizer_hash: str = ""


@dataclass(frozen=True, slots=True)
class TokenizerInfo:
    """A model that a tokenizer serves."""

    model: str
    tokenizer_hash: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool


@dataclass(frozen=True, slots=True)
class OpenText:
    """How an output becomes text."""

    model: str
    stop: tuple[str, ...] = ()
    keep_special_tokens: bool = False


@dataclass(frozen=True, slots=True)
class TextPiece:
    """The next tokens of one output, for the tokenizer."""

    stream_id: int
    token_ids: Sequence[int] = ()
    open: OpenText | None = None
    """With an output's first piece only."""
    is_last: bool = False
    describe_token_ids: Sequence[int] = ()
    """Tokens whose own bytes and text are asked for."""


@dataclass(frozen=True, slots=True)
class TextReply:
    """Text that became certain; answers one TextPiece."""

    stream_id: int
    text: str = ""
    stop: str = ""
    """Stop string that ended the output; the text ends before it."""
    num_tokens: int = 0
    """How many of the piece's tokens belong to the output."""
    token_texts: tuple[TokenText, ...] = ()
    error: BatonError | None = None
    """Why this output cannot go on; others of the call can."""


class TextCall(Protocol):
    """A running StreamText call, with answers in the order of the pieces.

    One writer and one reader at a time; both raise BatonError when the call ends.
    """

    async def write(self, piece: TextPiece) -> None:
        """Sends a piece."""

    async def read(self) -> TextReply | None:
        """The next answer, None when the tokenizer ended the call."""

    def cancel(self) -> None:
        """Ends the call. Idempotent."""


class TokenizerCaller(Protocol):
    """One tokenizer. Methods raise BatonError when a call fails."""

    async def encode(self, model: str, prompt: TextPrompt, timeout_s: float) -> Encoded:
        """Token ids of a text or a conversation."""

    async def decode_text(self, model: str, token_ids: Sequence[int], timeout_s: float) -> str:
        """Text of token ids, without special tokens."""

    def stream_text(self) -> TextCall:
        """Starts a call that turns many outputs into text."""


class TextSession(Protocol):
    """The outputs that one StreamText call keeps open."""

    def answer(self, piece: TextPiece) -> TextReply:
        """Answers a piece; an error ends that output alone and is part of the answer."""

    def close(self) -> None:
        """Forgets all outputs."""


class TokenizerServer(Protocol):
    """A tokenizer, as its process implements it. Methods raise BatonError."""

    async def encode(self, model: str, prompt: TextPrompt) -> Encoded:
        """Token ids of a text or a conversation."""

    async def decode_text(
        self, model: str, token_ids: Sequence[int], *, keep_special_tokens: bool
    ) -> str:
        """Text of token ids."""

    def open_session(self) -> TextSession:
        """Begins a StreamText call; the caller closes it."""

    def tokenizers(self) -> Sequence[TokenizerInfo]:
        """The models served."""


class RpcTokenizer:
    """Implements TokenizerCaller over a channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: Any = tokenizer_pb2_grpc.TokenizerServiceStub(channel)

    async def encode(self, model: str, prompt: TextPrompt, timeout_s: float) -> Encoded:
        """See TokenizerCaller."""
        request = pb2.EncodeRequest(model=model, **prompt_fields(prompt))
        return as_value(Encoded, await calls.ask(self._stub.Encode, request, timeout_s))

    async def decode_text(self, model: str, token_ids: Sequence[int], timeout_s: float) -> str:
        """See TokenizerCaller."""
        request = pb2.DecodeTextRequest(model=model, token_ids=token_ids)
        return str((await calls.ask(self._stub.DecodeText, request, timeout_s)).text)

    def stream_text(self) -> TextCall:
        """See TokenizerCaller."""
        # No deadline on purpose: the call lives as long as the scheduler. Each answer has one.
        with rpc_errors():
            return _RpcTextCall(self._stub.StreamText())


class _RpcTextCall:
    def __init__(self, call: Any) -> None:
        self._call = call

    async def write(self, piece: TextPiece) -> None:
        request = pb2.StreamTextRequest(
            stream_id=piece.stream_id,
            token_ids=piece.token_ids,
            flush=piece.is_last,
            describe_token_ids=piece.describe_token_ids,
        )
        if piece.open is not None:
            request.open.CopyFrom(as_message(pb2.OpenTextStream, piece.open))
        await calls.write(self._call, request)

    async def read(self) -> TextReply | None:
        pb = await calls.read(self._call)
        if pb is None:
            return None
        reason = reason_from_pb(pb.error_reason) if pb.error_reason else None
        return TextReply(
            stream_id=pb.stream_id,
            text=pb.text,
            stop=pb.stop,
            num_tokens=pb.num_tokens,
            token_texts=tuple(TokenText(entry.token_bytes, entry.text) for entry in pb.token_texts),
            error=error_for(reason, pb.error_message) if reason else None,
        )

    def cancel(self) -> None:
        self._call.cancel()


def add_tokenizer(server: grpc.aio.Server, tokenizer: TokenizerServer) -> str:
    """Serves a tokenizer; returns the service's full name."""
    tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server(_TokenizerAdapter(tokenizer), server)
    return "baton.v1.TokenizerService"


class _TokenizerAdapter(tokenizer_pb2_grpc.TokenizerServiceServicer):
    def __init__(self, tokenizer: TokenizerServer) -> None:
        self._tokenizer = tokenizer

    async def Encode(self, request: pb2.EncodeRequest, _: Any) -> Message:
        kind = request.WhichOneof("input")
        if kind is None:
            raise InvalidRequest("set text or chat")
        prompt = request.text if kind == "text" else chat_from_pb(request.chat)
        encoded = await self._tokenizer.encode(request.model, prompt)
        return as_message(pb2.EncodeResponse, encoded)

    async def DecodeText(self, request: pb2.DecodeTextRequest, _: Any) -> Message:
        text = await self._tokenizer.decode_text(
            request.model,
            list(request.token_ids),
            keep_special_tokens=request.keep_special_tokens,
        )
        return pb2.DecodeTextResponse(text=text)

    async def StreamText(
        self, request_iterator: AsyncIterator[pb2.StreamTextRequest], context: Any
    ) -> AsyncIterator[pb2.StreamTextResponse]:
        session = self._tokenizer.open_session()
        try:
            async for request in request_iterator:
                yield _reply_to_pb(session.answer(_piece_from_pb(request)))
        finally:
            session.close()

    async def GetTokenizerInfo(
        self, request: pb2.GetTokenizerInfoRequest, _: Any
    ) -> pb2.GetTokenizerInfoResponse:
        found = self._tokenizer.tokenizers()
        return pb2.GetTokenizerInfoResponse(
            tokenizers=[as_message(pb2.TokenizerInfo, info) for info in found]
        )


def _piece_from_pb(pb: pb2.StreamTextRequest) -> TextPiece:
    how = None
    if pb.HasField("open"):
        how = as_value(OpenText, pb.open)
    return TextPiece(
        stream_id=pb.stream_id,
        token_ids=tuple(pb.token_ids),
        open=how,
        is_last=pb.flush,
        describe_token_ids=tuple(pb.describe_token_ids),
    )


def _reply_to_pb(reply: TextReply) -> pb2.StreamTextResponse:
    response = pb2.StreamTextResponse(
        stream_id=reply.stream_id, text=reply.text, stop=reply.stop, num_tokens=reply.num_tokens
    )
    for token in reply.token_texts:
        response.token_texts.add(token_bytes=token.token_bytes, text=token.text)
    if reply.error is not None:
        response.error_reason = reason_to_pb(reply.error.reason)
        response.error_message = reply.error.message
    return response
