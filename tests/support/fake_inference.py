"""An in-process InferenceService for tests of what talks to one: the SDK and the gateway."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from baton.client import RetryPolicy
from baton.core.errors import BatonError, InvalidRequest, RequestNotFound
from baton.v1 import common_pb2, inference_pb2, inference_pb2_grpc

FAST = RetryPolicy(max_attempts=4, initial_backoff_s=0.001, max_backoff_s=0.002)
"""Tries again at once."""
_CODES = {
    "INVALID_REQUEST": grpc.StatusCode.INVALID_ARGUMENT,
    "PROMPT_TOO_LONG": grpc.StatusCode.INVALID_ARGUMENT,
    "MODEL_NOT_FOUND": grpc.StatusCode.NOT_FOUND,
    "REQUEST_NOT_FOUND": grpc.StatusCode.NOT_FOUND,
    "UNAUTHENTICATED": grpc.StatusCode.UNAUTHENTICATED,
    "FORBIDDEN": grpc.StatusCode.PERMISSION_DENIED,
    "QUEUE_FULL": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "KV_CACHE_FULL": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "NO_WORKER": grpc.StatusCode.UNAVAILABLE,
    "WORKER_DRAINING": grpc.StatusCode.UNAVAILABLE,
    "DEADLINE": grpc.StatusCode.DEADLINE_EXCEEDED,
}


async def abort(context: Any, error: BatonError) -> None:
    """Ends a call the way the services' interceptor does."""
    metadata = [("baton-error-reason", error.reason.name)]
    if error.retry_after_s is not None:
        metadata.append(("baton-retry-after-ms", str(int(error.retry_after_s * 1e3))))
    code = _CODES.get(error.reason.name, grpc.StatusCode.INTERNAL)
    await context.abort(code, error.message, tuple(metadata))


@dataclass
class FakeInference(inference_pb2_grpc.InferenceServiceServicer):
    """Says `words`, one per message; `before` and `after` fail the calls of their turn."""

    words: tuple[str, ...] = ("Hello", " wörld", "!")
    embedding_tail: float = 0.5
    before: list[BatonError] = field(default_factory=list)
    """Errors of the next calls, raised before their first message."""
    after: list[BatonError] = field(default_factory=list)
    """Errors of the next calls, raised after their first word."""
    last: list[BatonError] = field(default_factory=list)
    """Errors of the next calls, raised after their last message."""
    finish: int = common_pb2.FINISH_REASON_STOP
    seed: int | None = None
    """Told with the first message: then an answer that broke can go on."""
    hold: asyncio.Event | None = None
    """Waited for after the first word."""
    requests: list[Any] = field(default_factory=list)
    metadata: list[dict[str, str]] = field(default_factory=list)
    remaining_s: list[float | None] = field(default_factory=list)
    tenants: list[str] = field(default_factory=list)
    """Those that requests were listed for."""
    num_running: int = 0
    num_cancelled: int = 0
    status_error: BatonError | None = None
    server: Any = None
    address: str = ""
    on_request: Callable[[inference_pb2.GenerateRequest], None] | None = None

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.remaining_s.append(context.time_remaining())
        if self.on_request is not None:
            self.on_request(request)
        if self.before:
            await abort(context, self.before.pop(0))
        self.num_running += 1
        try:
            yield inference_pb2.GenerateResponse(
                request_id=request.request_id or "req-1",
                trace_id="ab" * 16,
                model="demo",
                seed=self.seed,
                fingerprint=b"weights",
            )
            for index, word in enumerate(self.words):
                if index < len(request.resume.token_ids):
                    continue
                yield self._word(request, index, word)
                if self.after:
                    await abort(context, self.after.pop(0))
                if self.hold is not None:
                    await self.hold.wait()
            yield self._end(request)
            if self.last:
                await abort(context, self.last.pop(0))
        except (asyncio.CancelledError, GeneratorExit):
            self.num_cancelled += 1  # GeneratorExit: cancelled while gRPC was writing
            raise
        finally:
            self.num_running -= 1

    def _word(
        self, request: inference_pb2.GenerateRequest, index: int, word: str
    ) -> inference_pb2.GenerateResponse:
        message = inference_pb2.GenerateResponse(text=word, token_index=index, num_tokens=1)
        if index == 0 and request.sampling.HasField("prompt_logprobs"):
            message.prompt_logprobs.add(token_id=9, token="p", token_bytes=b"p", logprob=-0.75)
        if request.return_token_ids:
            message.token_ids.append(100 + index)
        if request.sampling.logprobs:
            entry = message.logprobs.add(
                token_id=100 + index, token=word, token_bytes=word.encode(), logprob=-0.5
            )
            for rank in range(request.sampling.top_logprobs):
                text = word if rank == 0 else f"alt{rank}"
                entry.top.add(
                    token_id=100 + index + rank,
                    token=text,
                    token_bytes=text.encode(),
                    logprob=-0.5 - rank,
                )
        return message

    def _end(self, request: inference_pb2.GenerateRequest) -> inference_pb2.GenerateResponse:
        message = inference_pb2.GenerateResponse(
            token_index=len(self.words), finish_reason=self.finish, trace_id="ab" * 16
        )
        message.usage.prompt_tokens = 7
        message.usage.completion_tokens = len(self.words)
        message.usage.cached_tokens = 4
        message.usage.response_cached = request.cache_response
        if request.explain:
            stage = message.stages.add(stage="prefill", before_first_token=True, worker_id="p1")
            stage.start.nanos = 250_000_000
            stage.duration.seconds = 1
            message.placement.prefill_worker_id = "p1"
            message.placement.decode_worker_id = "d1"
            message.placement.attempts = 1
        return message

    async def Embed(
        self, request: inference_pb2.EmbedRequest, context: Any
    ) -> AsyncIterator[inference_pb2.EmbedResponse]:
        """Tells each input's vector as its size and its index; the last input comes first."""
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.remaining_s.append(context.time_remaining())
        if self.before:
            await abort(context, self.before.pop(0))
        self.num_running += 1
        try:
            if self.hold is not None:
                await self.hold.wait()
            for index in reversed(range(len(request.inputs))):
                entry = request.inputs[index]
                size = len(entry.text) or len(entry.tokens.token_ids)
                yield inference_pb2.EmbedResponse(
                    index=index,
                    values=[size, index, self.embedding_tail],
                    prompt_tokens=size,
                    model="demo",
                )
        except (asyncio.CancelledError, GeneratorExit):
            self.num_cancelled += 1
            raise
        finally:
            self.num_running -= 1

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Any
    ) -> inference_pb2.ListModelsResponse:
        if self.before:
            await abort(context, self.before.pop(0))
        response = inference_pb2.ListModelsResponse()
        response.models.add(
            model="demo", max_model_len_tokens=2048, num_prefill_workers=1, num_decode_workers=2
        )
        return response

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Any
    ) -> inference_pb2.TokenizeResponse:
        return inference_pb2.TokenizeResponse(token_ids=list(request.text.encode()))

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: Any
    ) -> inference_pb2.DetokenizeResponse:
        if any(token_id > 255 for token_id in request.token_ids):
            await abort(context, InvalidRequest("a token id is not in the vocabulary"))
        text = bytes(request.token_ids).decode("utf-8", "replace")
        return inference_pb2.DetokenizeResponse(text=text)

    async def GetClusterStatus(
        self, request: inference_pb2.GetClusterStatusRequest, context: Any
    ) -> inference_pb2.GetClusterStatusResponse:
        if self.status_error is not None:
            await abort(context, self.status_error)
        response = inference_pb2.GetClusterStatusResponse(bus_connected=True)
        service = response.services.add(worker_id="d1", role="decode", state="ready")
        service.kv_blocks["free"] = 9
        response.requests_by_state["DECODING"] = 2
        return response

    async def ListRequests(
        self, request: inference_pb2.ListRequestsRequest, context: Any
    ) -> inference_pb2.ListRequestsResponse:
        self.tenants.append(request.tenant)
        known = {"", "req-1", *(seen.request_id for seen in self.requests)}
        if request.request_id not in known:
            await abort(context, RequestNotFound("no such request"))
        response = inference_pb2.ListRequestsResponse(prompt_tokens=7, output_tokens=5)
        name = request.request_id or "req-1"
        record = response.requests.add(request_id=name, state="finished", outcome="stop")
        record.age.seconds, record.elapsed.seconds, record.ttft.nanos = 9, 2, 500_000_000
        record.stages.add(stage="prefill", before_first_token=True).duration.seconds = 1
        if request.request_id:
            track = record.tracks.add(name="prefill_chunk", worker_id="p1")
            track.slices.add(parts=1, tokens=3).duration.nanos = 1_000_000
        return response


async def serve(servicer: FakeInference, address: str = "127.0.0.1:0") -> tuple[Any, str]:
    """Starts a server for it; returns the server and its address."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port(address)
    await server.start()
    return server, f"127.0.0.1:{port}"
