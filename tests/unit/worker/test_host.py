"""What a worker's process shows of its engine, and how it lets go of it."""

from __future__ import annotations

import asyncio
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest

from baton.core.cluster import WorkerRates
from baton.core.errors import InvalidRequest
from baton.core.hashing import KvLayout
from baton.engine.events import EngineStats
from baton.engine.worker import EngineWorker
from baton.rpc.runtime import Lifecycle
from baton.wire.clock import SystemClock
from baton.worker.host import EngineHost
from tests.support.eventually import eventually

LAYOUT = KvLayout.one_group(16, "float32", (4,), (64,))


class _Worker:
    """In place of an engine's thread."""

    def __init__(self) -> None:
        self.is_alive = True
        self.is_stopped = False
        self.engine = SimpleNamespace(
            fingerprint=SimpleNamespace(model="demo", layout=LAYOUT),
            num_kv_blocks=9,
            step_age_s=0.0,
            max_model_len_tokens=99,
            kv_counts=lambda: {"free": 9},
            drain_kv_events=list,
            stats=lambda: EngineStats(
                num_running=1,
                num_waiting=2,
                num_reserved=0,
                num_held=0,
                queued_prefill_tokens=3,
                prefill_tokens_per_s=4.0,
                decode_step_s=5.0,
                counters={"steps": 6},
            ),
        )

    async def stop(self) -> None:
        self.is_stopped = True


def _runtime(max_message_bytes: int = 4 << 20) -> Any:
    settings = SimpleNamespace(
        write_back_queue_blocks=1,
        max_num_seqs=7,
        max_message_bytes=max_message_bytes,
        engine_config=lambda: None,
    )
    return SimpleNamespace(
        settings=settings,
        members=SimpleNamespace(view=dict),
        channels=None,
        clock=SystemClock(),
        lifecycle=Lifecycle(),
        worker_id="w",
        report_progress=None,
    )


async def test_the_snapshot_holds_load_blocks_counters_and_every_rate() -> None:
    worker: Any = _Worker()
    host = EngineHost(_runtime(), worker, 1)
    snapshot = host.snapshot({"jobs": 8}, push_bytes_per_s=10.0)
    assert (snapshot.model, snapshot.num_running, snapshot.num_waiting) == ("demo", 1, 2)
    assert snapshot.kv_blocks == {"free": 9}
    wanted = {"steps": 6, "jobs": 8, "num_kv_blocks": 9}
    assert snapshot.max_model_len_tokens == 99
    assert snapshot.stats.items() >= wanted.items()
    assert {"stored_blocks", "dropped_blocks", "cache_failures"} <= snapshot.stats.keys()
    assert snapshot.rates == WorkerRates(4.0, 5.0, 3, 10.0, 7)
    assert all(getattr(snapshot.rates, field.name) for field in fields(WorkerRates))


async def test_stopping_ends_its_tasks_its_threads_and_the_engine() -> None:
    worker: Any = _Worker()
    host = EngineHost(_runtime(), worker, 1)
    swept = asyncio.Event()
    before = asyncio.all_tasks()
    host.keep_house(lambda _now: swept.set())
    await asyncio.wait_for(swept.wait(), 10)
    assert len(asyncio.all_tasks() - before) == 2
    await host.stop()
    assert asyncio.all_tasks() == before
    assert worker.is_stopped
    with pytest.raises(RuntimeError, match="shutdown"):
        host.copiers.submit(list)


async def test_a_model_whose_blocks_fit_in_no_message_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def start(*_: object) -> _Worker:
        return _Worker()

    monkeypatch.setattr(EngineWorker, "start", start)
    host = await EngineHost.load(_runtime(), num_copiers=1)
    await host.stop()
    with pytest.raises(InvalidRequest, match="max_message_bytes"):
        await EngineHost.load(_runtime(max_message_bytes=1024), num_copiers=1)


async def test_a_step_that_hangs_ends_the_process() -> None:
    worker: Any = _Worker()
    runtime, stops = _runtime(), []
    runtime.request_stop = lambda **how: stops.append(how)
    host = EngineHost(runtime, worker, 1)
    host.keep_house(lambda _now: None)
    try:
        await asyncio.sleep(0.2)
        assert not stops
        worker.engine.step_age_s = 1e6
        assert host.snapshot({}).stats["step_age_s"] == 1e6
        await eventually(lambda: stops == [{"exit_code": 1, "grace_s": 0.0}])
    finally:
        await host.stop()


def _raise(*_: object) -> None:
    raise ValueError


@pytest.mark.parametrize("task", ["housekeeping", "write back"])
async def test_a_background_task_that_fails_stops_the_process(
    task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker: Any = _Worker()
    runtime = _runtime()
    host = EngineHost(runtime, worker, 1)
    if task == "write back":
        monkeypatch.setattr(host.cache, "replica", _raise)
        host.write_back._queue.put_nowait([b"h"])
    host.keep_house(_raise if task == "housekeeping" else lambda _now: None)
    await asyncio.wait_for(runtime.lifecycle.stop_requested.wait(), 10)
    assert runtime.lifecycle.exit_code == 1
    await host.stop()
