"""What a push leaves behind when it ends early, with stand-ins for engine and stream."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest

from baton.core.errors import InvalidRequest
from baton.core.handoff.frames import Credit
from baton.core.hashing import Fingerprint, KvLayout
from baton.core.sampling import SamplingParams
from baton.core.sequence import SequenceSpec
from baton.handoff.sender import PushSender, SenderParts
from baton.wire.clock import SystemClock
from baton.wire.prefill import PushTarget
from tests.support.eventually import eventually

LAYOUT = KvLayout.one_group(4, "float32", (1, 1), (2, 2))
SPEC = SequenceSpec("a/1", tuple(range(8)), SamplingParams(seed=1), max_tokens=1)


class _Engine:
    """Its reads last until they may end."""

    def __init__(self) -> None:
        self.fingerprint = Fingerprint("demo", "c", "w", "t", LAYOUT)
        self.is_reading = threading.Event()
        self.may_end = threading.Event()

    def read(self, *_: object) -> None:
        self.is_reading.set()
        assert self.may_end.wait(20)


def _call(num_credits: int = 4) -> Any:
    answers: asyncio.Queue[Credit] = asyncio.Queue()
    answers.put_nowait(Credit(num_credits))
    call = mock.AsyncMock(max_chunk_bytes=1 << 20, transport="nixl", read=answers.get)
    call.answers = answers
    call.room = mock.Mock(side_effect=lambda _, num_bytes: memoryview(bytearray(num_bytes)))
    call.cancel = mock.Mock()
    return call


def _push(
    engine: _Engine, call: Any, readers: ThreadPoolExecutor, num_cached_blocks: int = 0
) -> PushSender:
    push = PushSender(
        SenderParts(engine, readers, SystemClock(), progress_timeout_s=20.0),  # type: ignore[arg-type]
        SPEC,
        PushTarget("d", "d:1", "res", 1, num_cached_blocks),
        lambda: call,
    )
    push.ready(2)
    return push


async def test_a_cancelled_push_keeps_its_room_while_kv_is_read_into_it() -> None:
    engine, call = _Engine(), _call()
    with ThreadPoolExecutor(1) as readers:
        running = asyncio.create_task(_push(engine, call, readers).run("a", 1, "p"))
        await eventually(engine.is_reading.is_set)
        running.cancel()
        await asyncio.wait({running}, timeout=0.05)
        call.cancel.assert_not_called()
        engine.may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await running
        call.cancel.assert_called_once_with()


async def test_no_chunk_is_read_or_sent_without_credit() -> None:
    engine, call = _Engine(), _call(num_credits=1)
    call.max_chunk_bytes = 1
    engine.may_end.set()
    with ThreadPoolExecutor(1) as readers:
        running = asyncio.create_task(_push(engine, call, readers).run("a", 1, "p"))
        for num_sent in (1, 2, 3):
            await eventually(lambda num_sent=num_sent: call.chunk.await_count == num_sent)
            await asyncio.wait({running}, timeout=0.05)
            assert call.chunk.await_count == call.room.call_count == num_sent
            call.answers.put_nowait(Credit(1))
        running.cancel()
        await asyncio.wait({running})


async def test_a_target_cannot_have_more_blocks_than_the_prompt() -> None:
    with ThreadPoolExecutor(1) as readers:
        _push(_Engine(), _call(), readers, num_cached_blocks=2)
        with pytest.raises(InvalidRequest, match="3, and the prompt has 2 blocks"):
            _push(_Engine(), _call(), readers, num_cached_blocks=3)
