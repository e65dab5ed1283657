from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from baton.cache.service import CacheService
from baton.cache.settings import CacheSettings
from baton.core.cluster import ServiceState
from baton.core.errors import ErrorReason
from baton.v1 import decode_pb2, kv_transfer_pb2, kv_transfer_pb2_grpc, prefill_pb2
from baton.wire.announcement import kv_event_from_bytes
from baton.wire.channel import ChannelPool
from baton.wire.errors import rpc_errors
from tests.support.eventually import eventually
from tests.support.tiny_models import make_tiny_model
from tests.support.workers import Generated, Pair, hosted, prompt_of, refused, worker_pair


async def test_a_prefix_stored_by_one_worker_is_fetched_by_another(model_path: Path) -> None:
    prompt = prompt_of(100)
    async with hosted(CacheSettings(nats_url=""), CacheService) as cache:
        no_write_back = {"write_back_queue_blocks": 0}
        async with worker_pair(
            model_path, decode=no_write_back, cache_address=cache.address
        ) as first:
            expected = await first.generate(prompt)
            assert expected.started.fetched_tokens == 0
            write_back = first.prefill.service.loaded().host.write_back
            await eventually(lambda: write_back.num_stored_blocks == 6)
            # Asked for again, it is found here, and nothing is stored twice.
            again = await first.generate(prompt, attempt=2)
            assert (again.started.cached_tokens, again.started.fetched_tokens) == (96, 0)
        async with worker_pair(model_path, cache_address=cache.address) as second:
            out = await second.generate(prompt)
            assert (out.started.cached_tokens, out.started.fetched_tokens) == (96, 96)
            assert out.token_ids == expected.token_ids
            assert second.prefill.service.snapshot().stats["fetched_blocks"] == 6
            assert second.prefill.service.snapshot().stats["cache_failures"] == 0
            # Another tenant's prefix is another prefix.
            grant = await second.reserve(prompt, "b")
            request = second.prefill_request(prompt, grant, "b")
            request.cache_salt = "other tenant"
            other = await second.run_prefill(request)
            assert other.started.cached_tokens == 0
            assert other.token_ids[0] == expected.token_ids[0]
            await second.to_decode.Release(decode_pb2.ReleaseRequest(request_id="b"), timeout=5)


async def test_the_workers_tell_their_chunks(model_path: Path) -> None:
    """Chunks of the prompt as computed, chunks of KV as arrived: enough to see them overlap."""
    async with worker_pair(model_path, prefill={"max_num_batched_tokens": 32}) as pair:
        out = await pair.generate(prompt_of(100), max_tokens=4)
        chunks = out.first.chunks
        assert [chunk.tokens for chunk in chunks] == [32, 32, 32, 4]
        starts = [chunk.start.ToNanoseconds() for chunk in chunks]
        ends = [chunk.start.ToNanoseconds() + chunk.duration.ToNanoseconds() for chunk in chunks]
        assert starts[0] == 0
        assert all(abs(start - end) < 10 for start, end in zip(starts[1:], ends, strict=False))
        assert abs(ends[-1] - out.first.compute.ToNanoseconds()) < 10
        arrived = out.timings.kv_chunks
        assert sum(chunk.bytes for chunk in arrived) == out.done.bytes
        assert sum(chunk.parts for chunk in arrived) == out.done.chunks
        again = await pair.generate(prompt_of(100), attempt=2, max_tokens=4)
        assert sum(chunk.tokens for chunk in again.first.chunks) == 4


async def test_a_second_turn_recomputes_at_most_one_block(model_path: Path) -> None:
    prompt, block_size = prompt_of(100), 16
    async with hosted(CacheSettings(nats_url=""), CacheService) as cache:
        async with worker_pair(model_path, cache_address=cache.address) as first:
            turn = await first.generate(prompt, max_tokens=40)
            history = [*prompt, *turn.token_ids]
            assert len(history) == 140
            await eventually(lambda: cache.service.snapshot().stats["stored_blocks"] == 8)
            # The worker counts them when it is told that they were taken.
            await eventually(lambda: first.decode.service.snapshot().stats["stored_blocks"] >= 2)
        second_prompt = [*history, *prompt_of(20, seed=1)]
        # No worker of the first turn is left: what is known comes from the cache service.
        async with worker_pair(model_path, cache_address=cache.address) as second:
            out = await second.generate(second_prompt)
            assert 0 <= len(history) - out.started.cached_tokens <= block_size
            assert out.started.fetched_tokens == out.started.cached_tokens
    async with worker_pair(model_path) as alone:
        assert (await alone.generate(second_prompt)).token_ids == out.token_ids


@pytest.mark.parametrize("draft_seed", [0, 5])
async def test_speculation_after_a_handoff_changes_no_token(
    model_path: Path, tmp_path: Path, draft_seed: int
) -> None:
    """Seed 0 is the target itself, whose drafts are all accepted; 5 is hardly ever right."""
    draft_path = make_tiny_model("llama", tmp_path / "draft", seed=draft_seed)
    speculative = {
        "draft_model_path": draft_path,
        "speculation": True,
        "adaptive_drafts": False,
    }
    async with worker_pair(model_path, decode=speculative) as pair:
        for index, sampling in enumerate([
            {"max_tokens": 24},
            {"max_tokens": 24, "temperature": 0.9, "top_k": 40, "seed": 3},
            {"max_tokens": 24, "temperature": 0.7, "frequency_penalty": 0.5, "min_tokens": 9},
        ]):
            prompt = prompt_of(70, seed=index)
            plain = await pair.generate(prompt, f"a{index}", speculation=False, **sampling)
            drafted = await pair.generate(prompt, f"b{index}", **sampling)
            assert drafted.token_ids == plain.token_ids
            assert len(set(plain.token_ids)) > 4
        counters = pair.decode.service.snapshot().stats
        assert counters["draft_tokens"] > 0
        accepted = counters["accepted_tokens"] / counters["draft_tokens"]
        assert accepted > 0.8 if draft_seed == 0 else accepted < 0.5


async def test_prompt_logprobs_come_with_the_first_token_wherever_it_is_made(pair: Pair) -> None:
    prompt = prompt_of(70)
    await pair.generate(prompt, "warm")
    asked = {"prompt_logprobs": 2}
    grant = await pair.reserve(prompt, "a", **asked)
    request = pair.prefill_request(prompt, grant, "a", **asked)
    out = await pair.run_prefill(request)
    told = list(out.first.prompt_logprobs)
    assert len(told) == 69
    assert {len(entry.top_token_ids) for entry in told} == {2}
    assert len({entry.logprob for entry in told}) > 60
    await pair.run_decode(grant, out)
    grant = await pair.reserve(prompt, "b", **asked)
    call = pair.to_decode.Decode(
        decode_pb2.DecodeRequest(
            reservation_id=grant.reservation_id, epoch=grant.epoch, local_prefill=True
        ),
        timeout=30,
    )
    messages = [message async for message in call]
    local = list(messages[0].prompt_logprobs)
    assert [entry.logprob for entry in local] == pytest.approx(
        [entry.logprob for entry in told], abs=1e-4
    )
    assert not any(message.prompt_logprobs for message in messages[1:])
    for name in ("a", "warm"):
        await pair.to_prefill.ReleasePrefill(
            prefill_pb2.ReleasePrefillRequest(request_id=name), timeout=5
        )


async def test_a_dead_cache_service_costs_nothing_but_a_moment(model_path: Path) -> None:
    async with worker_pair(
        model_path, prefill={"cache_timeout_s": 0.3}, cache_address="127.0.0.1:1"
    ) as pair:
        out = await pair.generate(prompt_of(60))
        assert len(out.token_ids) == 8
        assert pair.prefill.service.snapshot().stats["cache_failures"] == 1
        # It is left alone for a while.
        await pair.generate(prompt_of(60, seed=1), "b")
        assert pair.prefill.service.snapshot().stats["cache_failures"] == 1


async def test_write_back_is_dropped_and_counted_when_too_much_waits(model_path: Path) -> None:
    async with (
        hosted(CacheSettings(nats_url=""), CacheService) as cache,
        worker_pair(
            model_path,
            prefill={"write_back_queue_blocks": 2},
            decode={"write_back_queue_blocks": 3},
            cache_address=cache.address,
        ) as pair,
    ):
        await pair.generate(prompt_of(100))
        for worker in (pair.prefill, pair.decode):
            await eventually(lambda w=worker: w.service.snapshot().stats["dropped_blocks"] == 6)
        assert cache.service.snapshot().stats["stored_blocks"] == 0


async def test_a_prompt_without_target_warms_the_prefix_cache(pair: Pair) -> None:
    prompt = prompt_of(70)
    out = await pair.run_prefill(pair.prefill_request(prompt, None))
    assert out.done.bytes == 0
    assert pair.prefill.counts()["held"] == 0
    assert (await pair.generate(prompt, attempt=2)).started.cached_tokens == 64


async def test_kv_events_and_snapshot_agree(pair: Pair) -> None:
    await pair.generate(prompt_of(100))
    for worker in (pair.prefill, pair.decode):
        held: set[bytes] = set()

        async def all_published(worker=worker, held=held) -> bool:  # type: ignore[no-untyped-def]
            held.clear()
            events = [kv_event_from_bytes(data) for _, data in worker.bus.published]
            for number, event in enumerate(events, start=1):
                assert event.sequence == number
                assert event.worker_id == worker.runtime.worker_id
                held.difference_update(event.removed)
                held.update(event.stored)
            sequence, hashes = worker.service.kv_snapshot()
            return sequence == len(events) and held == set(hashes) and len(held) >= 6

        await eventually(all_published)
        assert {subject for subject, _ in worker.bus.published} == {
            f"baton.kv.{worker.runtime.worker_id}"
        }


async def test_stages_are_recorded_as_spans(pair: Pair) -> None:
    await pair.generate(prompt_of(100))

    def names(worker: object) -> set[str]:
        return {span.name for span in worker.spans.get_finished_spans()}  # type: ignore[attr-defined]

    assert {"prefill.queue", "prefill.compute", "kv.transfer"} <= names(pair.prefill)
    await eventually(lambda: {"decode.queue", "decode.first_step", "decode"} <= names(pair.decode))
    spans = {span.name: span for span in pair.prefill.spans.get_finished_spans()}
    transfer = spans["kv.transfer"]
    assert transfer.attributes["baton.kv.blocks"] == 7
    rpc = spans["baton.v1.PrefillService/Prefill"]
    assert transfer.parent.span_id == rpc.context.span_id
    pushes = [
        span for span in pair.decode.spans.get_finished_spans() if span.name.endswith("/Push")
    ]
    assert [span.context.trace_id for span in pushes] == [rpc.context.trace_id]


async def test_a_draining_worker_takes_nothing_new_and_finishes_the_rest(pair: Pair) -> None:
    prompt = prompt_of(40)
    grant = await pair.reserve(prompt)
    pair.decode.runtime.lifecycle.state = ServiceState.DRAINING
    await refused(ErrorReason.WORKER_DRAINING, pair.reserve(prompt, "other"))
    draining = asyncio.create_task(pair.decode.service.drain(10.0))
    out = await pair.run_prefill(pair.prefill_request(prompt, grant))
    assert not draining.done()
    assert (await pair.run_decode(grant, out)).finish_reason == 2
    await draining


async def test_a_worker_whose_engine_died_asks_its_process_to_end(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> bool:
        raise RuntimeError("on purpose")

    for worker in (pair.prefill, pair.decode):
        monkeypatch.setattr(worker.engine, "step", broken)
        worker.engine.notify()
        await asyncio.wait_for(worker.runtime.lifecycle.stop_requested.wait(), 20)
        assert (worker.runtime.lifecycle.exit_code, worker.runtime.lifecycle.grace_s) == (1, 0.0)


async def test_a_second_reader_is_refused(pair: Pair) -> None:
    prompt = prompt_of(40)
    grant = await pair.reserve(prompt)
    reading = asyncio.create_task(pair.run_decode(grant, Generated(token_ids=[0])))
    await eventually(
        lambda: (
            pair.decode.service
            .loaded()
            .sessions.find(grant.reservation_id, grant.epoch)
            .reservation.is_attached
        )
    )
    await refused(ErrorReason.INVALID_REQUEST, pair.run_decode(grant))
    await pair.run_prefill(pair.prefill_request(prompt, grant))
    assert (await reading).finish_reason == 2


async def test_probe_counts_bytes(pair: Pair) -> None:
    channels = ChannelPool(max_message_bytes=4 << 20)
    stub = kv_transfer_pb2_grpc.KvTransferServiceStub(channels.get(pair.decode.address))

    async def requests() -> AsyncIterator[kv_transfer_pb2.ProbeRequest]:
        for _ in range(3):
            yield kv_transfer_pb2.ProbeRequest(payload=bytes(1000))

    with rpc_errors():
        answer = await stub.Probe(requests(), timeout=5)
    assert answer.num_bytes == 3000
    await channels.close()


async def test_a_probe_is_bounded_in_bytes_and_in_time(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.wire.push.MAX_PROBE_BYTES", 2000)
    channels = ChannelPool(max_message_bytes=4 << 20)
    stub = kv_transfer_pb2_grpc.KvTransferServiceStub(channels.get(pair.decode.address))

    async def requests(num_bytes: int) -> AsyncIterator[kv_transfer_pb2.ProbeRequest]:
        yield kv_transfer_pb2.ProbeRequest(payload=bytes(num_bytes))
        await asyncio.Event().wait()

    await refused(ErrorReason.INVALID_REQUEST, stub.Probe(requests(2001), timeout=20))
    monkeypatch.setattr("baton.wire.push._PROBE_TIMEOUT_S", 0.05)
    await refused(ErrorReason.STALLED, stub.Probe(requests(1), timeout=20))
    await channels.close()


async def test_int8_kv_is_handed_over_as_it_is_and_to_its_like_only(model_path: Path) -> None:
    prompt = prompt_of(100)
    small = {"kv_dtype": "int8"}
    async with worker_pair(model_path, prefill=small, decode=small) as pair:
        out = await pair.generate(prompt, max_tokens=12)
        layout = pair.decode.service.loaded().host.engine.fingerprint.layout
        assert out.done.bytes == 7 * layout.block_bytes
        grant = await pair.reserve(prompt, "local", max_tokens=12)
        assert (await pair.run_decode(grant, local_prefill=True)).token_ids == out.token_ids
    async with worker_pair(model_path, decode=small) as pair:
        grant = await pair.reserve(prompt)
        call = pair.run_prefill(pair.prefill_request(prompt, grant))
        message = await refused(ErrorReason.KV_LAYOUT_MISMATCH, call)
        assert "dtype: int8 != float32" in message
