from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.support.system import System
from tests.support.tiny_models import make_tiny_model


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    """A prefill and a decode worker with a tiny model; a file that needs others has its own."""
    path = make_tiny_model("llama", tmp_path_factory.mktemp("models") / "llama")
    async with System(tmp_path_factory.mktemp("system"), {"llama": path}) as running:
        await running.workers("llama")
        yield running
