"""A scheduler that computes nothing: `python -m benchmarks.gateway.mock` prints its address.

`max_tokens` words come at once, one message each, ready-made, so that it is faster than what is
measured in front of it.
"""

from __future__ import annotations

import asyncio
import functools
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio

from baton.v1 import common_pb2, inference_pb2

METHOD = "/baton.v1.InferenceService/Generate"
_WORD = " token"


@functools.cache
def _word(index: int) -> bytes:
    message = inference_pb2.GenerateResponse(text=_WORD, token_index=index, num_tokens=1)
    if index == 0:
        message.request_id, message.model, message.trace_id = "req-1", "mock", "ab" * 16
    return message.SerializeToString()


@functools.cache
def _ending(num_tokens: int) -> bytes:
    message = inference_pb2.GenerateResponse(
        token_index=num_tokens, finish_reason=common_pb2.FINISH_REASON_LENGTH
    )
    message.usage.prompt_tokens, message.usage.completion_tokens = 7, num_tokens
    return message.SerializeToString()


async def _generate(request: inference_pb2.GenerateRequest, context: Any) -> AsyncIterator[bytes]:
    del context
    num_tokens = request.sampling.max_tokens
    for index in range(num_tokens):
        yield _word(index)
    yield _ending(num_tokens)


class _Handler(grpc.GenericRpcHandler):
    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Knows one method."""
        if handler_call_details.method != METHOD:
            return None
        return grpc.unary_stream_rpc_method_handler(
            _generate, inference_pb2.GenerateRequest.FromString, None
        )


async def _serve() -> None:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((_Handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    sys.stdout.write(f"127.0.0.1:{port}\n")
    sys.stdout.flush()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(_serve())
