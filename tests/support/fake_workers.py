"""Tokenizer, prefill and decode workers without a model, served over real gRPC on loopback.

The "model": output token i of a prompt is a letter that depends on the sum of the prompt's ids and
on i only, so a fail-over that loses or repeats a token shows in the text. Ids are code points.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from random import Random
from types import TracebackType
from typing import Any

import grpc

from baton.core.cluster import Announcement, ServiceState, ServiceStatus, WorkerRates
from baton.core.errors import BatonError, KvTransferLost, NoWorker, RequestNotFound
from baton.core.hashing import Fingerprint, KvLayout
from baton.rpc.interceptors import ServerInterceptor
from baton.rpc.metrics import Metrics
from baton.rpc.telemetry import Telemetry
from baton.v1 import (
    common_pb2,
    decode_pb2,
    decode_pb2_grpc,
    prefill_pb2,
    prefill_pb2_grpc,
    tokenizer_pb2_grpc,
)
from baton.wire.clock import SystemClock
from baton.wire.timing import duration_to_pb
from tests.support.fake_tokenizer import MODEL, FakeTokenizer
from tests.support.pauses import Pauses

FINGERPRINT = Fingerprint(MODEL, "c", "w", "t", KvLayout.one_group(16, "float32", (1,), (8,)))
MAX_MODEL_LEN_TOKENS = 512


def output_token(prompt_ids: tuple[int, ...], index: int) -> int:
    return 97 + (sum(prompt_ids) + 7 * index) % 26


def expected_text(prompt: str, num_tokens: int) -> str:
    ids = tuple(map(ord, prompt))
    return "".join(chr(output_token(ids, index)) for index in range(num_tokens))


def prompt_logprobs(sampling: Any, prompt_ids: tuple[int, ...]) -> list[common_pb2.TokenLogprob]:
    """Minus its own place for each token, and the tokens "A", "B", ... as alternatives."""
    num_top = sampling.prompt_logprobs
    return [
        common_pb2.TokenLogprob(
            logprob=-place,
            top_token_ids=range(65, 65 + num_top),
            top_logprobs=[-0.5] * num_top,
        )
        for place in range(1, len(prompt_ids))
    ]


@dataclass
class Held:
    """A reservation at the fake decode worker."""

    request_id: str
    token_ids: tuple[int, ...]
    num_output_tokens: int
    max_tokens: int
    logprobs: bool
    sampling: Any
    committed: asyncio.Event = field(default_factory=asyncio.Event)
    lost: bool = False

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        return self.token_ids[: len(self.token_ids) - self.num_output_tokens]


class FakeDecode(decode_pb2_grpc.DecodeServiceServicer):
    role = "decode"

    def __init__(self) -> None:
        self.pauses = Pauses()
        self.held: dict[str, Held] = {}
        self.remaining_s: dict[str, float | None] = {}
        """To the deadline of the last call of each method."""
        self.orders: list[Any] = []
        self.releases: list[str] = []
        self.num_renewals = 0
        self.lease_s = 10.0
        self.refuse: Callable[[], BatonError | None] = lambda: None
        self.fail_at_index: int | None = None
        self.error: BatonError = NoWorker("the decode worker fell over")
        self.repeat_tokens = 0
        self.push_error: BatonError = KvTransferLost("the push broke")
        self.address = ""

    async def Reserve(self, request: Any, context: Any) -> decode_pb2.ReserveResponse:
        self.orders.append(request)
        self.remaining_s["Reserve"] = context.time_remaining()
        await self.pauses.at("reserve")
        if (error := self.refuse()) is not None:
            raise error
        reservation_id = f"{request.request_id}/{request.attempt}"
        self.held[reservation_id] = Held(
            request.request_id,
            tuple(request.token_ids),
            request.num_output_tokens,
            request.sampling.max_tokens,
            request.sampling.logprobs,
            request.sampling,
        )
        return decode_pb2.ReserveResponse(
            reservation_id=reservation_id,
            epoch=1,
            lease=duration_to_pb(self.lease_s),
            num_blocks=4,
            push_address=self.address,
        )

    async def Decode(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.remaining_s["Decode"] = context.time_remaining()
        held = self.held.get(request.reservation_id)
        if held is None:
            raise RequestNotFound("no such reservation")
        first = held.num_output_tokens
        if request.local_prefill:
            await self.pauses.at("local")
        else:
            await held.committed.wait()
            if held.lost:
                self.held.pop(request.reservation_id, None)
                raise self.push_error
            first += 1
        for index in range(first, held.max_tokens):
            await self.pauses.at(f"token {index}")
            if self.fail_at_index == index:
                self.fail_at_index = None
                self.held.clear()
                raise self.error
            start = max(0, index - self.repeat_tokens)
            response = decode_pb2.DecodeResponse(
                token_index=start,
                token_ids=[output_token(held.prompt_ids, i) for i in range(start, index + 1)],
            )
            if held.logprobs:
                response.logprobs.extend(
                    common_pb2.TokenLogprob(
                        logprob=-0.5, top_token_ids=[65, 66], top_logprobs=[-0.5, -1.5]
                    )
                    for _ in response.token_ids
                )
            if index == 0 and held.sampling.HasField("prompt_logprobs"):
                response.prompt_logprobs.extend(prompt_logprobs(held.sampling, held.prompt_ids))
            if index == first:
                response.timings.CopyFrom(_timings(has_kv=not request.local_prefill))
            if index == held.max_tokens - 1:
                response.finish_reason = common_pb2.FINISH_REASON_LENGTH
                self.held.pop(request.reservation_id, None)
            yield response

    async def Release(self, request: Any, context: Any) -> decode_pb2.ReleaseResponse:
        self.releases.append(request.reason)
        gone = [
            key
            for key, held in self.held.items()
            if key == request.reservation_id or held.request_id == request.request_id
        ]
        for key in gone:
            del self.held[key]
        return decode_pb2.ReleaseResponse(released_blocks=4 * len(gone))

    async def RenewLeases(self, request: Any, context: Any) -> decode_pb2.RenewLeasesResponse:
        self.num_renewals += 1
        return decode_pb2.RenewLeasesResponse(lease=duration_to_pb(self.lease_s))


def _timings(*, has_kv: bool) -> decode_pb2.DecodeTimings:
    chunks = [
        common_pb2.StageSlice(start=duration_to_pb(at_s), parts=1, bytes=2048)
        for at_s in (0.001, 0.002)
    ]
    return decode_pb2.DecodeTimings(
        queue=duration_to_pb(0.001),
        first_step=duration_to_pb(0.002),
        kv_chunks=chunks if has_kv else (),
    )


class FakePrefill(prefill_pb2_grpc.PrefillServiceServicer):
    role = "prefill"

    def __init__(self, decodes: dict[str, FakeDecode]) -> None:
        self.pauses = Pauses()
        self.copies: set[tuple[str, int]] = set()
        self.remaining_s: dict[str, float | None] = {}
        self.orders: list[Any] = []
        self.fail_at = ""
        self.embedding_scale = 1.0
        """Of a vector's last value."""
        self.error: BatonError = NoWorker("the prefill worker fell over")
        self.finish_reason: Any = common_pb2.FINISH_REASON_UNSPECIFIED
        self._decodes = decodes
        """By push address."""

    async def Prefill(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.orders.append(request)
        self.remaining_s["Prefill"] = context.time_remaining()
        held = self._decodes[request.target.address].held[request.target.reservation_id]
        copy = (request.request_id, request.attempt)
        self.copies.add(copy)
        try:
            await self._stage("queue", held)
            yield prefill_pb2.PrefillResponse(
                started=prefill_pb2.PrefillStarted(queue=duration_to_pb(0.001))
            )
            await self._stage("compute", held)
            first = prefill_pb2.FirstToken(
                token_id=output_token(held.prompt_ids, held.num_output_tokens),
                compute=duration_to_pb(0.002),
                finish_reason=self.finish_reason,
            )
            for start_s, tokens in ((0.0, 3), (0.001, len(held.prompt_ids) - 3)):
                first.chunks.append(
                    common_pb2.StageSlice(
                        start=duration_to_pb(start_s),
                        duration=duration_to_pb(0.001),
                        parts=1,
                        tokens=max(0, tokens),
                    )
                )
            if request.sampling.logprobs:
                first.logprob.logprob = -0.25
            if request.sampling.HasField("prompt_logprobs") and not held.num_output_tokens:
                first.prompt_logprobs.extend(prompt_logprobs(request.sampling, held.prompt_ids))
            yield prefill_pb2.PrefillResponse(first_token=first)
            await self._stage("transfer", held)
            held.committed.set()
            yield prefill_pb2.PrefillResponse(
                done=prefill_pb2.PrefillDone(
                    bytes=4096,
                    blocks=4,
                    chunks=2,
                    transfer=duration_to_pb(0.003),
                    exposed=duration_to_pb(0.001),
                )
            )
        except asyncio.CancelledError:
            self.copies.discard(copy)
            raise

    async def _stage(self, name: str, held: Held) -> None:
        await self.pauses.at(name)
        if self.fail_at == name:
            self.fail_at = ""
            held.lost = True
            held.committed.set()
            raise self.error

    async def EmbedPrompt(self, request: Any, context: Any) -> prefill_pb2.EmbedPromptResponse:
        """The prompt's first two ids, and its length."""
        self.orders.append(request)
        self.remaining_s["EmbedPrompt"] = context.time_remaining()
        await self.pauses.at("embed")
        if self.fail_at == "embed":
            self.fail_at = ""
            raise self.error
        first, second = (*request.token_ids, 0)[:2]
        values = [first, second, len(request.token_ids)]
        values[-1] *= self.embedding_scale
        return prefill_pb2.EmbedPromptResponse(values=values, cached_tokens=1)

    async def ReleasePrefill(self, request: Any, context: Any) -> Any:
        self.copies.discard((request.request_id, request.attempt))
        return prefill_pb2.ReleasePrefillResponse()


Fake = FakeTokenizer | FakeDecode | FakePrefill
_ADD = {
    "tokenizer": tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server,
    "decode": decode_pb2_grpc.add_DecodeServiceServicer_to_server,
    "prefill": prefill_pb2_grpc.add_PrefillServiceServicer_to_server,
}


class FakeProcess:
    """One fake behind a gRPC server of its own."""

    def __init__(self, worker_id: str, fake: Fake) -> None:
        self.worker_id = worker_id
        self.fake = fake
        self.fingerprint = None if fake.role == "tokenizer" else FINGERPRINT
        self.is_alive = True
        telemetry = Telemetry(fake.role, worker_id)
        metrics = Metrics(fake.role, worker_id, "test")
        self._server = grpc.aio.server(
            interceptors=[ServerInterceptor(telemetry, metrics, SystemClock())]
        )
        _ADD[fake.role](fake, self._server)  # type: ignore[operator]
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        if isinstance(fake, FakeDecode):
            fake.address = self.address

    async def __aenter__(self) -> FakeProcess:
        await self._server.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        await self.kill()

    async def kill(self) -> None:
        self.is_alive = False
        await self._server.stop(0)

    def announcement(self, **changes: Any) -> Announcement:
        rates = changes.pop("rates", WorkerRates())
        status = ServiceStatus(
            worker_id=self.worker_id,
            role=self.fake.role,
            address=self.address,
            state=changes.pop("state", ServiceState.READY),
            model=MODEL,
            fingerprint=self.fingerprint,
            models=(MODEL,) if self.fake.role == "tokenizer" else (),
            max_model_len_tokens=MAX_MODEL_LEN_TOKENS,
        )
        return Announcement(status, lease_s=60.0, rates=rates)


RNG = Random(7)
