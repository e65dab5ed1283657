from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from baton.cache.service import CacheService
from baton.cache.settings import CacheSettings
from baton.core.errors import ErrorReason, KvLayoutMismatch
from baton.core.handoff import Chunk, KvEncoding, Opening, Span
from baton.prefill.peers import PushCall
from baton.rpc.channel import ChannelPool
from baton.rpc.convert import fingerprint_to_pb
from baton.rpc.errors import error_from_rpc
from baton.rpc.frames import encode_frame
from baton.v1 import decode_pb2, kv_transfer_pb2, prefill_pb2
from tests.support.eventually import eventually
from tests.support.tiny_models import load_reference, make_tiny_model, reference_greedy
from tests.support.transports import TRANSPORTS
from tests.support.workers import Generated, Pair, hosted, worker_pair


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
async def pair(model_path: Path) -> AsyncIterator[Pair]:
    async with worker_pair(model_path) as pair:
        yield pair
        await _assert_clean(pair)


async def _assert_clean(pair: Pair) -> None:
    await pair.to_prefill.ReleasePrefill(
        prefill_pb2.ReleasePrefillRequest(request_id="req"), timeout=5
    )
    await eventually(pair.prefill.is_clean)
    await eventually(pair.decode.is_clean)


def _prompt(num_tokens: int, seed: int = 0) -> list[int]:
    return [(index * 37 + seed * 11 + 5) % 256 for index in range(num_tokens)]


async def _refused(reason: ErrorReason, call: object) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call  # type: ignore[misc]
    error = error_from_rpc(caught.value)
    assert error.reason is reason
    return error.message


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 200])
async def test_a_handed_over_request_equals_the_reference(
    pair: Pair, model_path: Path, num_tokens: int
) -> None:
    prompt = _prompt(num_tokens)
    expected = list(reference_greedy(load_reference(model_path), prompt, 8))
    out = await pair.generate(prompt)
    assert out.token_ids == expected
    assert len(set(expected)) > 2
    num_blocks = -(-num_tokens // 16)
    layout = pair.decode.engine.fingerprint.layout
    assert out.done.blocks == num_blocks
    assert out.done.bytes == num_blocks * layout.block_bytes
    assert out.timings.HasField("queue")
    assert pair.prefill.counts()["held"] > 0


async def test_sampled_tokens_do_not_depend_on_where_the_prompt_was_computed(pair: Pair) -> None:
    prompt = _prompt(50)
    sampling = {"temperature": 0.9, "top_p": 0.9, "seed": 77, "logprobs": True, "max_tokens": 12}
    relayed = await pair.generate(prompt, "a", **sampling)
    grant = await pair.reserve(prompt, "b", **sampling)
    local = await pair.run_decode(grant, local_prefill=True)
    assert local.token_ids == relayed.token_ids
    assert len(local.logprobs) == len(relayed.logprobs) == 12
    assert local.finish_reason == 2
    await pair.to_prefill.ReleasePrefill(
        prefill_pb2.ReleasePrefillRequest(request_id="a"), timeout=5
    )


async def test_blocks_are_pushed_while_the_rest_is_computed(pair: Pair) -> None:
    out = await pair.generate(_prompt(400))
    assert out.done.chunks > 1
    transfer_s = out.done.transfer.ToTimedelta().total_seconds()
    exposed_s = out.done.exposed.ToTimedelta().total_seconds()
    assert 0.0 <= exposed_s < transfer_s


async def test_a_prompt_of_one_step_is_pushed_while_it_is_computed(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = _prompt(60)
    async with worker_pair(model_path, prefill={"layer_group_bytes": 1}) as pair:
        sampler = pair.prefill.engine._steps._sampler
        sample, may_sample = sampler.sample, threading.Event()

        def sample_late(*arguments: Any) -> Any:
            assert may_sample.wait(20)
            return sample(*arguments)

        monkeypatch.setattr(sampler, "sample", sample_late)
        generating = asyncio.create_task(pair.generate(prompt))
        intake = pair.decode.service.loaded().intake
        num_bytes = 4 * pair.decode.engine.fingerprint.layout.block_bytes
        try:
            await eventually(lambda: intake.num_bytes == num_bytes)
        finally:
            may_sample.set()
        out = await generating
        assert out.token_ids == list(reference_greedy(load_reference(model_path), prompt, 8))
        assert out.done.bytes == num_bytes
        await _assert_clean(pair)


async def test_blocks_that_decode_has_are_not_sent(pair: Pair) -> None:
    prompt = _prompt(80)
    received = pair.decode.service.loaded().intake
    block_bytes = pair.decode.engine.fingerprint.layout.block_bytes
    first = await pair.generate(prompt, "req", 1)
    assert received.num_bytes == first.done.bytes == 5 * block_bytes
    second = await pair.generate(prompt, "req", 2)
    assert second.token_ids == first.token_ids
    assert first.done.blocks == 5
    assert second.done.blocks == 1
    assert received.num_bytes - first.done.bytes == second.done.bytes == block_bytes
    assert second.started.cached_tokens == 64


async def test_kv_may_be_rounded_on_its_way(model_path: Path) -> None:
    prompt = _prompt(100)
    async with (
        hosted(CacheSettings(nats_url=""), CacheService) as cache,
        worker_pair(
            model_path, prefill={"kv_encoding": "int8"}, cache_address=cache.address
        ) as pair,
    ):
        exact = list(reference_greedy(load_reference(model_path), prompt, 8))
        out = await pair.generate(prompt)
        # The first token is computed from exact KV, and the rest is likely, not sure, to be equal.
        assert out.token_ids[0] == exact[0]
        assert len(out.token_ids) == 8
        layout = pair.decode.engine.fingerprint.layout
        assert out.done.bytes == 7 * KvEncoding.INT8.layout(layout).block_bytes
        assert out.done.bytes < 7 * layout.block_bytes / 3
        sent = pair.prefill.engine.read_blocks
        received = pair.decode.engine.export_blocks(pair.decode.engine.block_hashes(prompt, ""))
        mine = np.frombuffer(sent("req/1", 0, 1, 0, layout.num_layers), np.float32)
        theirs = np.frombuffer(received[0][1], np.float32)
        assert not np.array_equal(mine, theirs)
        assert np.abs(mine - theirs).max() <= np.abs(mine).max() / 250
        # What is not exact is not spread: the store gets the prompt's blocks of the sender only.
        await eventually(lambda: cache.service.snapshot().stats["stored_blocks"] == 6)
        await _assert_clean(pair)
        assert pair.decode.service.snapshot().stats["stored_blocks"] == 0


@pytest.mark.parametrize("fault", ["corrupt_chunk=0", "drop_chunk=0"])
async def test_rounded_kv_is_checked_as_it_travels(model_path: Path, fault: str) -> None:
    prompt = _prompt(150)
    faulty = {"fault": f"{fault},times=1", "kv_encoding": "int8"}
    async with worker_pair(model_path, prefill=faulty) as pair:
        grant = await pair.reserve(prompt)
        request = pair.prefill_request(prompt, grant)
        await _refused(ErrorReason.KV_CHECKSUM, pair.run_prefill(request))
        assert len((await pair.generate(prompt, attempt=2)).token_ids) == 8
        await _assert_clean(pair)


async def test_rounded_kv_may_be_refused(model_path: Path) -> None:
    prompt = _prompt(40)
    async with worker_pair(
        model_path, prefill={"kv_encoding": "int8"}, decode={"take_int8_kv": False}
    ) as pair:
        grant = await pair.reserve(prompt)
        request = pair.prefill_request(prompt, grant)
        message = await _refused(ErrorReason.KV_LAYOUT_MISMATCH, pair.run_prefill(request))
        assert message == "KV encoded as INT8 is not taken here"
        # Nothing was written: the reservation is still good.
        out = await pair.run_decode(grant, local_prefill=True)
        assert out.token_ids == list(reference_greedy(load_reference(model_path), prompt, 8))


async def test_an_unknown_encoding_is_refused(pair: Pair) -> None:
    grant = await pair.reserve(_prompt(40))
    opening = kv_transfer_pb2.PushHeader(
        epoch=grant.epoch,
        open=kv_transfer_pb2.PushOpen(
            reservation_id=grant.reservation_id,
            request_id="req",
            attempt=1,
            fingerprint=fingerprint_to_pb(pair.prefill.engine.fingerprint),
        ),
    ).SerializeToString()
    # Field 8 of PushOpen with a value from the future, merged into the frame's `open`.
    later = opening + bytes((0x0A, 2, 0x40, 99))
    channels = ChannelPool(max_message_bytes=4 << 20)
    call = channels.get(pair.decode.address).stream_stream(
        "/baton.v1.KvTransferService/Push",
        request_serializer=None,
        response_deserializer=kv_transfer_pb2.PushResponse.FromString,
    )(timeout=5)
    await call.write(encode_frame(later, b""))
    answer = await call.read()
    assert answer.failed.reason == ErrorReason.KV_LAYOUT_MISMATCH.value
    assert answer.failed.message == "KV encoding 99 is not known here"
    call.cancel()
    await channels.close()
    await pair.to_decode.Release(decode_pb2.ReleaseRequest(request_id="req"), timeout=5)


async def test_decode_may_be_called_before_the_prompt_is_computed(pair: Pair) -> None:
    prompt = _prompt(100)
    grant = await pair.reserve(prompt)
    decoding = asyncio.create_task(pair.run_decode(grant, Generated(token_ids=[0])))
    await pair.run_prefill(pair.prefill_request(prompt, grant))
    out = await decoding
    assert len(out.token_ids) == 8
    assert out.timings.wait_for_kv.ToTimedelta().total_seconds() > 0


async def test_many_requests_at_once(pair: Pair, model_path: Path) -> None:
    reference = load_reference(model_path)
    prompts = [_prompt(10 + 7 * index, seed=index) for index in range(8)]
    outs = await asyncio.gather(
        *(pair.generate(prompt, f"req-{index}") for index, prompt in enumerate(prompts))
    )
    for prompt, out in zip(prompts, outs, strict=True):
        assert out.token_ids == list(reference_greedy(reference, prompt, 8))
    for index in range(8):
        await pair.to_prefill.ReleasePrefill(
            prefill_pb2.ReleasePrefillRequest(request_id=f"req-{index}"), timeout=5
        )


async def test_a_request_that_ends_with_its_first_token_is_not_pushed(pair: Pair) -> None:
    prompt = _prompt(40)
    grant = await pair.reserve(prompt, max_tokens=1)
    out = await pair.run_prefill(pair.prefill_request(prompt, grant, max_tokens=1))
    assert len(out.token_ids) == 1
    assert out.finish_reason == 2
    assert out.done.bytes == 0
    assert pair.prefill.is_clean()
    released = await pair.to_decode.Release(
        decode_pb2.ReleaseRequest(reservation_id=grant.reservation_id), timeout=5
    )
    assert released.released_blocks >= 0


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
    prompt = _prompt(150)
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
        decoding = asyncio.create_task(_refused(reason, pair.run_decode(grant)))
        await _refused(reason, pair.run_prefill(pair.prefill_request(prompt, grant)))
        assert await decoding
        await eventually(pair.prefill.is_clean)
        await eventually(pair.decode.is_clean)
        # The next attempt is not harmed.
        out = await pair.generate(prompt, attempt=2)
        assert len(out.token_ids) == 8
        await _assert_clean(pair)


async def test_a_push_with_a_stale_epoch_is_refused(pair: Pair) -> None:
    prompt = _prompt(30)
    grant = await pair.reserve(prompt)
    stale = pair.prefill_request(prompt, grant)
    stale.target.epoch += 1
    await _refused(ErrorReason.STALE_EPOCH, pair.run_prefill(stale))
    out = await pair.run_prefill(pair.prefill_request(prompt, grant))
    assert (await pair.run_decode(grant, out)).finish_reason == 2


async def test_a_push_after_release_is_refused(pair: Pair) -> None:
    prompt = _prompt(30)
    grant = await pair.reserve(prompt)
    request = decode_pb2.ReleaseRequest(request_id="req", reason="cancelled")
    assert (await pair.to_decode.Release(request, timeout=5)).released_blocks > 0
    assert (await pair.to_decode.Release(request, timeout=5)).released_blocks == 0
    await _refused(ErrorReason.STALE_EPOCH, pair.run_prefill(pair.prefill_request(prompt, grant)))
    assert "cancelled" in await _refused(ErrorReason.CANCELLED, pair.run_decode(grant))


async def test_a_push_to_a_worker_that_was_restarted_is_a_lost_transfer(pair: Pair) -> None:
    grant = decode_pb2.ReserveResponse(
        reservation_id="res-of-the-last-boot", epoch=1, push_address=pair.decode.address
    )
    message = await _refused(
        ErrorReason.KV_TRANSFER_LOST, pair.run_prefill(pair.prefill_request(_prompt(30), grant))
    )
    assert "res-of-the-last-boot is not known" in message
    await _refused(ErrorReason.REQUEST_NOT_FOUND, pair.run_decode(grant))


async def test_workers_with_different_models_say_how_they_differ(
    model_path: Path, tmp_path: Path
) -> None:
    other = make_tiny_model("llama", tmp_path / "tiny", seed=5)
    prompt = _prompt(30)
    async with (
        worker_pair(model_path) as pair,
        worker_pair(other, decode={"num_blocks": 8}) as others,
    ):
        grant = await pair.reserve(prompt)
        message = await _refused(
            ErrorReason.KV_LAYOUT_MISMATCH,
            others.run_prefill(others.prefill_request(prompt, grant)),
        )
        assert "weights: " in message
        assert "config" not in message
        await eventually(others.prefill.is_clean)
        # Nothing was written: the reservation is still good for the right sender.
        out = await pair.run_prefill(pair.prefill_request(prompt, grant))
        assert (await pair.run_decode(grant, out)).finish_reason == 2
        await _assert_clean(pair)


async def test_cancelling_the_prefill_call_stops_and_frees_both_sides(model_path: Path) -> None:
    prompt = _prompt(300)
    async with worker_pair(model_path, prefill={"fault": "stall_after_chunk=1"}) as pair:
        grant = await pair.reserve(prompt)
        decoding = asyncio.create_task(
            _refused(ErrorReason.KV_TRANSFER_LOST, pair.run_decode(grant))
        )
        call = pair.to_prefill.Prefill(pair.prefill_request(prompt, grant), timeout=30)
        await call.read()
        await eventually(lambda: pair.decode.counts()["filling"] > 0)
        call.cancel()
        await decoding
        await eventually(pair.prefill.is_clean, timeout_s=2)
        await eventually(pair.decode.is_clean, timeout_s=2)


async def test_cancelling_the_decode_call_frees_the_reservation(model_path: Path) -> None:
    prompt = _prompt(300)
    async with worker_pair(model_path, prefill={"fault": "stall_after_chunk=1"}) as pair:
        grant = await pair.reserve(prompt)
        call = pair.to_decode.Decode(
            decode_pb2.DecodeRequest(reservation_id=grant.reservation_id, epoch=grant.epoch),
            timeout=30,
        )
        prefilling = asyncio.create_task(
            _refused(ErrorReason.STALE_EPOCH, pair.run_prefill(pair.prefill_request(prompt, grant)))
        )
        await eventually(lambda: pair.decode.counts()["filling"] > 0)
        call.cancel()
        await prefilling
        await eventually(pair.decode.is_clean, timeout_s=2)
        await eventually(pair.prefill.is_clean, timeout_s=2)


async def test_cancelling_while_decoding_frees_everything(pair: Pair) -> None:
    prompt = _prompt(40)
    grant = await pair.reserve(prompt, max_tokens=1000)
    await pair.run_prefill(pair.prefill_request(prompt, grant, max_tokens=1000))
    call = pair.to_decode.Decode(
        decode_pb2.DecodeRequest(reservation_id=grant.reservation_id, epoch=grant.epoch),
        timeout=30,
    )
    await call.read()
    call.cancel()
    await eventually(pair.decode.is_clean, timeout_s=2)


async def test_an_unused_reservation_ends_with_its_lease(model_path: Path) -> None:
    async with worker_pair(model_path, decode={"reservation_lease_s": 0.4}) as pair:
        kept = await pair.reserve(_prompt(30), "kept")
        await pair.reserve(_prompt(30, seed=3), "lost")
        sessions = pair.decode.service.loaded().sessions

        async def renewed_until_the_other_is_gone() -> bool:
            answer = await pair.to_decode.RenewLeases(
                decode_pb2.RenewLeasesRequest(reservation_ids=[kept.reservation_id, "zz"]),
                timeout=5,
            )
            assert list(answer.unknown_reservation_ids) == ["zz"]
            return len(sessions) == 1

        await eventually(renewed_until_the_other_is_gone)
        assert sessions.num_leases_expired == 1
        await eventually(pair.decode.is_clean)
        assert sessions.num_leases_expired == 2


async def test_a_committed_request_that_nobody_reads_ends_with_its_lease(model_path: Path) -> None:
    async with worker_pair(model_path, decode={"reservation_lease_s": 0.4}) as pair:
        grant = await pair.reserve(_prompt(30), max_tokens=1500)
        await pair.run_prefill(pair.prefill_request(_prompt(30), grant, max_tokens=1500))
        await eventually(pair.decode.is_clean)
        await _assert_clean(pair)


async def test_a_kept_copy_ends_by_release_or_lease(model_path: Path) -> None:
    async with worker_pair(model_path, prefill={"hold_lease_s": 0.5}) as pair:
        await pair.generate(_prompt(40), "a")
        request = prefill_pb2.ReleasePrefillRequest(request_id="a", attempt=1)
        assert (await pair.to_prefill.ReleasePrefill(request, timeout=5)).released_blocks == 3
        assert (await pair.to_prefill.ReleasePrefill(request, timeout=5)).released_blocks == 0
        await pair.generate(_prompt(40, seed=2), "b")
        assert pair.prefill.counts()["held"] > 0
        await eventually(pair.prefill.is_clean)
        assert pair.prefill.service.loaded().jobs.num_holds_expired == 1
        assert pair.prefill.counts()["cached"] > 0


async def test_a_higher_attempt_replaces_a_lower_one(pair: Pair) -> None:
    prompt = _prompt(40)
    first = await pair.reserve(prompt, attempt=1)
    second = await pair.reserve(prompt, attempt=2)
    assert second.epoch > first.epoch
    await _refused(ErrorReason.STALE_EPOCH, pair.reserve(prompt, attempt=1))
    await _refused(ErrorReason.STALE_EPOCH, pair.reserve(prompt, attempt=2))
    message = await _refused(
        ErrorReason.STALE_EPOCH, pair.run_prefill(pair.prefill_request(prompt, first))
    )
    assert "attempt 2 replaced it" in message
    out = await pair.run_prefill(pair.prefill_request(prompt, second, attempt=2))
    assert (await pair.run_decode(second, out)).finish_reason == 2


async def test_a_higher_attempt_replaces_a_running_prefill(model_path: Path) -> None:
    prompt = _prompt(300)
    async with worker_pair(model_path, prefill={"fault": "stall_after_chunk=1,times=1"}) as pair:
        first = await pair.reserve(prompt, attempt=1)
        replaced = asyncio.create_task(
            _refused(ErrorReason.STALE_EPOCH, pair.run_prefill(pair.prefill_request(prompt, first)))
        )
        await eventually(lambda: pair.decode.counts()["filling"] > 0)
        out = await pair.generate(prompt, attempt=2)
        assert len(out.token_ids) == 8
        await replaced
        await _assert_clean(pair)


async def test_a_dead_decode_worker_is_a_lost_transfer(pair: Pair) -> None:
    prompt = _prompt(40)
    grant = await pair.reserve(prompt)
    nowhere = pair.prefill_request(prompt, grant)
    nowhere.target.address = "127.0.0.1:1"
    await _refused(ErrorReason.KV_TRANSFER_LOST, pair.run_prefill(nowhere))
    await pair.to_decode.Release(decode_pb2.ReleaseRequest(request_id="req"), timeout=5)


async def test_decode_says_no_when_it_is_full(model_path: Path) -> None:
    async with worker_pair(model_path, decode={"num_blocks": 10}) as pair:
        await pair.reserve(_prompt(80), "a", max_tokens=4)
        await _refused(ErrorReason.KV_CACHE_FULL, pair.reserve(_prompt(80, 2), "b", max_tokens=4))
        await pair.to_decode.Release(decode_pb2.ReleaseRequest(request_id="a"), timeout=5)
        await pair.reserve(_prompt(80, 2), "b", max_tokens=4)
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
    await _refused(reason, pair.to_decode.Reserve(decode_pb2.ReserveRequest(**request), timeout=5))
    prefill = prefill_pb2.PrefillRequest(**request)
    await _refused(reason, pair.run_prefill(prefill))


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
    await _refused(ErrorReason.INVALID_REQUEST, call.read())
    await channels.close()


async def test_a_push_cannot_write_outside_of_its_reservation(pair: Pair) -> None:
    prompt = _prompt(40)
    grant = await pair.reserve(prompt)
    channels = ChannelPool(max_message_bytes=4 << 20)
    call = PushCall(channels, grant.push_address, timeout_s=10)
    fingerprint = pair.prefill.engine.fingerprint
    await call.open(Opening(grant.reservation_id, "req", 1, grant.epoch, fingerprint, "me"))
    await call.read()
    span = Span(0, fingerprint.layout.num_layers, 3, 1)
    payload = bytes(span.num_bytes(fingerprint.layout))
    await call.chunk(Chunk(grant.epoch, 0, span, 0), memoryview(payload))
    with pytest.raises(KvLayoutMismatch, match=r"blocks \[3, 4\) are outside"):
        await call.read()
    call.cancel()
    await channels.close()
