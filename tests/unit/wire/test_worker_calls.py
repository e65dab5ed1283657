"""The decode and prefill conversations: over gRPC and in memory, values arrive alike."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import pytest

from baton.core.embedding import Pooling
from baton.core.errors import (
    BatonError,
    DeadlineExceeded,
    ErrorReason,
    KvCacheFull,
    NoWorker,
    QueueFull,
    StaleEpoch,
)
from baton.core.hashing import Fingerprint, KvLayout
from baton.core.output import DecodeTimings, TokenBatch
from baton.core.sampling import FinishReason, SamplingParams, TokenLogprob
from baton.core.timeline import Slice
from baton.rpc.interceptors import ServerInterceptor
from baton.rpc.metrics import Metrics
from baton.rpc.telemetry import Telemetry
from baton.wire.clock import SystemClock
from baton.wire.decode import (
    DecodeCaller,
    KvReservation,
    LeaseRenewal,
    RpcDecodeCaller,
    add_decode_server,
)
from baton.wire.orders import AttemptOrder, EmbedOrder
from baton.wire.prefill import (
    FirstToken,
    PathMeasurement,
    PrefillCaller,
    PrefillDone,
    PrefillEvent,
    PrefillStarted,
    PromptVector,
    PushTarget,
    RpcPrefillCaller,
    add_prefill_server,
)
from baton.wire.streams import Silent
from tests.support.direct_callers import DirectDecodeCaller, DirectPrefillCaller
from tests.support.eventually import eventually

ORDER = AttemptOrder(
    request_id="r",
    attempt=2,
    token_ids=(1, 2, 3),
    num_output_tokens=1,
    sampling=SamplingParams(seed=7, max_tokens=4, logprobs=True),
    fingerprint=Fingerprint("m", "c", "w", "t", KvLayout.one_group(4, "float32", (1,), (8,))),
    priority=-3,
    cache_salt="s",
    fork_of="other",
)
RESERVATION = KvReservation("res", 5, 1.5, 4, 2, "h:1")
LOGPROB = TokenLogprob(-0.5, (1, 2), (-0.5, -1.5))
BATCHES = (
    TokenBatch(
        token_index=1,
        token_ids=(8, 9),
        logprobs=(LOGPROB, LOGPROB),
        draft_tokens=2,
        accepted_tokens=1,
        timings=DecodeTimings(0.25, 0.5, 0.75, 3, (Slice(0.0, 0.25, num_bytes=5),)),
        prompt_logprobs=(LOGPROB,),
    ),
    TokenBatch(3, (0,), finish_reason=FinishReason.STOP, stop_token_id=0),
)
TARGET = PushTarget("d", "h:1", "res", 5, 2)
EVENTS: tuple[PrefillEvent, ...] = (
    PrefillStarted(0.25, 8, 4),
    FirstToken(
        TokenBatch(1, (7,), (LOGPROB,), FinishReason.STOP, 7, prompt_logprobs=(LOGPROB,)),
        0.5,
        (Slice(0.0, 0.5, num_tokens=3),),
    ),
    PrefillDone(1, 2, 3, 0.5, 0.25, 0.125),
)


class Worker:
    """Implements both servers: answers with the values above, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[object] = []
        self.error: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.ended = asyncio.Event()

    async def _at(self, *asked: object) -> None:
        self.asked.append(asked)
        try:
            await self.gate.wait()
        finally:
            self.ended.set()
        if self.error is not None:
            raise self.error

    async def reserve(self, order: AttemptOrder) -> KvReservation:
        await self._at(order)
        return RESERVATION

    async def decode(
        self, reservation_id: str, epoch: int, *, local_prefill: bool
    ) -> AsyncGenerator[TokenBatch, None]:
        yield BATCHES[0]
        await self._at(reservation_id, epoch, local_prefill)
        yield BATCHES[1]

    async def renew_leases(self, reservation_ids: Sequence[str]) -> LeaseRenewal:
        await self._at(*reservation_ids)
        return LeaseRenewal(1.5, ("b",))

    async def prefill(
        self, order: AttemptOrder, target: PushTarget | None
    ) -> AsyncGenerator[PrefillEvent, None]:
        await self._at(order, target)
        for event in EVENTS:
            yield event

    async def embed(self, order: EmbedOrder) -> PromptVector:
        await self._at(order)
        return PromptVector((1.0, 2.0), 3)

    async def measure_path(self, decode_worker_id: str, num_bytes: int) -> PathMeasurement:
        raise NotImplementedError


class DecodeWorker(Worker):
    async def release(self, reservation_id: str, request_id: str, reason: str) -> int:
        await self._at(reservation_id, request_id, reason)
        return 6


class PrefillWorker(Worker):
    async def release(self, request_id: str, attempt: int) -> int:
        await self._at(request_id, attempt)
        return 7


@asynccontextmanager
async def _served(decode: DecodeWorker, prefill: PrefillWorker) -> AsyncIterator[grpc.aio.Channel]:
    interceptor = ServerInterceptor(Telemetry("t", "t"), Metrics("t", "t", "test"), SystemClock())
    server = grpc.aio.server(interceptors=[interceptor])
    add_decode_server(server, decode)
    add_prefill_server(server, prefill)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(0)


class Bench:
    def __init__(self) -> None:
        self.decode = DecodeWorker()
        self.prefill = PrefillWorker()
        self.to_decode: DecodeCaller
        self.to_prefill: PrefillCaller


@pytest.fixture(params=["grpc", "memory"])
async def bench(request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    bench, clock = Bench(), SystemClock()
    if request.param == "memory":
        bench.to_decode = DirectDecodeCaller(bench.decode, "worker d", clock)
        bench.to_prefill = DirectPrefillCaller(bench.prefill, "worker p", clock)
        yield bench
        return
    async with _served(bench.decode, bench.prefill) as channel:
        bench.to_decode = RpcDecodeCaller(channel, "worker d", clock)
        bench.to_prefill = RpcPrefillCaller(channel, "worker p", clock)
        yield bench


async def test_decode_values_arrive_whole(bench: Bench) -> None:
    decode = bench.to_decode
    assert await decode.reserve(ORDER, 5.0) == RESERVATION
    stream = decode.decode(RESERVATION, local_prefill=True, timeout_s=5.0)
    assert [await stream.next(5.0), await stream.next(5.0)] == list(BATCHES)
    assert await stream.next(5.0) is None
    assert await decode.release(reservation_id="res", reason="x", timeout_s=5.0) == 6
    assert await decode.renew_leases(["a", "b"], 5.0) == LeaseRenewal(1.5, ("b",))
    assert bench.decode.asked == [(ORDER,), ("res", 5, True), ("res", "", "x"), ("a", "b")]


async def test_prefill_values_arrive_whole(bench: Bench) -> None:
    prefill = bench.to_prefill
    embed = EmbedOrder("e", 1, (4, 5), Pooling.MEAN, 2, "s")
    stream = prefill.prefill(replace(ORDER, fork_of=""), TARGET, 5.0)
    assert [await stream.next(5.0) for _ in EVENTS] == list(EVENTS)
    await stream.drain(5.0)
    assert await prefill.embed(embed, 5.0) == PromptVector((1.0, 2.0), 3)
    assert await prefill.release("r", 2, "x", 5.0) == 7
    assert bench.prefill.asked == [(replace(ORDER, fork_of=""), TARGET), (embed,), ("r", 2)]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KvCacheFull("no room", retry_after_s=0.5), ErrorReason.KV_CACHE_FULL),
        (QueueFull("full"), ErrorReason.QUEUE_FULL),
        (ValueError("a secret"), ErrorReason.INTERNAL),
    ],
)
async def test_errors_arrive_with_their_reason(
    bench: Bench, error: Exception, reason: ErrorReason
) -> None:
    bench.decode.error = error
    with pytest.raises(BatonError) as caught:
        await bench.to_decode.reserve(ORDER, 5.0)
    assert caught.value.reason is reason
    assert "secret" not in caught.value.message
    assert caught.value.retry_after_s == getattr(error, "retry_after_s", None)
    stream = bench.to_decode.decode(RESERVATION, local_prefill=False, timeout_s=5.0)
    assert await stream.next(5.0) == BATCHES[0]
    with pytest.raises(BatonError) as caught:
        await stream.next(5.0)
    assert caught.value.reason is reason


async def test_a_cancelled_call_ends_at_the_server(bench: Bench) -> None:
    bench.decode.gate.clear()
    stream = bench.to_decode.decode(RESERVATION, local_prefill=False, timeout_s=5.0)
    assert await stream.next(5.0) == BATCHES[0]
    await eventually(lambda: len(bench.decode.asked) == 1)
    stream.cancel()
    stream.cancel()
    await asyncio.wait_for(bench.decode.ended.wait(), 5.0)
    with pytest.raises(NoWorker, match="worker d was closed"):
        await stream.next(5.0)
    bench.decode.ended.clear()
    reserving = asyncio.create_task(bench.to_decode.reserve(ORDER, 5.0))
    await eventually(lambda: len(bench.decode.asked) == 2)
    reserving.cancel()
    await asyncio.wait_for(bench.decode.ended.wait(), 5.0)
    with pytest.raises(asyncio.CancelledError):
        await reserving


async def test_silence_and_deadlines_are_told_apart(bench: Bench) -> None:
    bench.decode.gate.clear()
    with pytest.raises(DeadlineExceeded):
        await bench.to_decode.reserve(ORDER, 0.05)
    await asyncio.wait_for(bench.decode.ended.wait(), 5.0)
    stream = bench.to_decode.decode(RESERVATION, local_prefill=False, timeout_s=5.0)
    await stream.next(5.0)
    with pytest.raises(Silent, match="worker d sent nothing"):
        await stream.next(0.05)
    stream = bench.to_decode.decode(RESERVATION, local_prefill=False, timeout_s=0.1)
    await stream.next(5.0)
    with pytest.raises(DeadlineExceeded):
        await stream.next(5.0)


async def test_draining_ends_quietly(bench: Bench) -> None:
    bench.decode.error = StaleEpoch("over")
    stream = bench.to_decode.decode(RESERVATION, local_prefill=False, timeout_s=5.0)
    await stream.drain(5.0)
