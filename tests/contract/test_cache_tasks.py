"""A cache service whose background work fails stops; it does not go on without it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import NoReturn

import pytest

from baton.cache import service as cache_service
from baton.cache.disk_tier import DiskTier
from baton.cache.pins import Pins
from baton.cache.service import CacheService
from baton.cache.settings import CacheSettings
from tests.support.workers import hosted


async def _fail(_: object) -> NoReturn:
    raise ValueError


def _raise(_: object) -> NoReturn:
    raise ValueError


@pytest.mark.parametrize("task", ["write to disk", "end pins"])
async def test_a_background_task_that_fails_stops_the_process(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if task == "write to disk":
        monkeypatch.setattr(DiskTier, "run", _fail)
    else:
        monkeypatch.setattr(Pins, "expire", _raise)
        monkeypatch.setattr(cache_service, "_PIN_CHECK_S", 0.01)
    settings = CacheSettings(nats_url="", disk_path=tmp_path, disk_bytes=1 << 20)
    async with hosted(settings, CacheService) as cache:
        lifecycle = cache.runtime.lifecycle
        await asyncio.wait_for(lifecycle.stop_requested.wait(), 10)
        assert lifecycle.exit_code == 1
