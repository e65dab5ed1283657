"""Bad input ends in a typed error that says what to change; the workers keep serving."""

from __future__ import annotations

import grpc
import pytest

from baton.client import BatonError, InvalidRequest, ModelNotFound, PromptTooLong
from baton.v1.inference_pb2 import GenerateRequest
from baton.v1.inference_pb2_grpc import InferenceServiceStub
from tests.support.system import System, collect

pytestmark = [pytest.mark.timeout(120), pytest.mark.asyncio(loop_scope="module")]


async def still_serves(system: System) -> None:
    assert len(await system.greedy([9, 10, 11], 4)) == 4
    await system.assert_nothing_held()


@pytest.mark.parametrize(
    ("request_fields", "error", "words"),
    [
        ({"token_ids": []}, InvalidRequest, "prompt"),
        ({"prompt": ""}, InvalidRequest, "prompt"),
        ({"token_ids": [9] * 100_000}, PromptTooLong, "100000|100,000"),
        ({"token_ids": [9], "max_tokens": 10_000_000}, PromptTooLong, "max_tokens"),
        ({"token_ids": [9], "model": "nope"}, ModelNotFound, "llama"),
        ({"token_ids": [9], "temperature": -0.5}, InvalidRequest, "temperature"),
        ({"token_ids": [9], "temperature": float("nan")}, InvalidRequest, "temperature"),
        ({"token_ids": [9], "top_p": 0.0}, InvalidRequest, "top_p"),
        ({"token_ids": [9], "max_tokens": 0}, InvalidRequest, "max_tokens"),
        ({"token_ids": [4_000_000]}, InvalidRequest, "vocabulary|token"),
        ({"token_ids": [9], "stop": [""]}, InvalidRequest, "stop"),
        ({"token_ids": [9], "logit_bias": {4_000_000: 1.0}}, InvalidRequest, "logit_bias"),
        ({"token_ids": [9], "request_id": "two words"}, InvalidRequest, "request_id"),
    ],
    ids=lambda value: next(reversed(value)) if isinstance(value, dict) else None,
)
async def test_bad_field_is_a_typed_error(
    system: System, request_fields: dict[str, object], error: type[BatonError], words: str
) -> None:
    with pytest.raises(error, match=f"(?i){words}"):
        await collect(system.client.generate(**request_fields, stream=True))
    await still_serves(system)


async def test_a_hundred_megabyte_message_is_refused_and_harms_nobody(system: System) -> None:
    address = next(p.address for p in system.processes if p.role == "scheduler")
    options = [("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        call = InferenceServiceStub(channel).Generate(
            GenerateRequest(text="x" * (100 << 20)), timeout=20
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await still_serves(system)


async def test_an_empty_request_names_what_is_missing(system: System) -> None:
    address = next(p.address for p in system.processes if p.role == "scheduler")
    async with grpc.aio.insecure_channel(address) as channel:
        call = InferenceServiceStub(channel).Generate(GenerateRequest(), timeout=5)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "prompt" in (caught.value.details() or "")
