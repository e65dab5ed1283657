"""The way between two workers, measured: bytes arrive, and only known workers are sent any."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import grpc
import pytest

from baton.core.cluster import Announcement, ServiceState, ServiceStatus
from baton.core.errors import ErrorReason
from baton.v1 import prefill_pb2
from baton.wire.errors import error_from_rpc
from baton.wire.prefill import PathMeasurement as Measured
from tests.support.tiny_models import make_tiny_model
from tests.support.workers import Pair, worker_pair

if TYPE_CHECKING:
    from pathlib import Path

NUM_BYTES = (3 << 20) + 17


async def _measure(pair: Pair, worker_id: str, num_bytes: int) -> prefill_pb2.MeasurePathResponse:
    request = prefill_pb2.MeasurePathRequest(decode_worker_id=worker_id, num_bytes=num_bytes)
    return await pair.to_prefill.MeasurePath(request, timeout=20)


async def test_the_way_to_a_decode_worker_is_measured(tmp_path: Path) -> None:
    async with worker_pair(make_tiny_model("llama", tmp_path / "tiny")) as pair:
        view = pair.prefill.runtime.members
        for worker_id, role, address in (
            ("decode-test", "decode", pair.decode.address),
            ("decode-gone", "decode", "127.0.0.1:1"),
            ("cache-test", "cache", pair.decode.address),
        ):
            status = ServiceStatus(worker_id, role, address, state=ServiceState.READY)
            view._view = view.view().announced(Announcement(status, 3600.0), time.monotonic())
        answer = await _measure(pair, "decode-test", NUM_BYTES)
        assert answer.num_bytes == NUM_BYTES
        assert answer.transfer.ToNanoseconds() > 0
        assert answer.round_trip.ToNanoseconds() > 0
        for worker_id, num_bytes, reason in (
            ("decode-gone", 1, ErrorReason.NO_WORKER),
            ("cache-test", 1, ErrorReason.REQUEST_NOT_FOUND),
            ("nobody", 1, ErrorReason.REQUEST_NOT_FOUND),
            ("decode-test", 0, ErrorReason.INVALID_REQUEST),
            ("decode-test", 1 << 40, ErrorReason.INVALID_REQUEST),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await _measure(pair, worker_id, num_bytes)
            assert error_from_rpc(caught.value).reason is reason
        assert pair.prefill.is_clean()
        assert pair.decode.is_clean()


async def test_one_path_is_measured_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with worker_pair(make_tiny_model("llama", tmp_path / "tiny")) as pair:
        is_measuring, may_end = asyncio.Event(), asyncio.Event()

        async def measure(_worker_id: str, num_bytes: int) -> Measured:
            is_measuring.set()
            await may_end.wait()
            return Measured(num_bytes, 1.0, 1.0)

        monkeypatch.setattr(pair.prefill.service, "_measure", measure)
        first = asyncio.create_task(_measure(pair, "a", 1))
        await asyncio.wait_for(is_measuring.wait(), 20)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _measure(pair, "b", 1)
        assert error_from_rpc(caught.value).reason is ErrorReason.QUEUE_FULL
        may_end.set()
        assert (await first).num_bytes == 1
        assert (await _measure(pair, "b", 2)).num_bytes == 2
