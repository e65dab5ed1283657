"""A tokenizer whose token ids are code points, served over gRPC by `fake_workers.FakeProcess`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from baton.core.errors import BatonError, NoWorker
from baton.v1 import tokenizer_pb2, tokenizer_pb2_grpc
from tests.support.pauses import Pauses

MODEL = "demo"


class FakeTokenizer(tokenizer_pb2_grpc.TokenizerServiceServicer):
    role = "tokenizer"

    def __init__(self) -> None:
        self.pauses = Pauses()
        self.num_calls = 0
        self.remaining_s: dict[str, float | None] = {}
        """To the deadline of the last call of each method."""
        self.encoded: list[Any] = []
        self.open_outputs: dict[int, list[str]] = {}
        self.num_described: list[int] = []
        """Tokens described per message, where any."""
        self.break_after_messages = -1
        self.encode_error: BatonError | None = None

    async def Encode(self, request: Any, context: Any) -> tokenizer_pb2.EncodeResponse:
        self.encoded.append(request)
        self.remaining_s["Encode"] = context.time_remaining()
        await self.pauses.at("encode")
        if self.encode_error is not None:
            raise self.encode_error
        text = request.text or "".join(m.content for m in request.chat.messages)
        return tokenizer_pb2.EncodeResponse(model=MODEL, token_ids=map(ord, text))

    async def DecodeText(self, request: Any, context: Any) -> tokenizer_pb2.DecodeTextResponse:
        return tokenizer_pb2.DecodeTextResponse(text="".join(map(chr, request.token_ids)))

    async def StreamText(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        self.num_calls += 1
        self.open_outputs = {}
        stops: dict[int, list[str]] = {}
        async for request in request_iterator:
            if self.break_after_messages == 0:
                self.break_after_messages = -1
                raise NoWorker("the tokenizer fell over")
            self.break_after_messages -= 1
            stream_id = request.stream_id
            if request.HasField("open"):
                self.open_outputs[stream_id] = []
                stops[stream_id] = list(request.open.stop)
            if request.describe_token_ids:
                self.num_described.append(len(request.describe_token_ids))
            yield self._step(request, stops)

    def _step(self, request: Any, stops: dict[int, list[str]]) -> Any:
        response = tokenizer_pb2.StreamTextResponse(stream_id=request.stream_id)
        seen = self.open_outputs.get(request.stream_id)
        if seen is None:
            return response
        for token_id in request.token_ids:
            seen.append(chr(token_id))
            response.num_tokens += 1
            whole = "".join(seen)
            stop = next((stop for stop in stops[request.stream_id] if whole.endswith(stop)), "")
            if stop:
                response.stop = stop
                break
            response.text += chr(token_id)
        for token_id in request.describe_token_ids:
            response.token_texts.add(token_bytes=chr(token_id).encode(), text=chr(token_id))
        if request.flush or response.stop:
            del self.open_outputs[request.stream_id]
        return response
