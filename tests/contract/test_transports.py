"""Transports of a push: which one is used, what happens when it fails, and that it is fenced."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import xxhash

from baton.core.errors import KvChecksum, StaleEpoch
from baton.core.handoff.frames import Committed, Credit, KvChunk, Opening, Span
from baton.handoff.push_stream import PushStream
from baton.handoff.transports.nixl import NixlAgent
from baton.handoff.transports.registry import SenderTransports
from baton.v1 import decode_pb2, prefill_pb2
from baton.wire.channel import ChannelPool
from baton.wire.clock import SystemClock
from baton.wire.push import RpcPushCall
from tests.support.eventually import eventually
from tests.support.shared_memory import num_held
from tests.support.tiny_models import load_reference, reference_greedy
from tests.support.transports import NIXL
from tests.support.workers import Pair, worker_pair

PROMPT = [(index * 37 + 5) % 256 for index in range(100)]


@pytest.fixture
async def pair(model_path: Path) -> AsyncIterator[Pair]:
    async with worker_pair(model_path) as pair:
        yield pair
        await pair.assert_clean()
    assert num_held() == 0


def _count(pair: Pair, name: str, **labels: str) -> float:
    return (
        pair.prefill.runtime.metrics.registry.get_sample_value(f"baton_{name}_total", labels) or 0
    )


def _used(pair: Pair) -> set[str]:
    """Transports that carried anything."""
    names = ("nixl", "shm", "grpc")
    return {name for name in names if _count(pair, "handoff_sent_bytes", transport=name)}


async def _expect_reference(pair: Pair, model_path: Path, request_id: str = "req") -> None:
    out = await pair.generate(PROMPT, request_id)
    assert out.token_ids == list(reference_greedy(load_reference(model_path), PROMPT, 8))
    await pair.to_prefill.ReleasePrefill(
        prefill_pb2.ReleasePrefillRequest(request_id=request_id), timeout=5
    )


async def test_workers_of_one_machine_share_memory_by_themselves(
    pair: Pair, model_path: Path
) -> None:
    await _expect_reference(pair, model_path)
    assert _count(pair, "handoff_sent_bytes", transport="shm") > 0
    assert _count(pair, "handoff_sent_bytes", transport="grpc") == 0
    (span,) = (
        span for span in pair.prefill.spans.get_finished_spans() if span.name == "kv.transfer"
    )
    assert span.attributes is not None
    assert span.attributes["baton.kv.transport"] == "shm"


@pytest.mark.parametrize(
    ("prefill", "decode", "at"),
    [
        ({"kv_transports": "grpc"}, {}, None),
        ({}, {"kv_transports": "grpc"}, "declined"),
        ({}, {"transport_bytes": 4096}, "declined"),
    ],
)
async def test_without_shared_memory_kv_comes_with_the_frames(
    model_path: Path, prefill: dict[str, object], decode: dict[str, object], at: str | None
) -> None:
    async with worker_pair(model_path, prefill=prefill, decode=decode) as pair:
        await _expect_reference(pair, model_path)
        assert _used(pair) == {"grpc"}
        if at is not None:
            assert _count(pair, "handoff_fallbacks", transport="shm", at=at) == 1


async def test_memory_that_is_not_seen_here_is_not_asked_for_again(
    pair: Pair,
    model_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    real_open = os.open

    def other_namespace(path: str, *args: int) -> int:
        if str(path).startswith("/proc/"):
            raise FileNotFoundError(path)
        return real_open(path, *args)

    monkeypatch.setattr("baton.handoff.transports.shm.os.open", other_namespace)
    await _expect_reference(pair, model_path, "a")
    await _expect_reference(pair, model_path, "b")
    assert _count(pair, "handoff_fallbacks", transport="shm", at="open") == 1
    assert _used(pair) == {"grpc"}
    assert [record.msg for record in caplog.records].count("transport failed; falling back") == 1


async def test_after_a_damaged_push_the_next_attempt_goes_another_way(model_path: Path) -> None:
    async with worker_pair(model_path, prefill={"fault": "corrupt_chunk=0,times=1"}) as pair:
        grant = await pair.reserve(PROMPT)
        with pytest.raises(grpc.aio.AioRpcError, match="does not match its checksum"):
            await pair.run_prefill(pair.prefill_request(PROMPT, grant))
        out = await pair.generate(PROMPT, attempt=2)
        assert out.token_ids == list(reference_greedy(load_reference(model_path), PROMPT, 8))
        assert _count(pair, "handoff_fallbacks", transport="shm", at="transfer") == 1
        assert _count(pair, "handoff_sent_bytes", transport="grpc") > 0
    assert num_held() == 0


@pytest.mark.parametrize("transports", [NIXL])
async def test_kv_is_read_over_nixl(model_path: Path, transports: str) -> None:
    setting = {"kv_transports": transports}
    async with worker_pair(model_path, prefill=setting, decode=setting) as pair:
        for index in range(20):  # more than there are buffers and leases
            await _expect_reference(pair, model_path, f"req-{index}")
        assert _used(pair) == {"nixl"}


@pytest.mark.parametrize("transports", [NIXL])
async def test_memory_that_nixl_cannot_read_is_left_for_the_next_transport(
    model_path: Path, transports: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("unreachable")

    setting = {"kv_transports": transports.replace("grpc", "shm,grpc")}
    async with worker_pair(model_path, prefill=setting, decode=setting) as pair:
        monkeypatch.setattr("baton.handoff.transports.nixl.NixlAgent.read", unreachable)
        await _expect_reference(pair, model_path)
        assert _used(pair) == {"shm"}
        assert _count(pair, "handoff_fallbacks", transport="nixl", at="declined") == 1


@pytest.mark.parametrize("transports", [NIXL])
async def test_a_read_that_fails_in_mid_push_costs_one_attempt(
    model_path: Path, transports: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_read = NixlAgent.read

    def fail_on_chunks(self: NixlAgent, *args: Any, **kwargs: Any) -> memoryview:
        if args[3] > 16:  # not the token
            raise OSError("disconnected")
        return real_read(self, *args, **kwargs)

    setting = {"kv_transports": transports.replace("grpc", "shm,grpc")}
    async with worker_pair(model_path, prefill=setting, decode=setting) as pair:
        monkeypatch.setattr("baton.handoff.transports.nixl.NixlAgent.read", fail_on_chunks)
        grant = await pair.reserve(PROMPT)
        with pytest.raises(grpc.aio.AioRpcError, match="could not be read"):
            await pair.run_prefill(pair.prefill_request(PROMPT, grant))
        out = await pair.generate(PROMPT, attempt=2)
        assert out.token_ids == list(reference_greedy(load_reference(model_path), PROMPT, 8))
        assert _used(pair) == {"shm"}
        assert _count(pair, "handoff_fallbacks", transport="nixl", at="transfer") == 1


async def test_without_nixl_workers_start_and_use_the_next_transport(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.handoff.transports.nixl._MODULES", ("no_such_library",))
    setting = {"kv_transports": "nixl,shm,grpc"}
    async with worker_pair(model_path, prefill=setting, decode=setting) as pair:
        await _expect_reference(pair, model_path)
        assert _used(pair) == {"shm"}
        assert _count(pair, "handoff_fallbacks", transport="nixl", at="start") == 1


class _Writer:
    """A sender of one's own, with slots, which keeps to no rule."""

    def __init__(self, pair: Pair) -> None:
        self.channels = ChannelPool(max_message_bytes=4 << 20)
        transports = SenderTransports(
            ("shm", "grpc"), clock=SystemClock(), on_fallback=lambda *_: None
        )
        address = pair.decode.address
        self.call = PushStream(RpcPushCall(self.channels, address, 20), address, transports)
        self.fingerprint = pair.decode.engine.fingerprint
        self.worker_id = "me"
        self.span = Span(0, self.fingerprint.layout.num_layers, 0, 1)

    async def open(self, grant: decode_pb2.ReserveResponse) -> None:
        names = grant.reservation_id, "req", 1, grant.epoch
        opening = Opening(*names, self.fingerprint, self.worker_id)
        await self.call.open(opening)
        credit = await self.call.read()
        assert credit == Credit(4), "no more than there are slots, whatever the setting allows"
        assert self.call.transport == "shm"

    def fill(self, content: bytes) -> memoryview:
        num_bytes = self.span.num_bytes(self.fingerprint.layout)
        room = self.call.room(0, num_bytes)
        room[:] = content * num_bytes
        return room

    async def send(self, epoch: int, room: memoryview) -> None:
        checksum = xxhash.xxh3_64_intdigest(room)
        await self.call.chunk(KvChunk(epoch, 0, self.span, checksum), room)

    async def close(self) -> None:
        self.call.cancel()
        await self.channels.close()


async def test_what_was_verified_does_not_change_when_the_sender_writes_late(pair: Pair) -> None:
    grant = await pair.reserve(PROMPT)
    writer = _Writer(pair)
    await writer.open(grant)
    room = writer.fill(b"\x01")
    await writer.send(grant.epoch, room)
    assert isinstance(await writer.call.read(), Credit)
    room[:] = b"\x02" * len(room)
    blocks = pair.decode.engine.transfer.read_blocks("req/1", Span(0, writer.span.layer_end, 0, 1))
    assert bytes(blocks) == b"\x01" * len(blocks)
    await writer.close()


async def test_what_changes_before_it_is_taken_is_refused(pair: Pair) -> None:
    grant = await pair.reserve(PROMPT)
    writer = _Writer(pair)
    await writer.open(grant)
    room = writer.fill(b"\x01")
    checksum = xxhash.xxh3_64_intdigest(room)
    room[7] = 9
    await writer.call.chunk(KvChunk(grant.epoch, 0, writer.span, checksum), room)
    with pytest.raises(KvChecksum):
        await writer.call.read()
    await writer.close()


async def test_a_stale_epoch_is_refused_whatever_lies_in_the_slot(pair: Pair) -> None:
    grant = await pair.reserve(PROMPT)
    writer = _Writer(pair)
    await writer.open(grant)
    await writer.send(grant.epoch + 1, writer.fill(b"\x01"))
    with pytest.raises(StaleEpoch):
        await writer.call.read()
    await writer.close()


async def test_memory_is_used_again_after_a_commit_only(pair: Pair, model_path: Path) -> None:
    await _expect_reference(pair, model_path, "a")
    held = num_held()
    assert held > 0
    await _expect_reference(pair, model_path, "b")
    assert num_held() == held
    writer = _Writer(pair)
    writer.worker_id = pair.prefill.runtime.worker_id
    grant = await pair.reserve(PROMPT)
    await writer.open(grant)  # in the memory that was idle
    writer.call.cancel()
    await eventually(lambda: pair.decode.is_clean() and 0 < num_held() < held)
    await writer.close()


async def test_a_sender_that_was_cut_off_writes_where_nobody_reads(
    pair: Pair, model_path: Path
) -> None:
    grant = await pair.reserve(PROMPT)
    writer = _Writer(pair)
    await writer.open(grant)
    room = writer.fill(b"\x01")
    await writer.send(grant.epoch, room)
    assert not isinstance(await writer.call.read(), Committed)
    held_by_both = num_held()
    await pair.to_decode.Release(decode_pb2.ReleaseRequest(request_id="req"), timeout=5)
    await eventually(lambda: 0 < num_held() < held_by_both)
    room[:] = b"\x02" * len(room)
    out = await pair.generate(PROMPT, attempt=2)
    assert out.token_ids == list(reference_greedy(load_reference(model_path), PROMPT, 8))
    assert set(room) == {2}
    await writer.close()
