"""Prefill and decode services in this process, with real gRPC between them and no broker."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import grpc
import pytest
import torch
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from baton.core.cluster import Announcement, ServiceState, ServiceStatus
from baton.core.errors import ErrorReason
from baton.decode.service import DecodeService
from baton.decode.settings import DecodeSettings
from baton.prefill.service import PrefillService
from baton.prefill.settings import PrefillSettings
from baton.rpc.bus import Bus
from baton.rpc.interceptors import ServerInterceptor
from baton.rpc.membership import MembershipView
from baton.rpc.metrics import Metrics
from baton.rpc.runtime import Lifecycle, Runtime, Service
from baton.rpc.server import create_server, listen
from baton.rpc.settings import ServiceSettings
from baton.rpc.telemetry import Telemetry
from baton.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from baton.wire.channel import ChannelPool
from baton.wire.clock import SystemClock
from baton.wire.control import RpcControl
from baton.wire.errors import error_from_rpc
from tests.support.eventually import eventually
from tests.support.faulty_prefill import faulty


class RecordingBus(Bus):
    """Keeps what is published instead of sending it."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__("", **arguments)
        self.published: list[tuple[str, bytes]] = []

    async def publish(self, subject: str, data: bytes) -> None:
        self.published.append((subject, data))


@dataclass
class Hosted:
    """One service and what its process would give it."""

    service: Any
    runtime: Runtime[Any]
    bus: RecordingBus
    spans: InMemorySpanExporter

    @property
    def address(self) -> str:
        return self.runtime.address

    @property
    def engine(self) -> Any:
        return self.service.loaded().host.engine

    def counts(self) -> dict[str, int]:
        """KV blocks by state, checked."""
        self.engine.check()
        return dict(self.engine.kv_counts())

    def is_clean(self) -> bool:
        """True when every block is free or cached, and nothing runs."""
        counts = self.counts()
        return counts["free"] + counts["cached"] == sum(counts.values())


@asynccontextmanager
async def hosted(
    settings: ServiceSettings, service_cls: Callable[[Any], Any], cache_address: str = ""
) -> AsyncIterator[Hosted]:
    """Runs a service behind a gRPC server of its own."""
    worker_id = f"{settings.role}-test"
    spans = InMemorySpanExporter()
    telemetry = Telemetry(settings.role, worker_id, processors=(SimpleSpanProcessor(spans),))
    metrics = Metrics(settings.role, worker_id, "0")
    channels = ChannelPool(max_message_bytes=settings.max_message_bytes, inject=telemetry.inject)
    bus = RecordingBus(
        name=worker_id, telemetry=telemetry, metrics=metrics, rng=Random(1), clock=SystemClock()
    )
    control = RpcControl(channels)
    members = MembershipView(
        bus, lambda address: control.status(address, lease_s=3.0), clock=SystemClock()
    )
    if cache_address:
        status = ServiceStatus("cache-1", "cache", cache_address, state=ServiceState.READY)
        members._view = members.view().announced(Announcement(status, 3600.0), time.monotonic())
    server = create_server(settings, [ServerInterceptor(telemetry, metrics, SystemClock())])
    port = listen(server, settings)
    runtime: Runtime[Any] = Runtime(
        settings=settings,
        role=settings.role,
        worker_id=worker_id,
        address=f"127.0.0.1:{port}",
        metrics_address="",
        telemetry=telemetry,
        metrics=metrics,
        bus=bus,
        members=members,
        channels=channels,
        control=control,
        rng=Random(2),
        clock=SystemClock(),
        lifecycle=Lifecycle(state=ServiceState.READY),
    )
    service: Service = service_cls(runtime)
    service.register(server)
    await server.start()
    try:
        await service.start()
        yield Hosted(service, runtime, bus, spans)
    finally:
        await server.stop(0)
        await service.stop()
        await channels.close()
        telemetry.shutdown()


@dataclass
class Generated:
    """What came of one request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    finish_reason: int = 0
    started: Any = None
    first: Any = None
    done: Any = None
    timings: Any = None


class Pair:
    """A prefill and a decode worker, and the scheduler's part of a request."""

    def __init__(self, prefill: Hosted, decode: Hosted, channels: ChannelPool) -> None:
        self.prefill = prefill
        self.decode = decode
        self.to_decode = decode_pb2_grpc.DecodeServiceStub(channels.get(decode.address))
        self.to_prefill = prefill_pb2_grpc.PrefillServiceStub(channels.get(prefill.address))

    async def reserve(
        self, prompt: Sequence[int], request_id: str = "req", attempt: int = 1, **sampling: Any
    ) -> decode_pb2.ReserveResponse:
        return await self.to_decode.Reserve(
            decode_pb2.ReserveRequest(
                request_id=request_id,
                attempt=attempt,
                token_ids=prompt,
                sampling=_sampling(sampling),
            ),
            timeout=20,
        )

    def prefill_request(
        self,
        prompt: Sequence[int],
        grant: decode_pb2.ReserveResponse | None,
        request_id: str = "req",
        attempt: int = 1,
        **sampling: Any,
    ) -> prefill_pb2.PrefillRequest:
        target = None
        if grant is not None:
            target = prefill_pb2.PushTarget(
                worker_id="decode-test",
                address=grant.push_address,
                reservation_id=grant.reservation_id,
                epoch=grant.epoch,
                num_cached_blocks=grant.num_cached_blocks,
            )
        return prefill_pb2.PrefillRequest(
            request_id=request_id,
            attempt=attempt,
            token_ids=prompt,
            sampling=_sampling(sampling),
            target=target,
        )

    async def run_prefill(
        self, request: prefill_pb2.PrefillRequest, out: Generated | None = None
    ) -> Generated:
        out = out or Generated()
        async for event in self.to_prefill.Prefill(request, timeout=30):
            match event.WhichOneof("event"):
                case "started":
                    out.started = event.started
                case "first_token":
                    out.first = event.first_token
                    out.token_ids.append(event.first_token.token_id)
                    out.finish_reason = event.first_token.finish_reason
                    if event.first_token.HasField("logprob"):
                        out.logprobs.append(event.first_token.logprob)
                case "done":
                    out.done = event.done
        return out

    async def run_decode(
        self,
        grant: decode_pb2.ReserveResponse,
        out: Generated | None = None,
        *,
        local_prefill: bool = False,
    ) -> Generated:
        out = out or Generated()
        request = decode_pb2.DecodeRequest(
            reservation_id=grant.reservation_id, epoch=grant.epoch, local_prefill=local_prefill
        )
        async for response in self.to_decode.Decode(request, timeout=30):
            if response.token_ids:
                assert response.token_index == len(out.token_ids)
            out.token_ids.extend(response.token_ids)
            out.logprobs.extend(response.logprobs)
            out.finish_reason = response.finish_reason
            if response.HasField("timings"):
                out.timings = response.timings
        return out

    async def generate(
        self, prompt: Sequence[int], request_id: str = "req", attempt: int = 1, **sampling: Any
    ) -> Generated:
        """The whole way: reserve, prefill with push, decode."""
        grant = await self.reserve(prompt, request_id, attempt, **sampling)
        out = await self.run_prefill(
            self.prefill_request(prompt, grant, request_id, attempt, **sampling)
        )
        if out.finish_reason:
            return out
        return await self.run_decode(grant, out)

    async def assert_clean(self) -> None:
        """Lets go of what the prefill worker keeps of `req`; then nothing may be left."""
        await self.to_prefill.ReleasePrefill(
            prefill_pb2.ReleasePrefillRequest(request_id="req"), timeout=5
        )
        await eventually(self.prefill.is_clean)
        await eventually(self.decode.is_clean)


def prompt_of(num_tokens: int, seed: int = 0) -> list[int]:
    """Tokens of a tiny model's vocabulary."""
    return [(index * 37 + seed * 11 + 5) % 256 for index in range(num_tokens)]


async def refused(reason: ErrorReason, call: Awaitable[object]) -> str:
    """The message of a call that fails for a reason."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = error_from_rpc(caught.value)
    assert error.reason is reason
    return error.message


def _sampling(given: dict[str, Any]) -> dict[str, Any]:
    return {"temperature": 0.0, "seed": 1, "ignore_eos": True, "max_tokens": 8, **given}


def worker_settings(cls: type[Any], model_path: Path, **changes: Any) -> Any:
    """Settings of a small worker."""
    return cls(**{
        "model_path": model_path,
        "nats_url": "",
        "dtype": "float32",
        "num_blocks": 128,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 16,
        "num_threads": 1,
        **changes,
    })


@asynccontextmanager
async def worker_pair(
    model_path: Path,
    *,
    prefill: dict[str, Any] | None = None,
    decode: dict[str, Any] | None = None,
    cache_address: str = "",
) -> AsyncIterator[Pair]:
    """Both workers with a model, ready."""
    torch.set_num_threads(1)
    async with AsyncExitStack() as stack:
        hosted_decode = await stack.enter_async_context(
            hosted(
                worker_settings(DecodeSettings, model_path, **(decode or {})),
                DecodeService,
                cache_address,
            )
        )
        settings = dict(prefill or {})
        fault = settings.pop("fault", "")
        hosted_prefill = await stack.enter_async_context(
            hosted(
                worker_settings(PrefillSettings, model_path, **settings),
                faulty(fault) if fault else PrefillService,
                cache_address,
            )
        )
        channels = ChannelPool(max_message_bytes=4 << 20)
        stack.push_async_callback(channels.close)
        yield Pair(hosted_prefill, hosted_decode, channels)
