"""Values of the conversation with a scheduler: through messages and back, and through a server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any, cast

import grpc
import pytest

from baton.client import AsyncClient, RetryPolicy
from baton.core.errors import BatonError, InvalidRequest, NoWorker
from baton.core.output import Usage
from baton.core.prompt import Chat, ChatTurn, Prompt
from baton.core.request import Stage
from baton.core.sampling import SamplingParams
from baton.v1 import inference_pb2
from baton.wire.errors import trailing_metadata
from baton.wire.inference.chunks import (
    Chunk,
    Logprob,
    PlacementTaken,
    TopLogprob,
    chunk_from_pb,
    chunk_to_pb,
)
from baton.wire.inference.kept_answer import answer_part, chunks_of_answer
from baton.wire.inference.requests import (
    GenerateRequest,
    ResumePoint,
    generate_from_pb,
    generate_to_pb,
)
from baton.wire.inference.serving import Emit, InferenceServer, add_inference_server

TEXT = "a token of many characters " * 8
ENTRY = Logprob(5, TEXT, TEXT.encode(), -0.5, (TopLogprob(5, TEXT, TEXT.encode(), -0.5),) * 2)
LAST = Chunk(
    text="hi",
    token_index=3,
    num_tokens=1,
    token_ids=(7,),
    logprobs=(ENTRY,),
    prompt_logprobs=(ENTRY, ENTRY),
    request_id="r",
    model="m",
    trace_id="t",
    finish_reason="stop",
    stop_reason="x",
    usage=Usage(3, 4, 2, 6, 5),
    stages=(Stage("decode", 0.25, 0.5, before_first_token=False, worker_id="d"),),
    placement=PlacementTaken("p", "d", local_prefill=False, reason="r", attempts=2),
    seed=0,
    fingerprint=b"f",
)
WANTS_ALL = inference_pb2.GenerateRequest(return_token_ids=True, explain=True)


@pytest.mark.parametrize(
    "prompt", ["text", (1, 2), Chat((ChatTurn("user", "hi", name="n"),), "[]")]
)
def test_a_request_survives_the_wire(prompt: Prompt) -> None:
    request = GenerateRequest(
        prompt=prompt,
        sampling=SamplingParams(temperature=0.5, seed=2**64 - 1),
        model="m",
        request_id="r",
        priority=3,
        cache_salt="s",
        explain=True,
        return_token_ids=True,
        keep_special_tokens=True,
        fork_of="f",
        cache_response=True,
        resume=ResumePoint((1, 2), 5, b"d"),
        unset=frozenset({"top_p"}),
    )
    pb = generate_to_pb(request)
    assert not pb.sampling.HasField("top_p")
    assert generate_from_pb(pb) == request


def test_a_chunk_survives_the_wire() -> None:
    [message] = chunk_to_pb(LAST, WANTS_ALL)
    assert chunk_from_pb(message) == LAST
    [plain] = chunk_to_pb(LAST, inference_pb2.GenerateRequest())
    assert chunk_from_pb(plain) == replace(LAST, token_ids=(), stages=(), placement=None)


def test_a_kept_answer_names_no_request_and_counts_as_cached() -> None:
    first = Chunk(text="a", num_tokens=1, token_ids=(1,), request_id="r", seed=4, fingerprint=b"f")
    kept = chunks_of_answer(answer_part(first) + answer_part(LAST))
    assert kept[0] == Chunk(text="a", num_tokens=1, token_ids=(1,))
    assert kept[1].usage == Usage(3, 4, cached_tokens=3, response_cached=True)
    assert (kept[1].request_id, kept[1].trace_id, kept[1].stages) == ("", "", ())
    with pytest.raises(InvalidRequest, match="not whole"):
        chunks_of_answer(answer_part(first))


class Fake:
    """Emits what it is given."""

    def __init__(self, chunks: Sequence[Chunk], error: BatonError | None = None) -> None:
        self.chunks = chunks
        self.error = error
        self.num_calls = 0

    async def generate(self, request: GenerateRequest, timeout_s: float | None, emit: Emit) -> None:
        self.num_calls += 1
        for chunk in self.chunks:
            await emit(chunk)
        if self.error is not None:
            raise self.error


class _Aborts(grpc.aio.ServerInterceptor):
    """Maps errors as the services' interceptor does, for these tests."""

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = await continuation(details)

        async def call(request: Any, context: Any) -> None:
            try:
                await handler.unary_stream(request, context)
            except BatonError as error:
                await context.abort(
                    grpc.StatusCode.UNAVAILABLE, error.message, trailing_metadata(error)
                )

        return handler._replace(unary_stream=call)


@pytest.fixture
async def served() -> AsyncIterator[tuple[grpc.aio.Server, str]]:
    server = grpc.aio.server(interceptors=[_Aborts()])
    port = server.add_insecure_port("127.0.0.1:0")
    yield server, f"127.0.0.1:{port}"
    await server.stop(0)


async def test_log_probabilities_of_a_long_prompt_come_in_parts(
    served: tuple[grpc.aio.Server, str],
) -> None:
    server, address = served
    entries = tuple(replace(ENTRY, token_id=index) for index in range(21_845))  # 65,535 values
    first = Chunk(text="a", num_tokens=1, token_ids=(1,), prompt_logprobs=entries, seed=3)
    fake = Fake([first, Chunk(token_index=1, finish_reason="stop")])
    add_inference_server(server, cast("InferenceServer", fake))
    await server.start()
    async with AsyncClient(address, timeout_s=60) as client:
        answer = await client.generate("x", prompt_logprobs=1)
    assert answer.prompt_logprobs == entries
    assert (answer.text, answer.seed, answer.num_attempts) == ("a", 3, 1)


async def test_an_answer_that_breaks_between_such_parts_is_not_begun_again(
    served: tuple[grpc.aio.Server, str],
) -> None:
    server, address = served
    fake = Fake([Chunk(prompt_logprobs=(ENTRY,), seed=3)], NoWorker("gone"))
    add_inference_server(server, cast("InferenceServer", fake))
    await server.start()
    async with AsyncClient(address, timeout_s=10, retry=RetryPolicy(max_backoff_s=0.01)) as client:
        with pytest.raises(NoWorker):
            await client.generate("x", prompt_logprobs=1)
    assert fake.num_calls == 1
