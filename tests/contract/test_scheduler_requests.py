"""What the scheduler remembers of its requests, and that it is no more than times and counts."""

from __future__ import annotations

import grpc
import pytest

from baton.core.errors import ErrorReason
from baton.v1 import inference_pb2
from baton.wire.errors import error_from_rpc
from tests.support.eventually import eventually
from tests.support.scheduler_rig import Rig

ListRequests = inference_pb2.ListRequestsRequest


def seconds(duration: object) -> float:
    return duration.ToTimedelta().total_seconds()  # type: ignore[attr-defined, no-any-return]


async def latest(rig: Rig, **fields: object) -> inference_pb2.ListRequestsResponse:
    answer: inference_pb2.ListRequestsResponse = await rig.stub.ListRequests(
        ListRequests(**fields),  # type: ignore[arg-type]
        timeout=5,
    )
    return answer


async def test_a_finished_request_is_remembered_without_its_texts() -> None:
    async with Rig() as rig:
        answer = await rig.ask("a very secret prompt", request_id="one")
        found = await latest(rig)
        record = found.requests[0]
        assert (record.request_id, record.state, record.outcome) == ("one", "finished", "length")
        assert (record.prompt_tokens, record.output_tokens) == (20, 8)
        assert (found.prompt_tokens, found.output_tokens) == (20, 8)
        assert record.trace_id == answer.last.trace_id
        assert [s.stage for s in record.stages] == [s.stage for s in answer.last.stages]
        assert record.placement == answer.last.placement
        assert 0 < seconds(record.ttft) <= seconds(record.elapsed) <= seconds(record.age)
        assert not record.tracks
        whole = (await latest(rig, request_id="one")).requests[0]
        assert b"secret" not in whole.SerializeToString()
        assert answer.text.encode() not in whole.SerializeToString()


async def test_tracks_follow_one_another_across_the_services() -> None:
    async with Rig() as rig:
        await rig.ask("hello", request_id="one", sampling={"max_tokens": 6})
        record = (await latest(rig, request_id="one")).requests[0]
        tracks = {track.name: track for track in record.tracks}
        assert list(tracks) == ["prefill_chunk", "kv_chunk", "decode_step"]
        assert [t.worker_id for t in record.tracks] == ["prefill-0", "decode-0", "decode-0"]
        assert [part.tokens for part in tracks["prefill_chunk"].slices] == [3, 2]
        assert [part.bytes for part in tracks["kv_chunk"].slices] == [2048, 2048]
        steps = tracks["decode_step"].slices
        assert sum(step.parts for step in steps) == 5
        assert sum(step.tokens for step in steps) == 5
        reserve_s = next(seconds(s.start) for s in record.stages if s.stage == "reserve")
        for track in record.tracks:
            starts = [seconds(part.start) for part in track.slices]
            assert starts == sorted(starts)
            assert starts[0] >= reserve_s
        assert seconds(steps[-1].start) > seconds(tracks["prefill_chunk"].slices[0].start)


async def test_a_local_prefill_has_steps_from_the_second_token_on() -> None:
    async with Rig(num_prefill=0) as rig:
        await rig.ask("hello", request_id="one", sampling={"max_tokens": 4})
        record = (await latest(rig, request_id="one")).requests[0]
        assert [track.name for track in record.tracks] == ["decode_step"]
        assert sum(part.tokens for part in record.tracks[0].slices) == 3
        assert record.placement.local_prefill


async def test_a_running_request_is_listed_with_its_state_and_stages_so_far() -> None:
    async with Rig() as rig:
        rig.decodes[0].pauses.hold("token 3")
        call = rig.stub.Generate(rig.request(request_id="slow"), timeout=20)
        await eventually(lambda: "token 3" in rig.decodes[0].pauses.reached)

        async def is_decoding() -> bool:
            record = (await latest(rig)).requests[0]
            return (record.state, record.output_tokens) == ("decoding", 3)

        await eventually(is_decoding)
        record = (await latest(rig)).requests[0]
        assert record.outcome == ""
        assert {"tokenize", "prefill"} <= {stage.stage for stage in record.stages}
        call.cancel()

        async def is_over() -> bool:
            record = (await latest(rig)).requests[0]
            return (record.state, record.outcome) == ("aborted", "cancelled")

        await eventually(is_over)


async def test_a_failure_says_its_reason() -> None:
    async with Rig(max_attempts=1) as rig:
        rig.prefills[0].fail_at = "compute"
        with pytest.raises(grpc.aio.AioRpcError):
            await rig.ask("hello")
        record = (await latest(rig)).requests[0]
        assert (record.state, record.outcome) == ("failed", "no_worker")


async def test_after_a_fail_over_both_decode_workers_have_a_track() -> None:
    async with Rig(num_decode=2) as rig:
        for decode in rig.decodes:
            decode.fail_at_index = 4
        await rig.ask("hello", request_id="one")
        record = (await latest(rig, request_id="one")).requests[0]
        steps = {t.worker_id: t.slices for t in record.tracks if t.name == "decode_step"}
        assert set(steps) == {"decode-0", "decode-1"}
        assert sum(part.tokens for slices in steps.values() for part in slices) == 6
        assert record.placement.attempts == 2


async def test_only_so_many_are_remembered_the_latest_first() -> None:
    async with Rig(recent_requests=3) as rig:
        for index in range(5):
            await rig.ask("hi", request_id=f"r{index}", sampling={"max_tokens": 2})
        assert [r.request_id for r in (await latest(rig)).requests] == ["r4", "r3", "r2"]
        assert [r.request_id for r in (await latest(rig, limit=1)).requests] == ["r4"]
        await rig.ask("hi", request_id="r3", sampling={"max_tokens": 2})
        assert [r.request_id for r in (await latest(rig)).requests] == ["r3", "r4", "r2"]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await latest(rig, request_id="r0")
        assert error_from_rpc(caught.value).reason is ErrorReason.REQUEST_NOT_FOUND
        assert (await latest(rig)).output_tokens == 12


async def test_nothing_is_remembered_where_that_is_switched_off() -> None:
    async with Rig(recent_requests=0) as rig:
        await rig.ask("hi")
        assert not (await latest(rig)).requests


async def test_a_lost_worker_stays_visible_as_lost() -> None:
    async with Rig(num_decode=2) as rig:
        process = rig.processes["decode-1"]
        await process.kill()
        rig.members.suspect("decode-1")

        async def states() -> dict[str, str]:
            request = inference_pb2.GetClusterStatusRequest()
            status = await rig.stub.GetClusterStatus(request, timeout=5)
            return {service.worker_id: service.state for service in status.services}

        async def is_lost() -> bool:
            return (await states())["decode-1"] == "lost"

        await eventually(is_lost, timeout_s=5)
        assert (await states())["decode-0"] == "ready"
