"""A real scheduler service between fake workers, all over gRPC on loopback."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from random import Random
from types import SimpleNamespace, TracebackType
from typing import Any

import grpc
import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from baton.core.cluster import Announcement, ServiceStatus
from baton.core.errors import ErrorReason, NoWorker
from baton.rpc.bus import Bus
from baton.rpc.interceptors import ServerInterceptor
from baton.rpc.membership import MembershipView
from baton.rpc.metrics import Metrics
from baton.rpc.runtime import Lifecycle, Runtime
from baton.rpc.telemetry import Telemetry
from baton.scheduler.service import SchedulerService
from baton.scheduler.settings import SchedulerSettings
from baton.v1 import inference_pb2, inference_pb2_grpc
from baton.wire.channel import ChannelPool
from baton.wire.clock import SystemClock
from baton.wire.control import RpcControl, add_control
from baton.wire.errors import error_from_rpc
from tests.support.eventually import eventually
from tests.support.fake_workers import (
    FINGERPRINT,
    FakeDecode,
    FakePrefill,
    FakeProcess,
    FakeTokenizer,
)

LOST_WITHIN_S = 1.5
"""Nothing is held any more after this."""


@dataclass
class Answer:
    """What a caller got."""

    messages: list[Any]

    @property
    def text(self) -> str:
        return "".join(message.text for message in self.messages)

    @property
    def last(self) -> Any:
        return self.messages[-1]

    def token_ids(self) -> list[int]:
        return [token_id for message in self.messages for token_id in message.token_ids]

    def stages(self) -> dict[str, float]:
        return {
            entry.stage: entry.duration.ToTimedelta().total_seconds() for entry in self.last.stages
        }


class Rig:
    """Tokenizers, prefill and decode workers, and a scheduler that knows them."""

    def __init__(
        self, *, num_prefill: int = 1, num_decode: int = 1, num_tokenizers: int = 1, **settings: Any
    ) -> None:
        fields = {"local_prefill_max_tokens": 0, "nats_url": "", **settings}
        self.settings = SchedulerSettings(**fields)
        self.tokenizers = [FakeTokenizer() for _ in range(num_tokenizers)]
        self.decodes = [FakeDecode() for _ in range(num_decode)]
        self.by_address: dict[str, FakeDecode] = {}
        self.prefills = [FakePrefill(self.by_address) for _ in range(num_prefill)]
        self.processes: dict[str, FakeProcess] = {}
        self.stops: list[float | None] = []
        """Drains that were asked for."""
        self.spans = InMemorySpanExporter()
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Rig:
        for fake in (*self.tokenizers, *self.decodes, *self.prefills):
            await self.start(fake)
        telemetry = Telemetry(
            "scheduler", "scheduler-0", processors=(SimpleSpanProcessor(self.spans),)
        )
        self.metrics = Metrics("scheduler", "scheduler-0", "test")
        channels = ChannelPool(max_message_bytes=4 << 20, inject=telemetry.inject)
        self._stack.push_async_callback(channels.close)
        bus = Bus(
            "",
            name="t",
            telemetry=telemetry,
            metrics=self.metrics,
            rng=Random(1),
            clock=SystemClock(),
        )
        self.members = MembershipView(bus, self._status, clock=SystemClock())
        self._stack.push_async_callback(self.members.stop)
        await self.members.start()
        for process in self.processes.values():
            self.members.observe(process.announcement())
        runtime = Runtime(
            settings=self.settings,
            role="scheduler",
            worker_id="scheduler-0",
            address="",
            metrics_address="",
            telemetry=telemetry,
            metrics=self.metrics,
            bus=bus,
            members=self.members,
            channels=channels,
            control=RpcControl(channels),
            rng=Random(2),
            clock=SystemClock(),
            lifecycle=Lifecycle(),
        )
        self.service = SchedulerService(runtime)
        interceptor = ServerInterceptor(
            telemetry, self.metrics, SystemClock(), runtime.lifecycle.guard
        )
        server = grpc.aio.server(
            interceptors=[interceptor],
            maximum_concurrent_rpcs=self.settings.max_concurrent_rpcs,
        )
        self.service.register(server)
        own = ServiceStatus("scheduler-0", "scheduler", "")
        process: Any = SimpleNamespace(
            describe=lambda: Announcement(own, lease_s=1.0),
            kv_snapshot=self.service.kv_snapshot,
            request_stop=self.stops.append,
        )
        add_control(server, process)
        port = server.add_insecure_port("127.0.0.1:0")
        await self.service.start()
        await server.start()
        self._stack.push_async_callback(self.service.stop)
        self._stack.push_async_callback(server.stop, 0)
        self.address = f"127.0.0.1:{port}"
        channel = grpc.aio.insecure_channel(self.address)
        self._stack.push_async_callback(channel.close)
        self.stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    async def start(self, fake: FakeTokenizer | FakeDecode | FakePrefill) -> FakeProcess:
        worker_id = f"{fake.role}-{sum(p.fake.role == fake.role for p in self.processes.values())}"
        process = await self._stack.enter_async_context(FakeProcess(worker_id, fake))
        self.processes[worker_id] = process
        if isinstance(fake, FakeDecode):
            self.by_address[process.address] = fake
            if fake not in self.decodes:
                self.decodes.append(fake)
        return process

    async def replace_weights(self) -> str:
        """All workers go, and one comes with other weights under the same name: its id."""
        for worker_id, process in self.processes.items():
            if process.fake.role != "tokenizer":
                await process.kill()
                self.members.suspect(worker_id)
        await eventually(
            lambda: not any(m.status.role in {"decode", "prefill"} for m in self.members.view())
        )
        process = await self.start(FakeDecode())
        process.fingerprint = replace(FINGERPRINT, weights_hash="other")
        self.members.observe(process.announcement())
        return process.worker_id

    def request(self, prompt: str = "hello", **fields: Any) -> inference_pb2.GenerateRequest:
        sampling = {"max_tokens": 8, "seed": 1, **fields.pop("sampling", {})}
        request = inference_pb2.GenerateRequest(explain=True, return_token_ids=True, **fields)
        if prompt:
            request.text = prompt
        for name, value in sampling.items():
            target = getattr(request.sampling, name)
            if isinstance(value, list):
                target.extend(value)
            else:
                setattr(request.sampling, name, value)
        return request

    async def ask(
        self, prompt: str = "hello", timeout_s: float | None = 20, **fields: Any
    ) -> Answer:
        call = self.stub.Generate(self.request(prompt, **fields), timeout=timeout_s)
        return Answer([message async for message in call])

    async def failure(self, prompt: str = "hello", **fields: Any) -> tuple[ErrorReason, str]:
        """As `ask`, for what is bound to fail: the error's reason and message."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.ask(prompt, **fields)
        error = error_from_rpc(caught.value)
        return error.reason, error.message

    def nothing_held(self) -> bool:
        return not any(decode.held for decode in self.decodes) and not any(
            prefill.copies for prefill in self.prefills
        )

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    async def _status(self, address: str) -> Announcement:
        for process in self.processes.values():
            if process.address == address and process.is_alive:
                return process.announcement()
        raise NoWorker("nobody answers")
