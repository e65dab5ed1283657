from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from baton.client import AsyncClient
from tests.support.fake_inference import FAST, FakeInference, serve


@pytest_asyncio.fixture
async def fake() -> AsyncIterator[FakeInference]:
    servicer = FakeInference()
    servicer.server, servicer.address = await serve(servicer)
    yield servicer
    await servicer.server.stop(0)


@pytest_asyncio.fixture
async def client(fake) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(fake.address, timeout_s=10, retry=FAST) as client:
        yield client
