"""Hand-offs that are broken, stale, malformed or refused: a typed error on both sides, no leak."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from baton.core.errors import ErrorReason, KvLayoutMismatch
from baton.core.handoff.frames import ChunkFrame, KvChunk, Opening, Span
from baton.v1 import decode_pb2, kv_transfer_pb2, prefill_pb2
from baton.wire.channel import ChannelPool
from baton.wire.push import RpcPushCall
from tests.support.eventually import eventually
from tests.support.tiny_models import make_tiny_model
from tests.support.transports import TRANSPORTS
from tests.support.workers import Pair, prompt_of, refused, worker_pair


@pytest.mark.parametrize("transports", TRANSPORTS)
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("corrupt_chunk=0", ErrorReason.KV_CHECKSUM),
        ("drop_chunk=0", ErrorReason.KV_CHECKSUM),
        ("duplicate_chunk=0", ErrorReason.KV_CHECKSUM),
        ("reorder_chunk=0", ErrorReason.KV_CHECKSUM),
        ("silent_s=3", ErrorReason.STALLED),
        ("drop_manifest", ErrorReason.KV_TRANSFER_LOST),
        ("wrong_epoch", ErrorReason.STALE_EPOCH),
        ("stall_after_chunk=0", ErrorReason.STALLED),
    ],
)
async def test_a_broken_push_fails_both_calls_and_leaks_nothing(
    model_path: Path, fault: str, reason: ErrorReason, transports: str
) -> None:
    prompt = prompt_of(150)
    async with worker_pair(
        model_path,
        prefill={
            "fault": f"{fault},times=1",
            "progress_timeout_s": 5.0,
            "kv_transports": transports,
        },
        decode={
            # NIXL takes a while to connect two workers.
            "progress_timeout_s": 2.0 if "nixl" in transports else 0.5,
            "kv_transports": transports,
        },
    ) as pair:
        grant = await pair.reserve(prompt)
        decoding = asyncio.create_task(refused(reason, pair.run_decode(grant)))
        await refused(reason, pair.run_prefill(pair.prefill_request(prompt, grant)))
        assert await decoding
        await eventually(pair.prefill.is_clean)
        await eventually(pair.decode.is_clean)
        # The next attempt is not harmed.
        out = await pair.generate(prompt, attempt=2)
        assert len(out.token_ids) == 8
        await pair.assert_clean()


async def test_a_push_with_a_stale_epoch_is_refused(pair: Pair) -> None:
    prompt = prompt_of(30)
    grant = await pair.reserve(prompt)
    stale = pair.prefill_request(prompt, grant)
    stale.target.epoch += 1
    await refused(ErrorReason.STALE_EPOCH, pair.run_prefill(stale))
    out = await pair.run_prefill(pair.prefill_request(prompt, grant))
    assert (await pair.run_decode(grant, out)).finish_reason == 2


async def test_a_push_after_release_is_refused(pair: Pair) -> None:
    prompt = prompt_of(30)
    grant = await pair.reserve(prompt)
    request = decode_pb2.ReleaseRequest(request_id="req", reason="cancelled")
    assert (await pair.to_decode.Release(request, timeout=5)).released_blocks > 0
    assert (await pair.to_decode.Release(request, timeout=5)).released_blocks == 0
    await refused(ErrorReason.STALE_EPOCH, pair.run_prefill(pair.prefill_request(prompt, grant)))
    assert "cancelled" in await refused(ErrorReason.CANCELLED, pair.run_decode(grant))


async def test_a_push_to_a_worker_that_was_restarted_is_a_lost_transfer(pair: Pair) -> None:
    grant = decode_pb2.ReserveResponse(
        reservation_id="res-of-the-last-boot", epoch=1, push_address=pair.decode.address
    )
    message = await refused(
        ErrorReason.KV_TRANSFER_LOST, pair.run_prefill(pair.prefill_request(prompt_of(30), grant))
    )
    assert "res-of-the-last-boot is not known" in message
    await refused(ErrorReason.REQUEST_NOT_FOUND, pair.run_decode(grant))


async def test_workers_with_different_models_say_how_they_differ(
    model_path: Path, tmp_path: Path
) -> None:
    other = make_tiny_model("llama", tmp_path / "tiny", seed=5)
    prompt = prompt_of(30)
    async with (
        worker_pair(model_path) as pair,
        worker_pair(other, decode={"num_blocks": 8}) as others,
    ):
        grant = await pair.reserve(prompt)
        message = await refused(
            ErrorReason.KV_LAYOUT_MISMATCH,
            others.run_prefill(others.prefill_request(prompt, grant)),
        )
        assert "weights: " in message
        assert "config" not in message
        await eventually(others.prefill.is_clean)
        # Nothing was written: the reservation is still good for the right sender.
        out = await pair.run_prefill(pair.prefill_request(prompt, grant))
        assert (await pair.run_decode(grant, out)).finish_reason == 2
        await pair.assert_clean()


async def test_a_dead_decode_worker_is_a_lost_transfer(pair: Pair) -> None:
    prompt = prompt_of(40)
    grant = await pair.reserve(prompt)
    nowhere = pair.prefill_request(prompt, grant)
    nowhere.target.address = "127.0.0.1:1"
    await refused(ErrorReason.KV_TRANSFER_LOST, pair.run_prefill(nowhere))
    await pair.to_decode.Release(decode_pb2.ReleaseRequest(request_id="req"), timeout=5)


async def test_decode_says_no_when_it_is_full(model_path: Path) -> None:
    async with worker_pair(model_path, decode={"num_blocks": 10}) as pair:
        await pair.reserve(prompt_of(80), "a", max_tokens=4)
        await refused(ErrorReason.KV_CACHE_FULL, pair.reserve(prompt_of(80, 2), "b", max_tokens=4))
        await pair.to_decode.Release(decode_pb2.ReleaseRequest(request_id="a"), timeout=5)
        await pair.reserve(prompt_of(80, 2), "b", max_tokens=4)
        await pair.to_decode.Release(decode_pb2.ReleaseRequest(request_id="b"), timeout=5)
        await eventually(pair.decode.is_clean)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"token_ids": []}, ErrorReason.INVALID_REQUEST),
        ({"token_ids": [99_999]}, ErrorReason.INVALID_REQUEST),
        ({"token_ids": [1] * 5000}, ErrorReason.PROMPT_TOO_LONG),
        ({"attempt": 0}, ErrorReason.INVALID_REQUEST),
        ({"request_id": "a b"}, ErrorReason.INVALID_REQUEST),
        ({"cache_salt": "x" * 300}, ErrorReason.INVALID_REQUEST),
        ({"sampling": {"temperature": -1.0, "seed": 1}}, ErrorReason.INVALID_REQUEST),
        ({"sampling": {"temperature": 1.0}}, ErrorReason.INVALID_REQUEST),
    ],
)
async def test_bad_requests_are_refused_by_both(
    pair: Pair, changes: dict[str, object], reason: ErrorReason
) -> None:
    good = {"request_id": "req", "attempt": 1, "token_ids": [1, 2], "sampling": {"seed": 1}}
    request = {**good, **changes}
    await refused(reason, pair.to_decode.Reserve(decode_pb2.ReserveRequest(**request), timeout=5))
    prefill = prefill_pb2.PrefillRequest(**request)
    await refused(reason, pair.run_prefill(prefill))


async def test_garbage_on_the_push_stream_is_refused(pair: Pair) -> None:
    channels = ChannelPool(max_message_bytes=4 << 20)
    call = channels.get(pair.decode.address).stream_stream(
        "/baton.v1.KvTransferService/Push",
        request_serializer=None,
        response_deserializer=kv_transfer_pb2.PushResponse.FromString,
    )(timeout=5)
    await call.write(b"\xff\xff\xff")
    answer = await call.read()
    assert answer.failed.reason == ErrorReason.INVALID_REQUEST.value
    assert "malformed frame" in answer.failed.message
    await refused(ErrorReason.INVALID_REQUEST, call.read())
    await channels.close()


async def test_a_push_cannot_write_outside_of_its_reservation(pair: Pair) -> None:
    prompt = prompt_of(40)
    grant = await pair.reserve(prompt)
    channels = ChannelPool(max_message_bytes=4 << 20)
    call = RpcPushCall(channels, grant.push_address, timeout_s=10)
    fingerprint = pair.prefill.engine.fingerprint
    await call.write(Opening(grant.reservation_id, "req", 1, grant.epoch, fingerprint, "me"))
    await call.read()
    span = Span(0, fingerprint.layout.num_layers, 3, 1)
    payload = bytes(span.num_bytes(fingerprint.layout))
    await call.write(ChunkFrame(KvChunk(grant.epoch, 0, span, 0), memoryview(payload)))
    with pytest.raises(KvLayoutMismatch, match=r"blocks \[3, 4\) are outside"):
        await call.read()
    call.cancel()
    await channels.close()
