from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.tiny_models import make_tiny_model
from tests.support.workers import Pair, worker_pair


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
async def pair(model_path: Path) -> AsyncIterator[Pair]:
    async with worker_pair(model_path) as pair:
        yield pair
        await pair.assert_clean()
