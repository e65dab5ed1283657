"""POST /v1/embeddings as OpenAI's client sees it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import openai
import pytest
import pytest_asyncio

from baton.core.errors import PromptTooLong
from baton.v1 import common_pb2
from tests.support.eventually import eventually
from tests.support.gateway_rig import Edge, running_gateway


@pytest_asyncio.fixture
async def edge() -> AsyncIterator[Edge]:
    async with running_gateway() as running:
        yield running


async def test_openais_client_asks_for_base64_and_gets_floats_in_order(edge):
    answer = await edge.client.embeddings.create(
        model="demo", input=["ab", "abcd"], dimensions=3, extra_body={"pooling": "mean"}
    )
    assert [entry.embedding for entry in answer.data] == [[2.0, 0.0, 0.5], [4.0, 1.0, 0.5]]
    assert [entry.index for entry in answer.data] == [0, 1]
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (6, 6)
    assert (answer.model, answer.object) == ("demo", "list")
    [request] = edge.fake.requests
    assert request.pooling == common_pb2.POOLING_MEAN
    assert (request.dimensions, request.unscaled) == (3, False)


@pytest.mark.parametrize(
    ("given", "sizes"),
    [("abc", [3]), (["a", "bc"], [1, 2]), ([7, 8, 9], [3]), ([[7, 8], [9]], [2, 1])],
)
async def test_all_forms_of_input_and_plain_floats(edge, given, sizes):
    answer = await edge.client.embeddings.create(
        model="demo", input=given, encoding_format="float", extra_body={"normalize": False}
    )
    assert [entry.embedding[0] for entry in answer.data] == sizes
    [request] = edge.fake.requests
    assert request.unscaled


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"input": []}, "input must not be empty"),
        ({"input": ["a", ""]}, "input must not be empty"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": ["a"] * 2049}, "at most 2048"),
        ({"model": "demo"}, "input"),
        ({"input": [-1]}, "does not fit"),
    ],
)
async def test_bad_bodies_name_what_is_wrong(edge, body, message):
    response = await edge.raw.post("/v1/embeddings", json=body)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
    assert not edge.fake.requests


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("form", ["float", "base64"])
async def test_a_vector_that_is_not_finite_is_a_servers_error(edge, form, bad):
    edge.fake.embedding_tail = bad
    body = {"input": ["ab", "c"], "encoding_format": form}
    response = await edge.raw.post("/v1/embeddings", json=body)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal"


async def test_errors_have_openais_classes(edge):
    edge.fake.before.append(PromptTooLong("600 tokens"))
    with pytest.raises(openai.BadRequestError) as caught:
        await edge.client.embeddings.create(model="demo", input="a")
    assert caught.value.code == "context_length_exceeded"


async def test_a_client_that_goes_away_takes_its_call_along(edge):
    edge.fake.hold = asyncio.Event()
    task = asyncio.create_task(edge.raw.post("/v1/embeddings", json={"input": "a"}))
    await eventually(lambda: edge.fake.num_running == 1)
    task.cancel()
    await eventually(lambda: edge.fake.num_cancelled == 1)
    await eventually(lambda: edge.gateway.num_running == 0)


async def test_embeddings_have_the_deadline_and_the_bound_of_generations():
    async with running_gateway(request_timeout_s=3, max_concurrent_requests=1) as edge:
        edge.fake.hold = asyncio.Event()
        task = asyncio.create_task(edge.raw.post("/v1/embeddings", json={"input": "a"}))
        await eventually(lambda: edge.fake.num_running == 1)
        assert (await edge.raw.post("/v1/embeddings", json={"input": "a"})).status_code == 429
        edge.fake.hold.set()
        assert (await task).status_code == 200
        [left_s] = edge.fake.remaining_s
        assert left_s is not None
        assert left_s < 4  # gRPC rounds up


async def test_tenants_do_not_share_kv():
    async with running_gateway(api_keys="key-of-acme=acme") as edge:
        headers = {"authorization": "Bearer key-of-acme"}
        body = {"input": "a", "cache_salt": "s"}
        assert (await edge.raw.post("/v1/embeddings", json=body)).status_code == 401
        await edge.raw.post("/v1/embeddings", json=body, headers=headers)
        [request] = edge.fake.requests
        assert request.cache_salt == "acme:s"
