from __future__ import annotations

import asyncio

import pytest

from baton.client import AsyncClient, Client, InvalidRequest, NoWorker
from baton.core.errors import Internal
from baton.v1 import common_pb2
from tests.support.fake_inference import FAST, FakeInference, serve


async def test_vectors_come_in_the_order_of_the_inputs(fake, client):
    fake.before.append(NoWorker("starting"))
    answer = await client.embed(["ab", "c"], pooling="mean", dimensions=2, scaled=False)
    assert answer.vectors == ((2.0, 0.0, 0.5), (1.0, 1.0, 0.5))
    assert (answer.usage.prompt_tokens, answer.model) == (3, "demo")
    request = fake.requests[-1]
    assert (request.pooling, request.dimensions, request.unscaled) == (
        common_pb2.POOLING_MEAN,
        2,
        True,
    )


@pytest.mark.parametrize(
    ("inputs", "sizes"), [("abc", [3]), ([5, 6], [2]), ([[5, 6], [7]], [2, 1]), (("a",), [1])]
)
async def test_all_forms_of_input(client, inputs, sizes):
    assert [vector[0] for vector in (await client.embed(inputs)).vectors] == sizes


async def test_the_blocking_client_does_the_same(fake):
    def use() -> list[float]:
        with Client(fake.address, timeout_s=10, retry=FAST) as client:
            return [vector[0] for vector in client.embed(["ab", "c"]).vectors]

    fake.before.append(NoWorker("starting"))
    assert await asyncio.to_thread(use) == [2.0, 1.0]


@pytest.mark.parametrize(
    ("inputs", "options"), [([], {}), ("a", {"pooling": "max"}), ([-1], {}), ([["a"]], {})]
)
async def test_mistakes_show_before_the_call(fake, client, inputs, options):
    with pytest.raises(InvalidRequest):
        await client.embed(inputs, **options)
    assert not fake.requests


async def test_a_vector_left_out_is_an_error(fake, client):
    class Forgetful(FakeInference):
        async def Embed(self, request, context):
            for answer in ():
                yield answer

    server, address = await serve(Forgetful())
    async with AsyncClient(address, timeout_s=10) as client:
        with pytest.raises(Internal, match="without a vector"):
            await client.embed("a")
    await server.stop(0)
