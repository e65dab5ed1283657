"""What comes at a push's worst moment."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import xxhash

from baton.core.errors import ErrorReason, StaleEpoch
from baton.core.handoff.frames import ChunkFrame, Credit, KvChunk, Opening, Span
from baton.handoff.receiver import _end
from baton.v1 import decode_pb2
from baton.wire.channel import ChannelPool
from baton.wire.errors import error_from_rpc
from baton.wire.push import RpcPushCall
from tests.support.eventually import eventually
from tests.support.tiny_models import make_tiny_model
from tests.support.workers import worker_pair

if TYPE_CHECKING:
    from collections.abc import Awaitable
    from pathlib import Path


async def _reason(call: Awaitable[object]) -> ErrorReason:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return error_from_rpc(caught.value).reason


async def test_a_release_during_a_write_ends_the_push_when_the_write_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only when the sender, who may be computing for long, says something again."""
    model_path = make_tiny_model("llama", tmp_path / "tiny")
    async with worker_pair(model_path, decode={"progress_timeout_s": 3600.0}) as pair:
        grant = await pair.reserve([9] * 40)
        engine = pair.decode.engine
        is_writing, may_end = threading.Event(), threading.Event()
        write = engine.transfer.write_blocks

        def slow_write(*arguments: Any) -> None:
            write(*arguments)
            is_writing.set()
            may_end.wait(30)

        monkeypatch.setattr(engine.transfer, "write_blocks", slow_write)
        channels = ChannelPool(max_message_bytes=4 << 20)
        call = RpcPushCall(channels, grant.push_address, timeout_s=20)
        fingerprint = engine.fingerprint
        await call.write(Opening(grant.reservation_id, "req", 1, grant.epoch, fingerprint, "me"))
        assert isinstance(await call.read(), Credit)
        span = Span(0, fingerprint.layout.num_layers, 0, 1)
        payload = bytes(span.num_bytes(fingerprint.layout))
        checksum = xxhash.xxh3_64_intdigest(payload)
        await call.write(ChunkFrame(KvChunk(grant.epoch, 0, span, checksum), memoryview(payload)))
        await eventually(is_writing.is_set)

        released = await pair.to_decode.Release(
            decode_pb2.ReleaseRequest(request_id="req"), timeout=5
        )
        assert released.released_blocks > 0
        assert pair.decode.counts()["quarantined"] == grant.num_blocks
        may_end.set()
        assert isinstance(await call.read(), Credit)
        with pytest.raises(StaleEpoch, match="the reservation ended"):
            await call.read()
        await eventually(pair.decode.is_clean)
        call.cancel()
        await channels.close()


async def test_whoever_notices_first_that_a_push_is_silent_the_sender_is_told_so(
    tmp_path: Path,
) -> None:
    """The reader of the tokens waits for the push as well; its end is not the reason."""
    model_path = make_tiny_model("llama", tmp_path / "tiny")
    async with worker_pair(
        model_path,
        prefill={"fault": "silent_s=3", "progress_timeout_s": 10.0},
        decode={"progress_timeout_s": 0.3},
    ) as pair:
        sessions = pair.decode.service.loaded().sessions
        pair.decode.service.loaded().intake._progress_timeout_s = 3600.0  # the reader notices
        grant = await pair.reserve([9] * 40)
        reading = asyncio.create_task(_reason(pair.run_decode(grant)))
        prefilling = asyncio.create_task(
            _reason(pair.run_prefill(pair.prefill_request([9] * 40, grant)))
        )
        assert await reading is ErrorReason.STALLED
        assert await prefilling is ErrorReason.STALLED
        assert len(sessions) == 0
        await eventually(pair.decode.is_clean)
        await eventually(pair.prefill.is_clean)


async def test_a_release_in_the_moment_in_which_a_frame_is_late_is_no_error() -> None:
    async def wait_for_a_frame() -> None:
        async with asyncio.timeout(0.0) as limit:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                _end(limit)  # as a session's release does
                raise

    with pytest.raises(TimeoutError):
        await wait_for_a_frame()
