"""Who lets go of a hand-off's blocks: cancelled calls, leases, releases, higher attempts."""

from __future__ import annotations

import asyncio
from pathlib import Path

from baton.core.errors import ErrorReason
from baton.v1 import decode_pb2, prefill_pb2
from tests.support.eventually import eventually
from tests.support.workers import Pair, prompt_of, refused, worker_pair


async def test_cancelling_the_prefill_call_stops_and_frees_both_sides(model_path: Path) -> None:
    prompt = prompt_of(300)
    async with worker_pair(model_path, prefill={"fault": "stall_after_chunk=1"}) as pair:
        grant = await pair.reserve(prompt)
        decoding = asyncio.create_task(
            refused(ErrorReason.KV_TRANSFER_LOST, pair.run_decode(grant))
        )
        call = pair.to_prefill.Prefill(pair.prefill_request(prompt, grant), timeout=30)
        await call.read()
        await eventually(lambda: pair.decode.counts()["filling"] > 0)
        call.cancel()
        await decoding
        await eventually(pair.prefill.is_clean, timeout_s=2)
        await eventually(pair.decode.is_clean, timeout_s=2)


async def test_cancelling_the_decode_call_frees_the_reservation(model_path: Path) -> None:
    prompt = prompt_of(300)
    async with worker_pair(model_path, prefill={"fault": "stall_after_chunk=1"}) as pair:
        grant = await pair.reserve(prompt)
        call = pair.to_decode.Decode(
            decode_pb2.DecodeRequest(reservation_id=grant.reservation_id, epoch=grant.epoch),
            timeout=30,
        )
        prefilling = asyncio.create_task(
            refused(ErrorReason.STALE_EPOCH, pair.run_prefill(pair.prefill_request(prompt, grant)))
        )
        await eventually(lambda: pair.decode.counts()["filling"] > 0)
        call.cancel()
        await prefilling
        await eventually(pair.decode.is_clean, timeout_s=2)
        await eventually(pair.prefill.is_clean, timeout_s=2)


async def test_cancelling_while_decoding_frees_everything(pair: Pair) -> None:
    prompt = prompt_of(40)
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
    async with worker_pair(model_path, decode={"reservation_lease_s": 2.0}) as pair:
        kept = await pair.reserve(prompt_of(30), "kept")
        await pair.reserve(prompt_of(30, seed=3), "lost")
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
    async with worker_pair(model_path, decode={"reservation_lease_s": 2.0}) as pair:
        grant = await pair.reserve(prompt_of(30), max_tokens=1500)
        await pair.run_prefill(pair.prefill_request(prompt_of(30), grant, max_tokens=1500))
        await eventually(pair.decode.is_clean)
        await pair.assert_clean()


async def test_a_kept_copy_ends_by_release_or_lease(model_path: Path) -> None:
    async with worker_pair(model_path, prefill={"hold_lease_s": 2.0}) as pair:
        await pair.generate(prompt_of(40), "a")
        request = prefill_pb2.ReleasePrefillRequest(request_id="a", attempt=1)
        assert (await pair.to_prefill.ReleasePrefill(request, timeout=5)).released_blocks == 3
        assert (await pair.to_prefill.ReleasePrefill(request, timeout=5)).released_blocks == 0
        await pair.generate(prompt_of(40, seed=2), "b")
        assert pair.prefill.counts()["held"] > 0
        await eventually(pair.prefill.is_clean)
        assert pair.prefill.service.loaded().jobs.num_holds_expired == 1
        assert pair.prefill.counts()["cached"] > 0


async def test_a_higher_attempt_replaces_a_lower_one(pair: Pair) -> None:
    prompt = prompt_of(40)
    first = await pair.reserve(prompt, attempt=1)
    second = await pair.reserve(prompt, attempt=2)
    assert second.epoch > first.epoch
    await refused(ErrorReason.STALE_EPOCH, pair.reserve(prompt, attempt=1))
    await refused(ErrorReason.STALE_EPOCH, pair.reserve(prompt, attempt=2))
    message = await refused(
        ErrorReason.STALE_EPOCH, pair.run_prefill(pair.prefill_request(prompt, first))
    )
    assert "attempt 2 replaced it" in message
    out = await pair.run_prefill(pair.prefill_request(prompt, second, attempt=2))
    assert (await pair.run_decode(second, out)).finish_reason == 2


async def test_a_higher_attempt_replaces_a_running_prefill(model_path: Path) -> None:
    prompt = prompt_of(300)
    async with worker_pair(model_path, prefill={"fault": "stall_after_chunk=1,times=1"}) as pair:
        first = await pair.reserve(prompt, attempt=1)
        replaced = asyncio.create_task(
            refused(ErrorReason.STALE_EPOCH, pair.run_prefill(pair.prefill_request(prompt, first)))
        )
        await eventually(lambda: pair.decode.counts()["filling"] > 0)
        out = await pair.generate(prompt, attempt=2)
        assert len(out.token_ids) == 8
        await replaced
        await pair.assert_clean()
